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


def time_call(call: Callable[[], object], device: torch.device | str, seconds: float = 0.3) -> Timing:
    """Time a call without arguments. On CUDA by events with the L2 cache flushed before every run, elsewhere by the
    wall clock; after one warm-up, for about `seconds`, at least three runs."""
    if torch.device(device).type == "cuda":
        from triton.testing import do_bench

        return Timing(*do_bench(call, warmup=100, rep=int(1000 * seconds), quantiles=[0.5, 0.2, 0.8]))
    call()
    times, end = [], time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    quantiles = torch.tensor(times).quantile(torch.tensor([0.5, 0.2, 0.8]))
    return Timing(*quantiles.tolist())


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
