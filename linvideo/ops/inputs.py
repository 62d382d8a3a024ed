"""What every op does with its inputs first: torch.autocast, and the rotary embedding where no kernel rotates."""

import sys

import torch
from torch import Tensor

from linvideo.ops import checks
from linvideo.ops.library import register, uses_kernels
from linvideo.ops.unfused import rotate_rows


def is_dtensor(x: Tensor) -> bool:
    tensor = sys.modules.get("torch.distributed.tensor")
    return tensor is not None and isinstance(x, tensor.DTensor)


def autocast(*rows: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the rows in torch.autocast's dtype if autocast is on; other dtypes are left for the checks to refuse.

    This is also where calls outside of torch.compile see to it that the operators are registered with what PyTorch has
    loaded.
    """
    if not torch.compiler.is_compiling():
        register()
    kind = rows[0].device.type
    # torch.amp.is_autocast_available would cover meta too, but Dynamo in PyTorch 2.11 cannot trace it.
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return rows
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x.to(dtype) if x is not None and x.dtype in checks.DTYPES else x for x in rows)


def split_rope(rope, *rows: Tensor) -> tuple[tuple[Tensor, ...], Tensor | None, Tensor | None]:
    """Return the rows and the tables for a kernel to rotate; without kernels, the rotated rows and no tables."""
    if rope is None:
        return rows, None, None
    cos, sin = rope[0].detach(), rope[1].detach()
    if uses_kernels(rows[0]):
        return rows, cos, sin
    return rotate_rows(cos, sin, *rows), None, None
