"""The op in torch.library: four custom operators, opaque to torch.compile, and how autograd joins them.

`linvideo::linear_attn_state` and `linvideo::linear_attn_apply`, each with its `_backward`. CUDA tensors run the Triton
kernels of `linvideo_kernels`, never anything else; CPU tensors run `chunked`, or with TRITON_INTERPRET=1 in the
environment the same kernels in Triton's interpreter. An operator cannot return None: an empty tensor stands for it.
"""

import os

import linvideo_kernels
import torch
from torch import Tensor

from linvideo.ops import chunked
from linvideo.ops.reference import WEIGHTED_MAPS


def uses_kernels(x: Tensor) -> bool:
    return x.device.type == "cuda" or (x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")


@torch.library.custom_op("linvideo::linear_attn_state", mutates_args=())
def state_op(
    k: Tensor,
    v: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    feature_map: str,
    precision: str,
    save_rotated: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """S, z in fp32, and k as turned by the rotary embedding if the backward will want it."""
    with torch.autocast(k.device.type, enabled=False):  # k's dtype is decided; sums stay in fp32
        if not uses_kernels(k):
            return *chunked.state(k, v, weight, key_mask, cu_seqlens, feature_map), k.new_empty(0)
        rope = None if cos is None else (cos, sin)
        return _tensors(
            k, *_kernels(k).state(k, v, weight, rope, key_mask, cu_seqlens, feature_map, precision, save_rotated)
        )


@torch.library.custom_op("linvideo::linear_attn_state_backward", mutates_args=())
def state_backward_op(
    dstate: Tensor,
    dz: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    state: Tensor,
    z: Tensor,
    feature_map: str,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """dk, dv, dweight; k as turned by the rotary embedding."""
    with torch.autocast(k.device.type, enabled=False):
        if not uses_kernels(k):
            grads = chunked.state_backward(dstate, dz, k, v, weight, key_mask, cu_seqlens, feature_map)
        else:
            rope = None if cos is None else (cos, sin)
            grads = _kernels(k).state_backward(
                dstate, dz, k, v, weight, rope, key_mask, cu_seqlens, state, z, feature_map, precision
            )
    return _tensors(k, *grads[:2], _like(grads[2], weight))


@torch.library.custom_op("linvideo::linear_attn_apply", mutates_args=())
def apply_op(
    q: Tensor,
    state: Tensor,
    z: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    softmax_out: Tensor | None,
    r: Tensor | None,
    cu_seqlens: Tensor | None,
    feature_map: str,
    scale: float,
    normalize: bool,
    eps: float,
    precision: str,
    save_rotated: bool,
) -> tuple[Tensor, Tensor]:
    """o, and q as turned by the rotary embedding if the backward will want it."""
    with torch.autocast(q.device.type, enabled=False):
        if not uses_kernels(q):
            o = chunked.apply(q, state, z, weight, cu_seqlens, feature_map, scale, normalize, eps)
            return o, q.new_empty(0)
        rope = None if cos is None else (cos, sin)
        outputs = _kernels(q).apply(
            q, state, z, weight, rope, softmax_out, r, cu_seqlens,
            feature_map, scale, normalize, eps, precision, save_rotated,
        )  # fmt: skip
    return _tensors(q, *outputs)


@torch.library.custom_op("linvideo::linear_attn_apply_backward", mutates_args=())
def apply_backward_op(
    do: Tensor,
    q: Tensor,
    state: Tensor,
    z: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    softmax_out: Tensor | None,
    r: Tensor | None,
    cu_seqlens: Tensor | None,
    feature_map: str,
    scale: float,
    normalize: bool,
    eps: float,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dstate, dz, dweight, dsoftmax_out, dr; q as turned by the rotary embedding."""
    with torch.autocast(q.device.type, enabled=False):
        if not uses_kernels(q):
            settings = (feature_map, scale, normalize, eps)
            grads = *chunked.apply_backward(do, q, state, z, weight, cu_seqlens, *settings), None, None
        else:
            rope = None if cos is None else (cos, sin)
            grads = _kernels(q).apply_backward(
                do, q, state, z, weight, rope, softmax_out, r, cu_seqlens, feature_map, scale, normalize, eps, precision
            )
    return _tensors(q, *grads[:3], _like(grads[3], weight), grads[4], _like(grads[5], r))


@state_op.register_fake
def _(k, v, weight, cos, sin, key_mask, cu_seqlens, feature_map, precision, save_rotated):
    batch, _, heads, dim = k.shape
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    features = 2 * dim if feature_map in WEIGHTED_MAPS else dim
    state = k.new_empty(sequences, heads, features, dim, dtype=torch.float32)
    z = k.new_empty(sequences, heads, features, dtype=torch.float32)
    return state, z, k.new_empty(k.shape if save_rotated else 0)


@state_backward_op.register_fake
def _(dstate, dz, k, v, weight, cos, sin, key_mask, cu_seqlens, state, z, feature_map, precision):
    return k.new_empty(k.shape), v.new_empty(v.shape), _new(k, weight)


@apply_op.register_fake
def _(q, state, z, weight, cos, sin, softmax_out, r, cu_seqlens, *settings):
    return q.new_empty(q.shape), q.new_empty(q.shape if settings[-1] else 0)


@apply_backward_op.register_fake
def _(do, q, state, z, weight, cos, sin, softmax_out, r, cu_seqlens, *settings):
    return q.new_empty(q.shape), _new(q, state), _new(q, z), _new(q, weight), _new(q, softmax_out), _new(q, r)


def _state_context(ctx, inputs, output) -> None:
    k, v, weight, cos, sin, key_mask, cu_seqlens, feature_map, precision, save_rotated = inputs
    state, z, rotated = output
    k = rotated if save_rotated else k
    ctx.save_for_backward(k, v, weight, cos, sin, key_mask, cu_seqlens, state, z)
    ctx.settings = feature_map, precision
    ctx.set_materialize_grads(False)


def _state_autograd(ctx, dstate, dz, _drotated):
    if dstate is None and dz is None:
        return (None,) * 10
    saved = ctx.saved_tensors  # once: under activation checkpointing a second read raises
    state, z = saved[-2:]
    dstate = torch.zeros_like(state) if dstate is None else dstate
    dz = torch.zeros_like(z) if dz is None else dz
    dk, dv, dweight = torch.ops.linvideo.linear_attn_state_backward(dstate, dz, *saved, *ctx.settings)
    return dk, dv, _given(dweight, saved[2]), *(None,) * 7


def _apply_context(ctx, inputs, output) -> None:
    q, *tensors = inputs[:9]
    *ctx.settings, save_rotated = inputs[9:]
    q = output[1] if save_rotated else q
    ctx.save_for_backward(q, *tensors)
    ctx.set_materialize_grads(False)


def _apply_autograd(ctx, do, _drotated):
    if do is None:
        return (None,) * 15
    saved = ctx.saved_tensors
    dq, dstate, dz, dweight, dsoftmax, dr = torch.ops.linvideo.linear_attn_apply_backward(do, *saved, *ctx.settings)
    mixed = _given(dsoftmax, saved[6]), _given(dr, saved[7])
    return dq, dstate, dz, _given(dweight, saved[3]), None, None, *mixed, *(None,) * 7


state_op.register_autograd(_state_autograd, setup_context=_state_context)
apply_op.register_autograd(_apply_autograd, setup_context=_apply_context)


def _tensors(like: Tensor, *outputs: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if output is None else output for output in outputs)


def _given(grad: Tensor, x: Tensor | None) -> Tensor | None:
    return None if x is None else grad


def _like(grad: Tensor | None, x: Tensor | None) -> Tensor | None:
    return None if x is None else grad.to(x.dtype).view(x.shape)


def _new(like: Tensor, x: Tensor | None) -> Tensor:
    return like.new_empty(0) if x is None else x.new_empty(x.shape)


def _kernels(x: Tensor):
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 and not linvideo_kernels.interpreter_bf16_ok:
        raise ValueError("expected float32 or float16 under TRITON_INTERPRET=1, whose bfloat16 is wrong, got bfloat16")
    try:
        from linvideo_kernels import linear_attn as kernels
    except ImportError as error:
        raise RuntimeError("linear_attn on CUDA tensors needs Triton: pip install triton") from error
    return kernels
