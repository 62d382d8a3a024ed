"""Launching a kernel, or recording the launch so that it can be compiled ahead of time (aot.py)."""

import contextlib
import functools
import inspect
import operator
from collections.abc import Callable
from typing import NamedTuple

import torch
from triton.compiler import CompiledKernel

from linvideo_kernels.linear_attn import configs

# Run-time sizes: a new value of one of these does not compile another kernel.
SIZES = ["SEQUENCES", "HEADS", "N", "splits", "rows", "factors_plane"]


class Target(NamedTuple):
    capability: int  # 90 for sm_90, 942 for AMD's gfx942 (configs.AMD), 0 for Triton's interpreter
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
    """Run `programs` programs of the kernel on `device`, where its tensors are; `arguments` are its parameters.

    No programs are no work: an input without rows.
    """
    if not programs:
        return
    if _recording is not None:
        args = tuple(arguments.pop(p.name) for p in kernel.params if not p.is_constexpr)
        _recording.append(Launch(kernel, tile, args, arguments))
        return
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):  # Triton launches on the current device
            _run(kernel, programs, tile, device, arguments)
    else:
        _run(kernel, programs, tile, device, arguments)


_compiled: dict[tuple, CompiledKernel] = {}


def _run(kernel, programs: int, tile, device: torch.device, arguments: dict) -> None:
    """Launch through Triton the first time, and launch the compiled kernel directly from then on.

    Finding the compiled kernel again is most of the cost of a launch through Triton. What Triton compiles depends on
    the tensors' dtypes, on whether their addresses are multiples of 16, on whether they are larger than 2 GB (on AMD),
    and on the values of the other arguments; the key holds all of these.
    """
    ordered, plain, pointers = (get(arguments) for get in _getters(kernel.fn))
    if len(arguments) > len(ordered):
        raise TypeError(f"{kernel.fn.__name__} has no {', '.join(arguments.keys() - set(kernel.arg_names))}")
    key = kernel.fn, device, tile, plain, *[_pointer(x) for x in pointers]
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[programs, 1, 1](*ordered)
        return
    compiled = kernel[(programs,)](*ordered, **tile.options)
    if isinstance(compiled, CompiledKernel):  # the interpreter has none
        if len(_compiled) >= 1024:  # e.g. sequence lengths that never repeat
            _compiled.clear()
        _compiled[key] = compiled


def _pointer(x) -> tuple | None:
    if x is None:
        return None
    if isinstance(x, torch.Tensor):
        large = torch.version.hip is not None and x.untyped_storage().nbytes() >= 2**31
        return x.dtype, x.data_ptr() % 16, large  # on AMD, Triton uses 32-bit offsets up to 2 GB
    return x.base.dtype, *x.block_shape  # a TMA descriptor, whose sizes and strides are run-time values


@functools.cache
def _getters(function: Callable) -> tuple[operator.itemgetter, ...]:
    """Return getters of all arguments in the kernel's order, of the arguments that are no pointers, and of pointers."""
    names = list(inspect.signature(function).parameters)
    pointers = [name for name in names if name.endswith("_ptr")]
    return tuple(operator.itemgetter(*some) for some in (names, [n for n in names if n not in pointers], pointers))


def target_of(x: torch.Tensor) -> Target:
    if _recording is not None:
        return _recording_target
    return _cuda_target(x.device.index) if x.is_cuda else INTERPRETER


@functools.cache
def _cuda_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        found = properties.gcnArchName.split(":")[0]  # gfx942:sramecc+:xnack-
        capability = {configs.arch(known): known for known in configs.AMD}.get(found)
    else:
        found, capability = properties.name, 10 * properties.major + properties.minor
    if capability is None or capability < 80:
        supported = ", ".join(configs.arch(known) for known in configs.AMD)
        raise RuntimeError(
            f"expected an NVIDIA GPU of compute capability 8.0 or newer, or an AMD GPU of {supported}, got {found}"
        )
    return Target(capability, properties.multi_processor_count)


@contextlib.contextmanager
def recording(target: Target):
    """Context in which launches are appended to the yielded list instead of run; the tensors may be on meta."""
    global _recording, _recording_target
    _recording, _recording_target = [], target
    try:
        yield _recording
    finally:
        _recording, _recording_target = None, INTERPRETER
