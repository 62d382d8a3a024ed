"""Attention modules that own weights. Imports torch and linvideo.ops only."""

from linvideo.nn.linear_attention import FEATURE_MAPS, LinearAttentionBranch

__all__ = ["FEATURE_MAPS", "LinearAttentionBranch"]
