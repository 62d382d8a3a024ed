"""The number of operations that torch.utils.flop_counter.FlopCounterMode counts for the operators.

These are the operations of matrix products, 2 n a b for [n, a] times [a, b]. What a backward computes again counts, as
in PyTorch's formulas for scaled_dot_product_attention.
"""

import math

from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula

from linvideo.ops import halves, tangent, whole, window_library
from linvideo.ops.reference import WEIGHTED_MAPS
from linvideo.ops.window_layout import Layout


def _register(op):
    return register_flop_formula(op.overloadpacket, get_raw=True)


def _half(x, feature_map: str, products: int, weight_products: int, rows: int | None = None) -> int:
    """Count the products of rows x [B, N, H, D] with matrices of [features, D] and, if the map has them, weights."""
    weighted = feature_map in WEIGHTED_MAPS
    rows = math.prod(x.shape[:3]) if rows is None else rows
    return 2 * rows * x.shape[3] ** 2 * (products * (1 + weighted) + weight_products * weighted)


@_register(halves.state_op)
def _state(k, v, weight, cos, sin, key_mask, cu_seqlens, feature_map, *_, **__) -> int:
    return _half(k, feature_map, 1, 1)  # S; the logits


@_register(halves.state_backward_op)
def _state_backward(dstate, dz, k, v, weight, cos, sin, key_mask, cu_seqlens, state, z, feature_map, *_, **__) -> int:
    return _half(k, feature_map, 2, 3)  # dv, dphi; the logits, dk, dW


@_register(halves.apply_op)
def _apply(q, state, z, weight, cos, sin, softmax_out, r, cu_seqlens, feature_map, *_, **__) -> int:
    return _half(q, feature_map, 1, 1)  # o; the logits


@_register(halves.apply_backward_op)
def _apply_backward(do, den_grad, q, state, z, *inputs, **_) -> int:
    return _half(q, inputs[6], 2, 3)  # dS, dphi; the logits, dq, dW


@_register(whole.forward_op)
def _linear_attn(q, k, *inputs, **_) -> int:
    return sum(_half(x, inputs[10], 1, 1) for x in (q, k))


@_register(whole.backward_op)
def _linear_attn_backward(do, q, k, *inputs, **_) -> int:
    feature_map, keys = inputs[14], inputs[-1]
    return sum(_half(x, feature_map, 2, 3) for x in ((q, k) if keys else (q,)))


@_register(tangent.state_tangent_op)
def _state_tangent(k, v, weight, dk, dv, dweight, key_mask, cu_seqlens, feature_map, **_) -> int:
    return _half(k, feature_map, 2, 3)  # the two terms of dS; the logits and the two terms of their tangent


@_register(tangent.apply_tangent_op)
def _apply_tangent(q, state, z, weight, dq, dstate, dz, dweight, cu_seqlens, feature_map, *_, **__) -> int:
    return _half(q, feature_map, 3, 3)  # dphi T, phi dT, phi T; the same


@_register(window_library.forward_op)
def _window_attn(q, k, v, log_gain, q_weight, k_weight, cos, sin, key_mask, window, feature_map, *_, **__) -> int:
    return _window(q, k, Layout(*window), feature_map, softmax_products=2, products=1, weight_products=1)


@_register(window_library.backward_op)
def _window_attn_backward(do, q, k, *inputs, **_) -> int:
    layout, feature_map, rows = Layout(*inputs[9]), inputs[10], inputs[-1]
    return _window(q, k, layout, feature_map, softmax_products=5 if rows else 0, products=2, weight_products=3)


def _window(q, k, layout: Layout, feature_map: str, *, softmax_products: int, **products: int) -> int:
    batch, tokens, heads, dim = q.shape
    video, text = layout.frames * layout.frame_tokens, layout.prefix_tokens + layout.suffix_tokens
    pairs = layout.softmax_pairs * video**2 + video * text + text * (text if layout.causal else tokens)
    softmax = 2 * batch * heads * dim * round(pairs) * softmax_products
    if not layout.has_far:
        return softmax
    rows = (batch * video * x.shape[2] for x in (q, k))
    return softmax + sum(_half(x, feature_map, rows=n, **products) for x, n in zip((q, k), rows, strict=True))


# A counter copies the formulas when it is made. The one that counts this call, the first, was made before.
for mode in _get_current_dispatch_mode_stack():
    counter = getattr(mode, "counter", None)
    if isinstance(counter, FlopCounterMode):
        counter.flop_registry = flop_registry | counter.flop_registry
