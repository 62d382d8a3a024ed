"""Attention modules with weights. They import only torch and linvideo.ops."""

from linvideo.nn.linear_attention import FEATURE_MAPS, LinearAttentionBranch
from linvideo.nn.window_attention import Window, WindowAttentionBranch

__all__ = ["FEATURE_MAPS", "LinearAttentionBranch", "Window", "WindowAttentionBranch"]
