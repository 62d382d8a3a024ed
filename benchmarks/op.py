"""The op suite: one attention call, forward and backward, for our ops and every peer that can run here."""

from collections.abc import Callable, Iterator

import torch
import torch._dynamo

from benchmarks.measure import PASSES, attempt, dtype_name, measure
from benchmarks.peers import PEERS, SWEEP, Inputs, Peer, gbytes, kept, named, tflops
from benchmarks.shapes import CPU, CPU_WAN, DIMS, MODELS, SHAPES, TOKENS

TOLERANCE = 2e-2  # largest relative error of a result that is still worth timing


def default_shapes(device: str) -> list[str]:
    return list(MODELS | TOKENS | DIMS if device == "cuda" else CPU | CPU_WAN)


def rows_of(
    shape_name: str, dtype: torch.dtype, device: str, words: list[str] | None = None, attempt: Callable = attempt
) -> Iterator[dict]:
    """Yield a row for each pass of each peer whose name contains one of `words`, measured by `attempt`."""
    torch._dynamo.reset()  # so that compiled peers are compiled for this shape
    inputs = Inputs.random(SHAPES[shape_name], dtype, device)
    wanted = named(words)
    for name in SWEEP if shape_name in TOKENS else PEERS:
        if name in wanted and (device == "cuda" or not PEERS[name].cuda_only):
            yield from _peer_rows(shape_name, name, PEERS[name], inputs, attempt)


def _peer_rows(shape_name: str, name: str, peer: Peer, inputs: Inputs, attempt: Callable = attempt) -> Iterator[dict]:
    shape, dtype, device = SHAPES[shape_name], inputs.q.dtype, inputs.q.device.type
    leaves, calls = peer.leaves(inputs), []
    for which in PASSES if leaves else PASSES[:1]:
        row = {"suite": "op", "shape": shape_name, "dtype": dtype_name(dtype), "name": name}
        row |= {"pass": which, "sizes": list(shape[:4])}
        row |= {"kept": share} if (share := kept(shape, peer.cost)) is not None else {}

        def run(which=which):
            if not calls:
                if peer.most_tokens is not None and shape.tokens > peer.most_tokens:
                    raise ValueError(f"left out above {peer.most_tokens:,} tokens")
                call = peer.build(inputs)
                verify(name, call, inputs)
                calls.append(call)
            costs = gbytes(shape, peer.cost, which, dtype.itemsize), tflops(shape, peer.cost, which)
            measured = measure(calls[0], leaves, inputs.gradient, which, device)
            return measured | {"gbytes": costs[0], "tflops": costs[1]}

        row = attempt(row, run)
        yield row
        if "absent" in row and not calls:
            break  # it isn't installed: one row says so


@torch.no_grad()
def verify(name: str, call, x: Inputs) -> None:
    """Refuse to time a wrong result: ours are compared with the definition in fp32 on the first head.

    Raises:
        ArithmeticError: The output isn't finite, or it is too far from the reference.
    """
    out = call()
    if not out.isfinite().all():
        raise ArithmeticError("the output is not finite")
    if PEERS[name].expected is None:
        return
    rows, expected = PEERS[name].expected(x.first_head())
    error = ((out[:, rows, :1].float() - expected).norm() / expected.norm()).item()
    if not error < TOLERANCE:
        raise ArithmeticError(f"relative error {error:.1e} against the definition in fp32")
