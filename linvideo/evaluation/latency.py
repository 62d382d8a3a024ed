"""How long a call takes on this device, and softmax against linear attention over the sequence length."""

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F

from linvideo.ops import linear_attn

CYCLES = 3e6  # of a GPU's clock in a millisecond, or more
WIDE = 1.5  # a timing is unstable where the 80th percentile is more than this many times the 20th


class Timing(NamedTuple):
    """Milliseconds of one call: the median and the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


def time_call(
    call: Callable, device: torch.device | str, seconds: float = 0.3, before: Callable[[], object] | None = None
) -> Timing:
    """Time a call without arguments, or with what `before` returns; `before` runs ahead of each call, untimed.

    After one warm-up, for about `seconds`, at least three runs and at most 200. On CUDA it is the device's time, by
    events, with the L2 cache flushed before every run, and does not contain what the host takes to launch kernels (see
    `time_call_and_host`); elsewhere by the wall clock.
    """
    return time_call_and_host(call, device, seconds, before)[0]


def time_call_and_host(
    call: Callable, device: torch.device | str, seconds: float = 0.3, before: Callable[[], object] | None = None
) -> tuple[Timing, float]:
    """`time_call`, and the host's median milliseconds until the call returns. Where they are more than the device's,
    and nothing else keeps the GPU busy, they are what a call takes."""
    run = _run_cuda(device) if torch.device(device).type == "cuda" else _run_cpu
    arguments = (lambda: ()) if before is None else (lambda: (before(),))
    run(call, arguments())
    times = [run(call, arguments())]
    for _ in range(min(200, max(3, int(1000 * seconds / times[0][0]))) - 1):
        times.append(run(call, arguments()))
    device_times, host_times = torch.tensor(times, dtype=torch.float64).T
    quantiles = device_times.quantile(torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64))
    return Timing(*quantiles.tolist()), host_times.quantile(0.5).item()


def _run_cpu(call: Callable, arguments: tuple) -> tuple[float, float]:
    start = time.perf_counter()
    call(*arguments)
    took = 1000 * (time.perf_counter() - start)
    return took, took


def _run_cuda(device) -> Callable[[Callable, tuple], tuple[float, float]]:
    cache = torch.empty(256 << 20, dtype=torch.uint8, device=device)  # larger than any L2
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    wait = 0.0  # milliseconds that the GPU is kept from starting: as long as the host took to launch everything before

    def run(call: Callable, arguments: tuple) -> tuple[float, float]:
        nonlocal wait
        with torch.cuda.device(device):  # the wait and the events are the current device's
            cache.zero_()
            torch.cuda._sleep(1 + int(CYCLES * wait))
            start.record()
            begun = time.perf_counter()
            call(*arguments)
            host = 1000 * (time.perf_counter() - begun)
            end.record()
            torch.cuda.synchronize()
        wait = min(1.25 * host, 10.0)  # also of a call that waits for the GPU itself
        return start.elapsed_time(end), host

    return run


def attention_latency(
    device: torch.device | str, lengths: list[int], heads: int = 4, head_dim: int = 24, dtype=torch.float32
) -> list[dict]:
    """Forward milliseconds of softmax (F.scaled_dot_product_attention as PyTorch dispatches it) and of hedgehog linear
    attention for batch 1 and each length: rows with keys tokens, softmax, linear (each a list median, p20, p80)."""
    rows = []
    weight = torch.eye(head_dim, device=device, dtype=dtype).repeat(heads, 1, 1)
    for tokens in lengths:
        q, k, v = torch.randn(3, 1, tokens, heads, head_dim, device=device, dtype=dtype)
        transposed = [x.transpose(1, 2) for x in (q, k, v)]
        with torch.no_grad():
            softmax = time_call(lambda t=transposed: F.scaled_dot_product_attention(*t), device)
            linear = time_call(lambda a=(q, k, v): linear_attn(*a, q_weight=weight, k_weight=weight), device)
        rows.append({"tokens": tokens, "softmax": list(softmax), "linear": list(linear)})
    return rows


def unstable(timing: Sequence[float]) -> bool:
    """Say whether the spread of a timing (median, p20, p80) is wide."""
    return timing[2] > WIDE * timing[1]


def doubts(rows: list[dict]) -> list[str]:
    """Say why the rows of `attention_latency` are not to be trusted; [] if they are.

    Other programs on the same machine make longer sequences take less time, or timings so unstable that they do not say
    which attention is faster.
    """
    found = []
    for row in rows:
        wide = [name for name in ("softmax", "linear") if unstable(row[name])]
        if wide and max(row["softmax"][1], row["linear"][1]) <= min(row["softmax"][2], row["linear"][2]):
            _, p20, p80 = row[wide[0]]
            found.append(f"{wide[0]} over {row['tokens']:,} tokens took {p20:.3g} to {p80:.3g} ms (p20 to p80)")
    for name in ("softmax", "linear"):
        for shorter, longer in pairwise(rows):
            if longer[name][0] < 0.9 * shorter[name][0]:
                found.append(f"{name} was faster over {longer['tokens']:,} tokens than over {shorter['tokens']:,}")
    return found
