"""Time and memory of calls and their gradients, and the rates of the device to compare them with."""

from collections.abc import Callable, Sequence

import torch

from linvideo.evaluation.latency import time_call, time_call_and_host

PASSES = ("forward", "backward", "forward+backward")
SECONDS = 0.3  # of repetitions for each figure


def rates(device: str, dtype: torch.dtype) -> dict[str, float]:
    """Measure what a plain copy (GB/s, read and written) and a plain matrix product in `dtype` (TFLOP/s) reach here."""
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
    """Time one of PASSES: the forward runs without autograd, the backward after a forward that is not timed."""
    if which == "forward":
        return timed(torch.no_grad()(call), device)
    if which == "backward":
        return timed(lambda out: torch.autograd.grad(out, leaves, gradient), device, before=call)
    return timed(lambda: torch.autograd.grad(call(), leaves, gradient), device)


def timed(run: Callable, device: str, before: Callable[[], object] | None = None) -> dict:
    """Time `run`, which is given the result of `before` if that is set; only `run` is timed.

    Returns:
        {"ms": [median, 20th, 80th percentile]}, and on CUDA also
        "host_ms": Median time until the call returns on the host.
        "held_mib": Memory allocated before the call, including weights and saved tensors.
        "peak_mib": Peak memory of the call on top of held_mib.
    """
    timing, host = time_call_and_host(run, device, SECONDS, before)
    if device != "cuda":
        return {"ms": list(timing)}
    arguments = () if before is None else (before(),)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    run(*arguments)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - held
    return {"ms": list(timing), "host_ms": host, "held_mib": _mib(held), "peak_mib": _mib(peak)}


def _mib(size: int) -> float:
    return round(size / 2**20, 1)


def attempt(row: dict, action: Callable[[], dict]) -> dict:
    """Return the row with the figures of `action`, or with the reason why it failed, which doesn't end the run."""
    try:
        return row | action()
    except Exception as error:  # third-party compilers and kernels raise anything
        return row | {"absent": reason(error)}
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def reason(error: Exception) -> str:
    """Describe an error in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:120]}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
