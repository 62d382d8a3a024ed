"""The peers that linear_attn is timed against. Each is a function of q, k, v [B, N, H, D], built only where it runs."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from linvideo.ops.reference import linear_attn_reference

BACKENDS = {
    "softmax flash": SDPBackend.FLASH_ATTENTION,
    "softmax cudnn": SDPBackend.CUDNN_ATTENTION,
    "softmax efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def softmax(backend: SDPBackend) -> Callable:
    def run(q, k, v):
        with sdpa_kernel(backend):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    return run


def eager_linear(q_weight: torch.Tensor, k_weight: torch.Tensor) -> Callable:
    """Hedgehog linear attention in plain PyTorch operations: what a user would write."""
    return lambda q, k, v: linear_attn_reference(q, k, v, q_weight=q_weight, k_weight=k_weight)


def fla_causal() -> Callable:
    """flash-linear-attention's chunked linear attention: causal, identity feature map, no normaliser. ImportError where
    it is not installed."""
    from fla.ops.linear_attn import chunk_linear_attn

    return lambda q, k, v: chunk_linear_attn(q, k, v, normalize=False)[0]
