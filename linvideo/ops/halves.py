"""The op's two halves in torch.library: `linvideo::linear_attn_state` and `linear_attn_apply_v2`, and `_backward`s."""

import torch
from torch import Tensor

from linvideo.ops import chunked
from linvideo.ops.library import (
    applied,
    below_autograd,
    differentiate,
    differentiate_never,
    dispatch,
    fake,
    given,
    keep,
    kernels,
    like_input,
    new,
    operator,
    tensors,
    uses_kernels,
    without_autocast,
)
from linvideo.ops.over_heads import SUMMED, over_heads
from linvideo.ops.tangent import apply_tangent_op, state_tangent_op
from linvideo.ops.unfused import mix_rows, rotate_rows


@operator("linear_attn_state")
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
    """Return S and z and, if `save_rotated`, the rotated k for the backward."""
    if not uses_kernels(k):
        with without_autocast(k):
            return *chunked.state(k, v, weight, key_mask, cu_seqlens, feature_map), k.new_empty(0)
    rope = None if cos is None else (cos, sin)
    options = {"key_mask": key_mask, "cu_seqlens": cu_seqlens, "feature_map": feature_map, "precision": precision}
    return tensors(k, *kernels(k).state(k, v, weight, rope, **options, training=save_rotated))


@operator("linear_attn_state_backward")
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
    """Return dk, dv and dweight. k is the k that the forward has rotated."""
    options = {"key_mask": key_mask, "cu_seqlens": cu_seqlens, "state": state, "z": z, "feature_map": feature_map}
    if not uses_kernels(k):
        with without_autocast(k):
            grads = chunked.state_backward(dstate, dz, k, v, weight, **options)
    else:
        rope = None if cos is None else (cos, sin)
        grads = kernels(k).state_backward(dstate, dz, k, v, weight, rope, **options, precision=precision)
    return tensors(k, *grads[:2], like_input(grads[2], weight))


@operator("linear_attn_apply_v2")
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
    return_normalizer: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return o, den if `return_normalizer`, and the rotated q for the backward if `save_rotated`."""
    options = {"cu_seqlens": cu_seqlens, "feature_map": feature_map, "scale": scale, "normalize": normalize, "eps": eps}
    if not uses_kernels(q):
        with without_autocast(q):
            o, den = chunked.apply(q, state, z, weight, **options, return_normalizer=return_normalizer)
        return o, *tensors(state, den), *tensors(q, None)
    rope = None if cos is None else (cos, sin)
    options |= {"softmax_out": softmax_out, "r": r, "precision": precision, "training": save_rotated}
    o, den, rotated, *_ = kernels(q).apply(
        q, state, z, weight, rope, **options, return_normalizer=return_normalizer
    )  # fmt: skip
    return o, *tensors(state, den), *tensors(q, rotated)


@operator("linear_attn_apply_v2_backward")
def apply_backward_op(
    do: Tensor,
    den_grad: Tensor | None,
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
    """Return dq, dstate, dz, dweight, dsoftmax_out and dr. q is the q that the forward has rotated."""
    options = {"cu_seqlens": cu_seqlens, "feature_map": feature_map, "scale": scale, "normalize": normalize, "eps": eps}
    if not uses_kernels(q):
        with without_autocast(q):
            grads = *chunked.apply_backward(do, q, state, z, weight, **options, den_grad=den_grad), None, None
    else:
        rope = None if cos is None else (cos, sin)
        options |= {"softmax_out": softmax_out, "r": r, "precision": precision}
        prepared = kernels(q).prepare(state.contiguous(), z.contiguous(), q.dtype, feature_map, normalize)
        grads = kernels(q).apply_backward(do, q, z, weight, rope, prepared=prepared, **options, den_grad=den_grad)
    return tensors(q, *grads[:3], like_input(grads[3], weight), grads[4], like_input(grads[5], r))


@fake(state_op)
def _(k, v, weight, cos, sin, key_mask, cu_seqlens, feature_map, precision, save_rotated):
    return *chunked.empty_state(k, cu_seqlens, feature_map), k.new_empty(k.shape if save_rotated else 0)


@fake(state_backward_op)
def _(dstate, dz, k, v, weight, cos, sin, key_mask, cu_seqlens, state, z, feature_map, precision):
    return k.new_empty(k.shape), v.new_empty(v.shape), new(k, weight)


@fake(apply_op)
def _(q, state, z, weight, cos, sin, softmax_out, r, cu_seqlens, *settings):
    save_rotated, return_normalizer = settings[-2:]
    batch, length, heads, _ = q.shape
    den = state.new_empty((batch, heads, length) if return_normalizer else 0)
    return q.new_empty(q.shape), den, q.new_empty(q.shape if save_rotated else 0)


@fake(apply_backward_op)
def _(do, den_grad, q, state, z, weight, cos, sin, softmax_out, r, cu_seqlens, *settings):
    return q.new_empty(q.shape), new(q, state), new(q, z), new(q, weight), new(q, softmax_out), new(q, r)


STATE_HEADS = (2, 2, 0, None, None, None, None)
APPLY_HEADS = (2, 1, 1, 0, None, None, 2, SUMMED, None)


@over_heads(STATE_HEADS, (1, 1, 2))
class _State(torch.autograd.Function):
    @staticmethod
    def forward(*inputs):
        return below_autograd(state_op, *inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        k, *others = inputs[:7]
        state, z, rotated = output
        save_rotated = inputs[-1]
        saved = rotated if save_rotated else k, *others, state, z
        keep(ctx, *saved)
        ctx.settings = inputs[7:-1]

    @staticmethod
    def backward(ctx, dstate, dz, _drotated):
        if dstate is None and dz is None:
            return (None,) * 10
        saved = ctx.saved_tensors  # read only once: under activation checkpointing a second read raises
        state, z = saved[-2:]
        dstate = torch.zeros_like(state) if dstate is None else dstate
        dz = torch.zeros_like(z) if dz is None else dz
        dk, dv, dweight = dispatch(state_backward_op, dstate, dz, *saved, *ctx.settings)
        return dk, dv, given(dweight, saved[2]), *(None,) * 7

    @staticmethod
    def jvp(ctx, dk, dv, dweight, *_):
        k, v, weight, _, _, key_mask, cu_seqlens, _, _ = ctx.saved_tensors
        rows = k, v, weight, dk, dv, dweight
        return *dispatch(state_tangent_op, *rows, key_mask, cu_seqlens, ctx.settings[0]), k.new_zeros(0)


@over_heads(APPLY_HEADS, (2, 1, 2))
class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(*inputs):
        return below_autograd(apply_op, *inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, *others = inputs[:9]
        *ctx.settings, save_rotated, ctx.return_normalizer = inputs[9:]
        saved = output[2] if save_rotated else q, *others
        keep(ctx, *saved)

    @staticmethod
    def backward(ctx, do, den_grad, _drotated):
        if not ctx.return_normalizer:
            den_grad = None
        if do is None and den_grad is None:
            return (None,) * 16
        saved = ctx.saved_tensors
        do = torch.zeros_like(saved[0]) if do is None else do
        dq, dstate, dz, dweight, dsoftmax, dr = dispatch(apply_backward_op, do, den_grad, *saved, *ctx.settings)
        mixed = given(dsoftmax, saved[6]), given(dr, saved[7])
        return dq, dstate, dz, given(dweight, saved[3]), None, None, *mixed, *(None,) * 8

    @staticmethod
    def jvp(ctx, dq, dstate, dz, dweight, *_):
        q, state, z, weight, *_, cu_seqlens = ctx.saved_tensors
        rows = q, state, z, weight, dq, dstate, dz, dweight
        return *dispatch(apply_tangent_op, *rows, cu_seqlens, *ctx.settings[:4], ctx.return_normalizer), q.new_zeros(0)


def _unfused_state(k, v, weight, cos, sin, *others):
    (k,) = rotate_rows(cos, sin, k)
    return _state(k, v, weight, None, None, *others[:-1], False)


def _unfused_apply(q, state, z, weight, cos, sin, softmax_out, r, *others):
    (q,) = rotate_rows(cos, sin, q)
    nothing_fused = (None,) * 4
    *others, _, return_normalizer = others
    out, *rest = _apply(q, state, z, weight, *nothing_fused, *others, False, return_normalizer)
    return mix_rows(out, softmax_out, r), *rest


_state, _apply = applied(_State), applied(_Apply)
differentiate(state_op, _state, _unfused_state)
differentiate(apply_op, _apply, _unfused_apply)
differentiate_never(state_backward_op, (1, 1, *STATE_HEADS, 1, 1), (2, 2, 0))
differentiate_never(apply_backward_op, (2, 1, *APPLY_HEADS), (2, 1, 1, 0, 2, None))
