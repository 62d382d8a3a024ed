"""Placeholder that knows the CPU only; helper T's file replaces it."""

from collections.abc import Callable
from typing import NamedTuple

import torch

BACKENDS = ("cpu",)


class Backend(NamedTuple):
    name: str
    forward: Callable
    backward: Callable


def choose(backend, q, masked, training) -> Backend:
    if q.device.type != "cpu" or backend not in (None, "cpu"):
        raise ValueError(f"expected a CPU tensor and backend 'cpu', got {q.device} and {backend!r}")
    return Backend("cpu", _forward, _backward)


def _bias(mask, q):
    return None if mask is None else torch.where(mask, 0.0, -1e4).to(q.dtype)[:, None, None, :]


def _forward(q, k, v, scale, mask=None):
    rows = (x.transpose(1, 2) for x in (q, k, v))
    call = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    o, lse = call(*rows, 0.0, False, scale=scale, attn_mask=_bias(mask, q))
    return o.transpose(1, 2), lse


def _backward(do, q, k, v, o, lse, scale, mask=None):
    rows = (x.transpose(1, 2) for x in (do, q, k, v, o))
    call = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    grads = call(*rows, lse, 0.0, False, scale=scale, attn_mask=_bias(mask, q))
    return tuple(x.transpose(1, 2) for x in grads)
