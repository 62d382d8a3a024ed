"""Linear attention: the functions that launch the kernels (passes.py). Importing this package loads Triton."""

from linvideo_kernels.linear_attn.passes import (
    apply,
    apply_backward,
    part_backward,
    prepared_shapes,
    rotate,
    state,
    state_backward,
)
from linvideo_kernels.linear_attn.prepare import prepare
from linvideo_kernels.linear_attn.window import factors, merge

__all__ = [
    "apply",
    "apply_backward",
    "factors",
    "merge",
    "part_backward",
    "prepare",
    "prepared_shapes",
    "rotate",
    "state",
    "state_backward",
]
