"""Launching a kernel, or recording the launch so that it can be compiled ahead of time (aot.py)."""

import contextlib
import functools
import inspect
import operator
from collections.abc import Callable
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


def launch(kernel, programs: int, tile, device: torch.device, **arguments) -> None:
    """Run `programs` programs of the kernel on the device that its tensors are on; `arguments` by their names in it."""
    if _recording is not None:
        args = tuple(arguments.pop(p.name) for p in kernel.params if not p.is_constexpr)
        _recording.append(Launch(kernel, tile, args, arguments))
        return
    ordered = _in_order(kernel.fn)(arguments)  # Triton binds positions in two thirds of the time of names
    if len(arguments) > len(ordered):
        raise TypeError(f"{kernel.__name__} has no {', '.join(arguments.keys() - set(kernel.arg_names))}")
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):  # Triton launches on the current device
            kernel[(programs,)](*ordered, **_options(tile))
    else:
        kernel[(programs,)](*ordered, **_options(tile))


@functools.cache
def _in_order(function: Callable) -> operator.itemgetter:
    return operator.itemgetter(*inspect.signature(function).parameters)


@functools.cache
def _options(tile) -> dict[str, int]:
    return tile.options


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
