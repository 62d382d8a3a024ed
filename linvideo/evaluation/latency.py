"""How long a call takes on this device, and softmax against linear attention over the sequence length."""

import platform
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from linvideo.ops import linear_attn


class Timing(NamedTuple):
    """Milliseconds of one call: the median and the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


def time_call(
    call: Callable, device: torch.device | str, seconds: float = 0.3, before: Callable[[], object] | None = None
) -> Timing:
    """Time a call without arguments, or with what `before` returns; `before` runs ahead of each call, untimed.

    After one warm-up, for about `seconds`, at least three runs and at most 200. On CUDA by events, with the L2 cache
    flushed before every run; elsewhere by the wall clock.
    """
    cuda = torch.device(device).type == "cuda"
    run = _run_cuda(device) if cuda else _run_cpu
    arguments = (lambda: ()) if before is None else (lambda: (before(),))
    call(*arguments())
    times = [run(call, arguments())]
    for _ in range(min(200, max(3, int(1000 * seconds / times[0]))) - 1):
        times.append(run(call, arguments()))
    quantiles = torch.tensor(times).quantile(torch.tensor([0.5, 0.2, 0.8]))
    return Timing(*quantiles.tolist())


def _run_cpu(call: Callable, arguments: tuple) -> float:
    start = time.perf_counter()
    call(*arguments)
    return 1000 * (time.perf_counter() - start)


def _run_cuda(device) -> Callable[[Callable, tuple], float]:
    cache = torch.empty(256 << 20, dtype=torch.uint8, device=device)  # larger than any L2
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def run(call: Callable, arguments: tuple) -> float:
        cache.zero_()
        start.record()
        call(*arguments)
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end)

    return run


def device_name(device: torch.device | str) -> str:
    """The device in words, for the caption of a measurement."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


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
