"""Timing of calls with their gradients and memory, and the device's own rates to compare with."""

from collections.abc import Callable, Sequence

import torch

from linvideo.evaluation.latency import time_call

PASSES = ("forward", "backward", "forward+backward")
SECONDS = 0.3  # of repetitions for one figure


def rates(device: str, dtype: torch.dtype) -> dict[str, float]:
    """What a plain copy and a plain matrix product reach here: GB/s (read and written) and TFLOP/s in `dtype`."""
    count, size = (1 << 29, 8192) if device == "cuda" else (1 << 26, 1024)
    source = torch.empty(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = time_call(lambda: target.copy_(source), device)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = time_call(lambda: a @ b, device)
    return {"copy_gb_s": 2 * count / copy.median / 1e6, "matmul_tflop_s": 2 * size**3 / product.median / 1e9}


def measure(
    call: Callable[[], torch.Tensor], leaves: Sequence[torch.Tensor], gradient: torch.Tensor, which: str, device: str
) -> dict:
    """{"ms": [median, p20, p80], "peak_mib" on CUDA} of one of PASSES; the forward alone runs without autograd."""
    if which == "forward":
        run = torch.no_grad()(call)
    elif which == "backward":
        out = call()
        run = lambda: torch.autograd.grad(out, leaves, gradient, retain_graph=True)  # noqa: E731
    else:
        run = lambda: torch.autograd.grad(call(), leaves, gradient)  # noqa: E731
    return timed(run, device)


def timed(run: Callable[[], object], device: str) -> dict:
    """{"ms": [median, p20, p80]}, on CUDA with "peak_mib", the memory that the call takes beside what it finds."""
    if device != "cuda":
        return {"ms": list(time_call(run, device, SECONDS))}
    run()  # compiled and warm: what that needed once is not the call's
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - held) / 2**20
    return {"ms": list(time_call(run, device, SECONDS)), "peak_mib": round(peak, 1)}


def attempt(row: dict, action: Callable[[], dict]) -> dict:
    """The row with what `action` returns, or with the reason why it cannot."""
    try:
        return row | action()
    except (RuntimeError, ImportError, NotImplementedError, ValueError, AttributeError) as error:
        lines = str(error).strip().splitlines() or [""]
        return row | {"absent": f"{type(error).__name__}: {lines[0][:120]}"}
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
