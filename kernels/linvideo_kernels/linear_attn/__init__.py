"""Linear attention: the four functions that launch the kernels (passes.py). Importing this package loads Triton."""

from linvideo_kernels.linear_attn.passes import apply, apply_backward, prepared_shapes, state, state_backward
from linvideo_kernels.linear_attn.prepare import prepare
from linvideo_kernels.linear_attn.side import operand

__all__ = ["apply", "apply_backward", "operand", "prepare", "prepared_shapes", "state", "state_backward"]
