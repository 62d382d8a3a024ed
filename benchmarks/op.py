"""The op suite: one attention call, forward and backward, against every peer that can run here."""

import torch
import torch._dynamo
import torch._functorch.config

from benchmarks.measure import PASSES, attempt, measure
from benchmarks.peers import PEERS, SWEEP, Inputs, Peer, gbytes, tflops
from benchmarks.shapes import CPU, DIMS, MODELS, SHAPES, TOKENS


def default_shapes(device: str) -> list[str]:
    return list(MODELS | TOKENS | DIMS if device == "cuda" else CPU)


def rows_of(shape_name: str, dtype: torch.dtype, device: str) -> list[dict]:
    """A row for each peer and pass."""
    torch._functorch.config.donated_buffer = False  # or a compiled function's backward could run but once
    torch._dynamo.reset()  # compiled peers are compiled for this shape
    inputs = Inputs.random(SHAPES[shape_name], dtype, device)
    wanted = SWEEP if shape_name in TOKENS else PEERS
    rows = []
    for name in wanted:
        if device == "cuda" or not PEERS[name].cuda_only:
            rows += _peer_rows(shape_name, name, PEERS[name], inputs)
    return rows


def _peer_rows(shape_name: str, name: str, peer: Peer, inputs: Inputs) -> list[dict]:
    shape, dtype, device = SHAPES[shape_name], inputs.q.dtype, inputs.q.device.type
    leaves = [getattr(inputs, x) for x in peer.learned]
    rows, calls = [], []
    for which in PASSES if leaves else PASSES[:1]:
        row = {"suite": "op", "shape": shape_name, "dtype": str(dtype).removeprefix("torch."), "name": name}
        row |= {"pass": which, "sizes": list(shape)}

        def run(which=which):
            if not calls:
                calls.append(peer.build(inputs))
            costs = gbytes(shape, peer.cost, which, dtype.itemsize), tflops(shape, peer.cost, which)
            measured = measure(calls[0], leaves, inputs.gradient, which, device)
            return measured | {"gbytes": costs[0], "tflops": costs[1]}

        rows.append(attempt(row, run))
        if "absent" in rows[-1] and not calls:
            break  # not installed: once is enough
    return rows
