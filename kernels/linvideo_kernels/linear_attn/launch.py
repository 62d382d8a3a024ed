"""Launching a kernel, or recording the launch so that it can be compiled ahead of time (aot.py)."""

import contextlib
import functools
from typing import NamedTuple

import torch

# Run-time sizes of the kernels: another value is no other kernel.
SIZES = ["SEQUENCES", "HEADS", "N", "splits", "rows", "factors_plane"]


class Target(NamedTuple):
    capability: int  # 90 for sm_90; 0 for the interpreter
    sm_count: int


class Launch(NamedTuple):
    kernel: object
    tile: object  # configs.Tile
    args: tuple  # in the kernel's order, without the constexprs
    constexprs: dict


INTERPRETER = Target(0, 4)
_recording: list | None = None
_recording_target = INTERPRETER


def launch(kernel, programs: int, tile, *args, **constexprs) -> None:
    """Runs `programs` programs on the device of the tensor arguments."""
    if _recording is not None:
        _recording.append(Launch(kernel, tile, args, constexprs))
        return
    device = next(x.device for x in args if isinstance(x, torch.Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](*args, **constexprs, **tile.options)


def target_of(x: torch.Tensor) -> Target:
    if _recording is not None:
        return _recording_target
    return _cuda_target(x.device.index) if x.is_cuda else INTERPRETER


@functools.cache
def _cuda_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None or properties.major < 8:
        raise RuntimeError(
            f"the kernels need an NVIDIA GPU of compute capability 8.0 or newer, found {properties.name}"
        )
    return Target(10 * properties.major + properties.minor, properties.multi_processor_count)


@contextlib.contextmanager
def recording(target: Target):
    """Inside, launches on meta tensors are appended to the yielded list instead of run."""
    global _recording, _recording_target
    _recording, _recording_target = [], target
    try:
        yield _recording
    finally:
        _recording, _recording_target = None, INTERPRETER
