"""The functions that the ops call: the state of the keys, the output of the queries, and their backwards.

    function        kernels                                                         results
    state           accumulate_state, reduce_state                                  S, z
    apply           prepare_state, apply_state                                      o
    apply_backward  map_grad, project_grad                                          dq, dW; a and delta of each row
                    accumulate_state, reduce_state [, mix_grad]                     dS, dz [, d softmax_out, dr]
    part_backward   the same, if o is a part of a sum with another normaliser
    state_backward  prepare_state, apply_state                                      dv
                    map_grad, project_grad                                          dk, dW

All take rows [B, N, H, D]. S [B, Hk, F, D] and z [B, Hk, F] are plain fp32 sums, so the states of parts of the keys add
up. The weight may have any dtype.

With a rotary embedding, rotate_rows first rotates the keys and, in training, the queries. In training the forward
functions return the rotated rows, and the backward functions take these instead of q and k. Without training,
apply_state rotates the queries' tiles as it loads them. In training `apply` also returns the prepared state for its
backward.
"""

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
    grad, stats = prepare(state, z, k.dtype, feature_map, grads=(dstate.contiguous(), dz.contiguous()))
    dv = apply_rows(side, grad, stats, normalize=False)
    dk, dweight = row_gradient(side, aligned(v), grad, stats, keys=True, normalize=False, rope=rope)
    return dk, dv, dweight


def apply(
    q, state, z, weight, rope, softmax_out, r, cu_seqlens,
    feature_map: str, scale: float, normalize: bool, eps: float, precision: str, training: bool,
    return_normalizer: bool = False,
):  # fmt: skip
    """Return o, den [B, H, N] in fp32 (None without return_normalizer) and, in training, what the backward reads.

    That is the rotated q (None without rope), T and its statistics; they are three Nones without training.
    """
    side = Side.of(q, weight, feature_map, precision, rope, None, cu_seqlens)
    rotate = training and rope is not None
    side = rotated(side) if rotate else side
    prepared, stats = prepare(state.contiguous(), z.contiguous(), q.dtype, feature_map, normalize)
    den = side.new_numbers() if return_normalizer else None
    mix = {"softmax_out": softmax_out, "r": r}
    o = apply_rows(side, prepared, stats, normalize=normalize, eps=eps, scale=scale, den=den, **mix)
    return (o, den, side.u if rotate else None, prepared, stats) if training else (o, den, None, None, None)


def apply_backward(
    do, q, z, weight, rope, softmax_out, r, cu_seqlens, prepared,
    feature_map: str, scale: float, normalize: bool, eps: float, precision: str, den_grad=None,
):  # fmt: skip
    """Return dq, dstate, dz, dweight, dsoftmax_out and dr; the last three are None without a weight or a mixture.

    q is the q that `apply` has rotated, prepared is (T, statistics) from `apply` or `prepare`, and den_grad [B, H, N]
    is the gradient of den.
    """
    prepared, stats = prepared
    do, z = aligned(do), z.contiguous()
    side = Side.of(q, weight, feature_map, precision, None, None, cu_seqlens)
    factors = side.new_numbers(2) if normalize or r is not None else None
    den_grad = None if den_grad is None else den_grad.contiguous()
    settings = {"normalize": normalize, "rope": rope, "scale": scale, "eps": eps, "r": r}
    dq, dweight = row_gradient(
        side, do, prepared, stats, keys=False, factors=factors, den_grad=den_grad, **settings
    )  # fmt: skip
    backward = {"factors": factors, "z": z, "stats": stats} if normalize else {"scale": scale}
    dstate, dz = accumulate(side, do, key_heads=prepared.shape[1], backward=True, r=r, **backward)
    mixed = (None, None) if r is None else mix_gradient(side, do, softmax_out, r, stats, factors)
    return dq, dstate, dz, dweight, *mixed


def part_backward(do, dot, a, q, state, z, weight, feature_map: str, precision: str):
    """Return dq, dstate, dz, dweight and the gradients [B, H, N] of log G, if o is one part of a sum (row_gradient.py).

    Args:
        do: Gradient of the whole sum [B, N, H, D].
        dot: do.o [B, H, N] in fp32 with the whole sum o.
        a: G / total [B, H, N] in fp32.
        q: Rotated queries.
        state, z: State of the keys, as in `apply`.
    """
    do, z = aligned(do), z.contiguous()
    side = Side.of(q, weight, feature_map, precision)
    prepared, stats = prepare(state.contiguous(), z, q.dtype, feature_map)
    factors = side.new_numbers(3)
    factors[0] = a
    settings = {"keys": False, "normalize": True, "factors": factors, "dot": dot.contiguous()}
    dq, dweight = row_gradient(side, do, prepared, stats, **settings)
    backward = {"backward": True, "factors": factors, "z": z, "stats": stats}
    dstate, dz = accumulate(side, do, key_heads=prepared.shape[1], **backward)
    return dq, dstate, dz, dweight, factors[2]


def rotate(u, cos, sin):
    """Return rows [B, N, H, D] rotated by the tables cos, sin [N, D/2]."""
    return rotated(Side.of(u, None, "identity", "ieee", (cos, sin))).u


def prepared_shapes(sequences: int, key_heads: int, head_dim: int, feature_map: str):
    """Return the shapes of T and of its statistics, which `apply` returns in training."""
    return configs.prepared_shapes(sequences, key_heads, head_dim, configs.signs(feature_map))
