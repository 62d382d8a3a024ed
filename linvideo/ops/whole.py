"""`linear_attn` in torch.library: `linvideo::linear_attn_v2` and its `_backward`, both halves of halves.py in one.

One operator costs the host half as much as two. Its backward also reuses the state as the forward prepared it. The
halves have to prepare the state again, because their state may be a sum of several.
"""

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
    new,
    operator,
    tensors,
    uses_kernels,
    without_autocast,
)
from linvideo.ops.over_heads import SUMMED, over_heads
from linvideo.ops.reference import sum_dtype
from linvideo.ops.tangent import apply_tangent_op, state_tangent_op
from linvideo.ops.unfused import mix_rows, rotate_rows


@operator("linear_attn_v2")
def forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    softmax_out: Tensor | None,
    r: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    feature_map: str,
    scale: float,
    normalize: bool,
    eps: float,
    precision: str,
    training: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Return o and, in training, a list of what the backward reads.

    The list holds S and z; from the kernels also T and its statistics (prepare.py) and, with rope, the rotated q and k.
    """
    of_keys = {"key_mask": key_mask, "cu_seqlens": cu_seqlens_k, "feature_map": feature_map}
    of_queries = {"cu_seqlens": cu_seqlens_q, "feature_map": feature_map}
    of_queries |= {"scale": scale, "normalize": normalize, "eps": eps}
    if not uses_kernels(q):
        with without_autocast(q):
            sums = chunked.state(k, v, k_weight, **of_keys)
            o, _ = chunked.apply(q, *sums, q_weight, **of_queries)
        return o, list(sums) if training else []
    rope, run, common = None if cos is None else (cos, sin), kernels(q), {"precision": precision, "training": training}
    state, z, rotated_k = run.state(k, v, k_weight, rope, **of_keys, **common)
    o, _, rotated_q, *prepared = run.apply(
        q, state, z, q_weight, rope, softmax_out=softmax_out, r=r, **of_queries, **common
    )  # fmt: skip
    if not training:
        return o, []
    return o, [state, z, *prepared, *([] if rope is None else [rotated_q, rotated_k])]


@operator("linear_attn_v2_backward")
def backward_op(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    softmax_out: Tensor | None,
    r: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    state: Tensor,
    z: Tensor,
    prepared: Tensor | None,
    stats: Tensor | None,
    feature_map: str,
    scale: float,
    normalize: bool,
    eps: float,
    precision: str,
    keys: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return dq, dk, dv, dq_weight, dk_weight, dsoftmax_out and dr, dq_weight and dk_weight in the sums' dtype.

    Args:
        q, k: Queries and keys as the forward has rotated them.
        state, z, prepared, stats: The rest of the forward's list.
        keys: Whether to compute dk, dv and dk_weight; if not, they are empty.
    """
    dk = dv = dk_weight = dsoftmax = dr = None
    of_keys = {"key_mask": key_mask, "cu_seqlens": cu_seqlens_k, "feature_map": feature_map}
    of_queries = {"cu_seqlens": cu_seqlens_q, "feature_map": feature_map}
    of_queries |= {"scale": scale, "normalize": normalize, "eps": eps}
    if not uses_kernels(q):
        with without_autocast(q):
            dq, dstate, dz, dq_weight = chunked.apply_backward(do, q, state, z, q_weight, **of_queries)
            if keys:
                dk, dv, dk_weight = chunked.state_backward(dstate, dz, k, v, k_weight, state=state, z=z, **of_keys)
        return tensors(q, dq, dk, dv, dq_weight, dk_weight, None, None)
    rope, run = None if cos is None else (cos, sin), kernels(q)
    of_queries |= {"softmax_out": softmax_out, "r": r, "prepared": (prepared, stats), "precision": precision}
    dq, dstate, dz, dq_weight, dsoftmax, dr = run.apply_backward(do, q, z, q_weight, rope, **of_queries)
    if keys:
        of_keys |= {"state": state, "z": z, "precision": precision}
        dk, dv, dk_weight = run.state_backward(dstate, dz, k, v, k_weight, rope, **of_keys)
    dr = None if r is None else dr.to(r.dtype).view(r.shape)
    return tensors(q, dq, dk, dv, dq_weight, dk_weight, dsoftmax, dr)


@fake(forward_op)
def _(q, k, v, q_weight, k_weight, cos, sin, softmax_out, r, key_mask, cu_seqlens_q, cu_seqlens_k, *settings):
    o, feature_map, training = q.new_empty(q.shape), settings[0], settings[-1]
    if not training:
        return o, []
    kept = [*chunked.empty_state(k, cu_seqlens_k, feature_map)]
    if uses_kernels(q):
        sequences, heads, _, dim = kept[0].shape
        prepared, stats = kernels(q).prepared_shapes(sequences, heads, int(dim), feature_map)
        kept += [q.new_empty(prepared), q.new_empty(stats, dtype=torch.float32)]
        kept += [] if cos is None else [q.new_empty(q.shape), k.new_empty(k.shape)]
    return o, kept


@fake(backward_op)
def _(do, q, k, v, q_weight, k_weight, cos, sin, softmax_out, r, *inputs):
    def weight_grad(x: Tensor, weight: Tensor | None) -> Tensor:
        heads, dim = x.shape[2:]
        return q.new_empty(0) if weight is None else x.new_empty((heads, dim, dim), dtype=sum_dtype(x))

    keys = inputs[-1]
    of_keys = [q.new_empty(0) for _ in range(3)]
    if keys:
        of_keys = k.new_empty(k.shape), v.new_empty(v.shape), weight_grad(k, k_weight)
    dk, dv, dk_weight = of_keys
    return q.new_empty(q.shape), dk, dv, weight_grad(q, q_weight), dk_weight, new(q, softmax_out), new(q, r)


HEADS = (2, 2, 2, 0, 0, None, None, 2, SUMMED, None, None, None)
KEPT_HEADS = (1, 1, 1, 1, 2, 2)


@over_heads(HEADS, (2, *KEPT_HEADS))
class _LinearAttn(torch.autograd.Function):
    @staticmethod
    def forward(*inputs):
        o, kept = below_autograd(forward_op, *inputs[:-1], True)
        return o, *kept

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, *others = inputs[:12]
        state, z, *of_kernels = output[1:]
        prepared, stats, *rotated = of_kernels or (None, None)
        saved = *(rotated or (q, k)), *others, state, z, prepared, stats
        keep(ctx, *saved)
        ctx.settings = inputs[12:-1]

    @staticmethod
    def backward(ctx, do, *_):
        if do is None:
            return (None,) * 18
        saved = ctx.saved_tensors  # read only once: under activation checkpointing a second read raises
        keys = any(ctx.needs_input_grad[i] for i in (1, 2, 4))
        dq, dk, dv, *dweights, dsoftmax, dr = dispatch(backward_op, do, *saved, *ctx.settings, keys)
        weights = [
            grad.to(weight.dtype) if needed else None
            for grad, weight, needed in zip(dweights, saved[3:5], ctx.needs_input_grad[3:5], strict=True)
        ]
        of_keys = (dk, dv) if keys else (None, None)
        return dq, *of_keys, *weights, None, None, given(dsoftmax, saved[7]), given(dr, saved[8]), *(None,) * 9

    @staticmethod
    def jvp(ctx, dq, dk, dv, dq_weight, dk_weight, *_):
        q, k, v, q_weight, k_weight, *_, key_mask, cu_seqlens_q, cu_seqlens_k, state, z, prepared, stats = (
            ctx.saved_tensors
        )
        feature_map, *scaling, _ = ctx.settings
        keys = k, v, k_weight, dk, dv, dk_weight
        dstate, dz = dispatch(state_tangent_op, *keys, key_mask, cu_seqlens_k, feature_map)
        queries = q, state, z, q_weight, dq, dstate, dz, dq_weight
        do, _ = dispatch(apply_tangent_op, *queries, cu_seqlens_q, feature_map, *scaling, False)
        return do, dstate, dz, *(torch.zeros_like(x) for x in (prepared, stats) if x is not None)


def _with_gradient(*inputs) -> tuple[Tensor, list[Tensor]]:
    return _linear_attn(*inputs)[0], []  # autograd keeps what the backward reads


def _transformed(q, k, v, q_weight, k_weight, cos, sin, softmax_out, r, *others) -> tuple[Tensor, list[Tensor]]:
    q, k = rotate_rows(cos, sin, q, k)
    nothing_fused = (None,) * 4
    out, _ = _with_gradient(q, k, v, q_weight, k_weight, *nothing_fused, *others)
    return mix_rows(out, softmax_out, r), []


_linear_attn = applied(_LinearAttn)
differentiate(forward_op, _with_gradient, _transformed)
differentiate_never(backward_op, (2, *HEADS, *KEPT_HEADS[:4]), (2, 2, 2, 0, 0, 2, None))
