"""Attention modules with weights. They import only torch and linvideo.ops."""

from linvideo.nn.linear_attention import FEATURE_MAPS, LinearAttentionBranch

__all__ = ["FEATURE_MAPS", "LinearAttentionBranch"]
