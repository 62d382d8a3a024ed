"""The suite "kernel": which kernels one call of an op launches, in order, and how long each takes."""

from collections.abc import Callable, Iterator

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import dtype_name
from benchmarks.peers import OURS, PEERS, Inputs
from benchmarks.shapes import SHAPES

REPEATS = 20


def rows_of(shape_name: str, dtype: torch.dtype, device: str, names: tuple[str, ...] = (OURS,)) -> Iterator[dict]:
    """Yield a row for each launch in a forward and backward of the peers `names`, in the order on the device."""
    inputs = Inputs.random(SHAPES[shape_name], dtype, device)
    for name in names:
        call, leaves = PEERS[name].build(inputs), PEERS[name].leaves(inputs)
        found = launches(lambda c=call, x=leaves: torch.autograd.grad(c(), x, inputs.gradient), device)
        for position, (kernel, ms) in enumerate(found):
            row = {"suite": "kernel", "shape": shape_name, "dtype": dtype_name(dtype), "name": name}
            yield row | {"position": position, "kernel": kernel, "ms": ms}


def launches(run: Callable[[], object], device: str, repeats: int = REPEATS) -> list[tuple[str, list[float]]]:
    """Return (kernel, [median, 20th, 80th percentile in milliseconds]) of each launch, from PyTorch's profiler.

    On a CPU, linvideo's operators take the place of kernels.

    Raises:
        ArithmeticError: Two runs didn't launch the same kernels.
    """
    cuda = device == "cuda"
    run()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        for _ in range(repeats):
            run()
        if cuda:
            torch.cuda.synchronize()
    events = [event for event in profiler.events() if _counts(event, cuda)]
    events.sort(key=lambda event: event.time_range.start)
    each, rest = divmod(len(events), repeats)
    columns = [events[position::each] for position in range(each)]
    if rest or not each or any(len({event.name for event in column}) > 1 for column in columns):
        raise ArithmeticError(f"expected {repeats} runs of the same kernels, found {len(events)} launches")
    quantiles = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    times = [torch.tensor([e.time_range.elapsed_us() for e in column], dtype=torch.float64) for column in columns]
    return [(column[0].name, (x / 1000).quantile(quantiles).tolist()) for column, x in zip(columns, times, strict=True)]


def _counts(event, cuda: bool) -> bool:
    if cuda:
        return event.device_type == DeviceType.CUDA and not event.name.startswith(("linvideo::", "ProfilerStep"))
    return event.name.startswith("linvideo::")
