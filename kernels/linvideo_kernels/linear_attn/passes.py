"""The four functions that the op calls: the state of the keys, the output of the queries, and their backwards.

    function        kernels                                                         results
    state           accumulate_state, reduce_state                                  S, z
    apply           prepare_state, apply_state                                      o
    apply_backward  map_grad, project_grad                                          dq, dW; a and delta of each row
                    accumulate_state, reduce_state [, mix_grad]                     dS, dz [, d softmax_out, dr]
    state_backward  prepare_state, apply_state                                      dv
                    map_grad, project_grad                                          dk, dW

All take rows [B, N, H, D]. S [B, Hk, F, D] and z [B, Hk, F] are plain fp32 sums, so the states of parts of the keys add
up. The weight may have any dtype, or may have been prepared by `operand`.

With a rotary embedding, rotate_rows first rotates the keys and, in training, the queries. In training the forward
functions return the rotated rows, and the backward functions take these instead of q and k. Without training,
apply_state rotates the queries' tiles as it loads them. In training `apply` also returns the prepared state for its
backward.
"""

import torch

from linvideo_kernels.linear_attn import configs
from linvideo_kernels.linear_attn.accumulate import accumulate
from linvideo_kernels.linear_attn.apply import apply as apply_rows
from linvideo_kernels.linear_attn.mix import mix_gradient
from linvideo_kernels.linear_attn.prepare import prepare
from linvideo_kernels.linear_attn.rope import rotated
from linvideo_kernels.linear_attn.row_gradient import row_gradient
from linvideo_kernels.linear_attn.side import Side, aligned


def state(k, v, weight, rope, key_mask, cu_seqlens, feature_map: str, precision: str, training: bool):
    """Return S, z and, in training, the rotated k (None without rope)."""
    side = Side.of(k, weight, feature_map, precision, rope, key_mask, cu_seqlens)
    side = side if rope is None else rotated(side)
    return *accumulate(side, aligned(v), key_heads=k.shape[2]), side.u if training and rope is not None else None


def state_backward(
    dstate, dz, k, v, weight, rope, key_mask, cu_seqlens, state, z, feature_map: str, precision: str
):  # fmt: skip
    """Return dk, dv and dweight. k is the k that `state` has rotated."""
    side = Side.of(k, weight, feature_map, precision, None, key_mask, cu_seqlens)
    grad, stats = prepare(state, z, k.dtype, feature_map != "identity", (dstate.contiguous(), dz.contiguous()))
    dv = apply_rows(side, grad, stats, normalize=False)
    dk, dweight = row_gradient(side, aligned(v), grad, stats, keys=True, normalize=False, rope=rope)
    return dk, dv, dweight


def apply(
    q, state, z, weight, rope, softmax_out, r, cu_seqlens,
    feature_map: str, scale: float, normalize: bool, eps: float, precision: str, training: bool,
):  # fmt: skip
    """Return o and, in training, the rotated q (None without rope), T and its statistics; otherwise three Nones."""
    side = Side.of(q, weight, feature_map, precision, rope, None, cu_seqlens)
    rotate = training and rope is not None
    side = rotated(side) if rotate else side
    prepared, stats = prepare(state.contiguous(), z.contiguous(), q.dtype, normalize)
    o = apply_rows(side, prepared, stats, normalize=normalize, eps=eps, scale=scale, softmax_out=softmax_out, r=r)
    return (o, side.u if rotate else None, prepared, stats) if training else (o, None, None, None)


def apply_backward(
    do, q, z, weight, rope, softmax_out, r, cu_seqlens, prepared,
    feature_map: str, scale: float, normalize: bool, eps: float, precision: str,
):  # fmt: skip
    """Return dq, dstate, dz, dweight, dsoftmax_out and dr; the last three are None without a weight or a mixture.

    q is the q that `apply` has rotated, and prepared is (T, statistics) from `apply` or `prepare`.
    """
    prepared, stats = prepared
    do, z = aligned(do), z.contiguous()
    side = Side.of(q, weight, feature_map, precision, None, None, cu_seqlens)
    factors = None
    if normalize or r is not None:
        batch, length, heads, _ = q.shape
        factors = torch.empty((2, batch, heads, length), dtype=torch.float32, device=q.device)
    settings = {"normalize": normalize, "rope": rope, "scale": scale, "eps": eps, "r": r, "factors": factors}
    dq, dweight = row_gradient(side, do, prepared, stats, keys=False, **settings)
    backward = {"factors": factors, "z": z, "stats": stats} if normalize else {"scale": scale}
    dstate, dz = accumulate(side, do, key_heads=prepared.shape[1], backward=True, r=r, **backward)
    mixed = (None, None) if r is None else mix_gradient(side, do, softmax_out, r, stats, factors)
    return dq, dstate, dz, dweight, *mixed


def prepared_shapes(sequences: int, key_heads: int, head_dim: int, feature_map: str):
    """Return the shapes of T and of its statistics, which `apply` returns in training."""
    return configs.prepared_shapes(sequences, key_heads, head_dim, configs.signs(feature_map))
