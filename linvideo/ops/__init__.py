"""Operators. Importing this package needs torch only; Triton is loaded when a kernel is launched."""

from linvideo.ops.library import register
from linvideo.ops.linear_attn import linear_attn, linear_attn_apply, linear_attn_state
from linvideo.ops.window_attn import window_attn

__all__ = ["linear_attn", "linear_attn_apply", "linear_attn_state", "window_attn"]

register()
