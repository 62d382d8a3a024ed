"""`linear_attn` in torch.library: `linvideo::linear_attn` and its `_backward`, both halves of library.py in one.

One operator costs the host half as much as two. Its backward also reuses the weights and the state as the forward
prepared them. The halves have to prepare the state again, because their state may be a sum of several.
"""

import torch
from torch import Tensor

from linvideo.ops import chunked
from linvideo.ops.library import (
    below_autograd,
    differentiate,
    fake,
    given,
    kernels,
    new,
    once,
    operator,
    tensors,
    uses_kernels,
)
from linvideo.ops.reference import WEIGHTED_MAPS


@operator("linear_attn")
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
        with torch.autocast(q.device.type, enabled=False):  # q's dtype is decided; sums stay in fp32
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


@operator("linear_attn_backward")
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
    kept: list[Tensor],
    feature_map: str,
    scale: float,
    normalize: bool,
    eps: float,
    precision: str,
    keys: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return dq, dk, dv, dq_weight, dk_weight, dsoftmax_out and dr; the gradients of the weights are in fp32.

    Args:
        q, k: Queries and keys as the forward has rotated them.
        kept: The rest of the forward's list.
        keys: Whether to compute dk, dv and dk_weight; if not, they are empty.
    """
    state, z, *prepared = kept
    dk = dv = dk_weight = dsoftmax = dr = None
    of_keys = {"key_mask": key_mask, "cu_seqlens": cu_seqlens_k, "feature_map": feature_map}
    of_queries = {"cu_seqlens": cu_seqlens_q, "feature_map": feature_map}
    of_queries |= {"scale": scale, "normalize": normalize, "eps": eps}
    if not uses_kernels(q):
        with torch.autocast(q.device.type, enabled=False):
            dq, dstate, dz, dq_weight = chunked.apply_backward(do, q, state, z, q_weight, **of_queries)
            if keys:
                dk, dv, dk_weight = chunked.state_backward(dstate, dz, k, v, k_weight, **of_keys)
        return tensors(q, dq, dk, dv, dq_weight, dk_weight, None, None)
    rope, run = None if cos is None else (cos, sin), kernels(q)
    of_queries |= {"softmax_out": softmax_out, "r": r, "prepared": prepared, "precision": precision}
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
    heads, dim = k.shape[2:]
    sequences = k.shape[0] if cu_seqlens_k is None else cu_seqlens_k.shape[0] - 1
    features = 2 * dim if feature_map in WEIGHTED_MAPS else dim
    kept = [k.new_empty((sequences, heads, features, *row), dtype=torch.float32) for row in ((dim,), ())]
    if uses_kernels(q):
        prepared, stats = kernels(q).prepared_shapes(sequences, heads, int(dim), feature_map)
        kept += [q.new_empty(prepared), q.new_empty(stats, dtype=torch.float32)]
        kept += [] if cos is None else [q.new_empty(q.shape), k.new_empty(k.shape)]
    return o, kept


@fake(backward_op)
def _(do, q, k, v, q_weight, k_weight, cos, sin, softmax_out, r, key_mask, cu_seqlens_q, cu_seqlens_k, kept, *settings):
    def weight_grad(x: Tensor, weight: Tensor | None) -> Tensor:
        heads, dim = x.shape[2:]
        return q.new_empty(0) if weight is None else x.new_empty((heads, dim, dim), dtype=torch.float32)

    keys = settings[-1]
    of_keys = [q.new_empty(0) for _ in range(3)]
    if keys:
        of_keys = k.new_empty(k.shape), v.new_empty(v.shape), weight_grad(k, k_weight)
    dk, dv, dk_weight = of_keys
    return q.new_empty(q.shape), dk, dv, weight_grad(q, q_weight), dk_weight, new(q, softmax_out), new(q, r)


class _LinearAttn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, q_weight, k_weight, *inputs):
        others, settings = inputs[:7], inputs[7:-1]
        weights = q_weight, k_weight
        if q_weight is not None and uses_kernels(q):
            weights = kernels(q).operand(q_weight, q), kernels(q).operand(k_weight, k)
        o, kept = below_autograd(forward_op, q, k, v, *weights, *others, *settings, True)
        q, k = kept[4:] or (q, k)
        ctx.save_for_backward(q, k, v, *weights, *others, *kept[:4])
        ctx.settings = settings
        ctx.dtypes = [None if weight is None else weight.dtype for weight in (q_weight, k_weight)]
        return o

    @staticmethod
    def backward(ctx, do):
        saved = ctx.saved_tensors  # read only once: under activation checkpointing a second read raises
        keys = any(ctx.needs_input_grad[i] for i in (1, 2, 4))
        dq, dk, dv, dq_weight, dk_weight, dsoftmax, dr = once(
            backward_op, do, *saved[:12], list(saved[12:]), *ctx.settings, keys
        )
        weights = [
            grad.to(dtype) if needed else None
            for grad, dtype, needed in zip((dq_weight, dk_weight), ctx.dtypes, ctx.needs_input_grad[3:5], strict=True)
        ]
        keys = (dk, dv) if keys else (None, None)
        mixed = given(dsoftmax, saved[7]), given(dr, saved[8])
        return dq, *keys, *weights, None, None, *mixed, *(None,) * 9


def _with_gradient(*inputs) -> tuple[Tensor, list[Tensor]]:
    return _LinearAttn.apply(*inputs), []  # autograd keeps what the backward reads


differentiate(forward_op, _with_gradient)
