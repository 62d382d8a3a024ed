"""The public op: bidirectional linear attention as a whole, or in two halves, one for the keys and one for queries."""

import torch
from torch import Tensor

from linvideo.ops import checks, whole
from linvideo.ops.halves import apply_op, state_op
from linvideo.ops.inputs import autocast, is_dtensor, split_rope
from linvideo.ops.library import dispatch, needs_gradient, uses_kernels
from linvideo.ops.unfused import mix_rows


def linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str = "hedgehog",
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    mix: tuple[Tensor, Tensor] | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
    fp32_precision: str = "ieee",
) -> Tensor:
    """Bidirectional linear attention, O(N) in time and memory (LinVideo, arXiv 2510.08318; Hedgehog, arXiv 2402.04347).

    o_n = phi(q_n) S / (phi(q_n) z + eps) with S = sum_m phi(k_m)^T v_m and z = sum_m phi(k_m), summed over all Nk keys.

    Args:
        q: Queries [B, Nq, H, D] in float32, float16 or bfloat16, or float64 on the CPU; D is a multiple of 8 up to
            128. B, Nq and Nk may be 0. Any strides are accepted, so a tensor of shape [B, H, N, D] can be passed as
            x.transpose(1, 2) at no cost. A copy is made only if the last stride is not 1 or if rows do not start at
            multiples of 8 elements.
        k, v: Keys and values [B, Nk, Hk, D] in q's dtype. H is a multiple of Hk, and query head h reads key head
            h // (H / Hk).
        feature_map: Name of phi:
            "hedgehog": [softmax(xW), softmax(-xW)], the map that the LinVideo paper uses.
            "hedgehog_joint": softmax([2xW, -2xW]), as in flash-linear-attention, but without the bias (initially 0)
            that its layer adds.
            "elu": elu(x) + 1. "relu": relu(x). "softmax": softmax(x) over D.
            "identity": x, for features computed beforehand; they must not be negative if the output is normalised.
            On CUDA the logits of a softmax must stay below 2^30.
        q_weight, k_weight: Weights W of the hedgehog maps, [H, D, D] for the queries and [Hk, D, D] for the keys; xW is
            [..., D] @ [D, D] in each head. Required with the hedgehog maps and refused with the others. They may have
            any of q's dtypes; they are rounded to q's, and their gradients come back in their own.
        rope: Rotary embedding as tables (cos, sin), each [N, D/2] with N = Nq = Nk. The channel pairs (2i, 2i + 1) of q
            and k are rotated in float32 before the feature map and rounded to q's dtype. The tables get no gradient.
        mix: Pair (softmax_out, r) to mix with, LinVideo's selective transfer: the result is
            r softmax_out + (1 - r) o, computed in float32. softmax_out has q's shape and dtype, r one element; both
            receive gradients. r = 1 gives exactly softmax_out and r = 0 exactly o, provided that both are finite.
        key_mask: Bool [B, Nk], False for keys to leave out. What a masked key holds does not matter, even NaN.
        cu_seqlens_q, cu_seqlens_k: Boundaries of packed sequences, int32 or int64 [sequences + 1], given together or
            not at all. As in FlashAttention, q [total, H, D] or [1, total, H, D] then holds one sequence after another,
            and sequence i of q attends to sequence i of k. key_mask becomes [1, total], and rope has one row per packed
            token. The boundaries must rise from 0 to total. On CUDA this is not checked, since reading them would wait
            for the GPU; rows that no sequence covers come back as 0 and have no part in any gradient.
        scale: Factor of phi(q); it has an effect only with normalize=False. None means 1.
        normalize: Whether to divide by phi(q) z + eps.
        eps: Number added to the denominator, which is a plain sum over Nk keys, not a mean.
        fp32_precision: Precision of products of float32 inputs on CUDA: "ieee", or "tf32x3", which forms each product
            from three TF32 tensor-core products and is not available on AMD GPUs.

    Returns:
        o [B, Nq, H, D] in q's dtype. Under torch.autocast the inputs are first cast to its dtype, as for
        scaled_dot_product_attention.

    Sums are accumulated in float32 (float64 for float64), and reruns give the same bits. The op is differentiable once,
    backward or forward, with respect to q, k, v, the weights and mix; docs/op.md lists the transforms of PyTorch under
    which it works. On CUDA nothing waits for the GPU: a CUDA graph can capture the forward, alone or with its
    backward, after the same call has been made once outside the capture to compile the kernels.

    Raises:
        ValueError: An argument does not fit this description.
        TypeError: scale or eps is a tensor that requires a gradient.
    """
    checks.check_tensors(q=q, k=k, v=v)
    checks.check_mix_pair(mix)
    q, k, v, mix = _autocast(q, k, v, mix)
    packed = cu_seqlens_q is not None and q.dim() == 3
    if packed:
        q, k, v, mix = (_unpacked(x) for x in (q, k, v, mix))
    checks.check_rows("q", q)
    checks.check_rows("k", k, q)
    checks.check_pair(q, k)
    checks.check_packed_pair(cu_seqlens_q, cu_seqlens_k)
    _check_state_arguments(k, v, feature_map, k_weight, None, key_mask, cu_seqlens_k, fp32_precision)
    scaling = {"scale": scale, "normalize": normalize, "eps": eps}
    _check_apply_arguments(q, feature_map, q_weight, rope, mix, cu_seqlens_q, fp32_precision, **scaling)
    if rope is not None and k.shape[1] != q.shape[1]:
        raise ValueError(f"expected as many keys as queries with rope, got {k.shape[1]} keys, {q.shape[1]} queries")
    if is_dtensor(q):
        common = {"feature_map": feature_map, "rope": rope, "fp32_precision": fp32_precision}
        sums = linear_attn_state(k, v, k_weight=k_weight, key_mask=key_mask, cu_seqlens_k=cu_seqlens_k, **common)
        out = linear_attn_apply(q, *sums, q_weight=q_weight, mix=mix, cu_seqlens_q=cu_seqlens_q, **scaling, **common)
        return out.squeeze(0) if packed else out
    (q, k), cos, sin = split_rope(rope, q, k)
    fused, ends = _fused(mix, q), (key_mask, _int32(cu_seqlens_q), _int32(cu_seqlens_k))
    settings = feature_map, 1.0 if scale is None else float(scale), normalize, float(eps), fp32_precision, False
    inputs = q, k, v, q_weight, k_weight, cos, sin
    out = dispatch(whole.forward_op, *inputs, *fused, *ends, *settings)[0]
    out = _mixed(out, mix, fused)
    return out.squeeze(0) if packed else out


def linear_attn_state(
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str = "hedgehog",
    k_weight: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    fp32_precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    """The keys' half of `linear_attn`: S = sum_m phi(k_m)^T v_m and z = sum_m phi(k_m).

    Both are plain sums, so the states of parts of a sequence add up to the state of the whole sequence: the ranks of a
    context-parallel group can all-reduce them, and a stream can add the keys that arrive.

    Args:
        k, v, feature_map, k_weight, key_mask, cu_seqlens_k, fp32_precision: Arguments of `linear_attn`.
        rope: Tables (cos, sin) of these keys, each [Nk, D/2].

    Returns:
        (S, z), S [B, Hk, F, D] and z [B, Hk, F], both float32 (float64 for float64 keys). F is 2D for the hedgehog maps
        and D for the others; with cu_seqlens_k, B is the number of sequences. They are differentiable once, backward or
        forward, with respect to k, v and the weight.
        linear_attn_apply(q, *linear_attn_state(k, v)) equals linear_attn(q, k, v) bit for bit.

    Raises:
        ValueError: An argument does not fit this description.
    """
    checks.check_tensors(k=k, v=v)
    k, v, _, _ = _autocast(k, v)
    if cu_seqlens_k is not None and k.dim() == 3:
        k, v = _unpacked(k), _unpacked(v)
    checks.check_rows("k", k)
    _check_state_arguments(k, v, feature_map, k_weight, rope, key_mask, cu_seqlens_k, fp32_precision)
    (k,), cos, sin = split_rope(rope, k)
    save_rotated = cos is not None and needs_gradient((k, v, k_weight))
    arguments = k_weight, cos, sin, key_mask, _int32(cu_seqlens_k), feature_map, fp32_precision, save_rotated
    return dispatch(state_op, k, v, *arguments)[:2]


def linear_attn_apply(
    q: Tensor,
    S: Tensor,
    z: Tensor,
    *,
    feature_map: str = "hedgehog",
    q_weight: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    mix: tuple[Tensor, Tensor] | None = None,
    cu_seqlens_q: Tensor | None = None,
    scale: float | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
    fp32_precision: str = "ieee",
    return_normalizer: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The queries' half of `linear_attn`: o = phi(q) S / (phi(q) z + eps), optionally mixed with softmax attention.

    Args:
        S, z: State of the keys as `linear_attn_state` returns it, or a sum of such states: S [B, Hk, F, D] and
            z [B, Hk, F], both float32 (float64 for float64 queries).
        rope: Tables (cos, sin) of these queries, each [Nq, D/2].
        q, feature_map, q_weight, mix, cu_seqlens_q, scale, normalize, eps, fp32_precision: Arguments of `linear_attn`.
        return_normalizer: Whether to return phi(q) z as well, with which o can be merged with other attention under
            one normaliser. Not with mix or normalize=False.

    Returns:
        o [B, Nq, H, D] in q's dtype; with return_normalizer the pair (o, den), den [B, H, Nq] in float32 (like the
        log-sum-exp of FlashAttention) without eps. Both are differentiable once, with respect to q, S, z, the weight
        and mix. With float16 inputs the gradients of S and z are 0 for features that no key has (z = 0).

    Raises:
        ValueError: An argument does not fit this description.
        TypeError: scale or eps is a tensor that requires a gradient.
    """
    checks.check_tensors(q=q, S=S, z=z)
    checks.check_mix_pair(mix)
    q, _, _, mix = _autocast(q, mix=mix)
    packed = cu_seqlens_q is not None and q.dim() == 3
    if packed:
        q, mix = _unpacked(q), _unpacked(mix)
    checks.check_rows("q", q)
    scaling = {"scale": scale, "normalize": normalize, "eps": eps}
    _check_apply_arguments(q, feature_map, q_weight, rope, mix, cu_seqlens_q, fp32_precision, **scaling)
    checks.check_state(S, z, q, cu_seqlens_q, feature_map)
    if return_normalizer and (mix is not None or not normalize):
        found = "a mix" if mix is not None else "normalize=False"
        raise ValueError(f"expected no mix and normalize=True with return_normalizer=True, got {found}")
    (q,), cos, sin = split_rope(rope, q)
    fused = _fused(mix, q)
    save_rotated = cos is not None and needs_gradient((q, S, z, q_weight, *fused))
    settings = feature_map, 1.0 if scale is None else float(scale), normalize, float(eps), fp32_precision, save_rotated
    inputs = q, S, z, q_weight, cos, sin
    out, den, _ = dispatch(apply_op, *inputs, *fused, _int32(cu_seqlens_q), *settings, return_normalizer)
    out = _mixed(out, mix, fused)
    out, den = (out.squeeze(0), den.squeeze(0)) if packed else (out, den)
    return (out, den) if return_normalizer else out


def _check_state_arguments(k, v, feature_map, k_weight, rope, key_mask, cu_seqlens, precision) -> None:
    checks.check_values(k, v)
    checks.check_features("k_weight", k_weight, k, feature_map, precision)
    checks.check_rope(rope, k)
    checks.check_key_mask(key_mask, k)
    checks.check_packed("cu_seqlens_k", cu_seqlens, k)


def _check_apply_arguments(
    q, feature_map, q_weight, rope, mix, cu_seqlens, precision, *, scale, normalize, eps
) -> None:  # fmt: skip
    checks.check_features("q_weight", q_weight, q, feature_map, precision)
    checks.check_rope(rope, q)
    checks.check_mix(mix, q)
    checks.check_packed("cu_seqlens_q", cu_seqlens, q)
    checks.check_scaling(scale, eps)


def _fused(mix, q: Tensor):
    """Return (softmax_out, r) if a kernel does the mixing, else (None, None)."""
    return mix if mix is not None and uses_kernels(q) else (None, None)


def _mixed(out: Tensor, mix, fused) -> Tensor:
    """Mix `out` with softmax_out, unless there is nothing to mix or a kernel has done it."""
    return out if mix is None or fused[0] is not None else mix_rows(out, *mix)


def _int32(cu_seqlens: Tensor | None) -> Tensor | None:
    return None if cu_seqlens is None else cu_seqlens.to(torch.int32)


def _autocast(q: Tensor, k: Tensor | None = None, v: Tensor | None = None, mix=None):
    """Cast the rows to torch.autocast's dtype if autocast is on."""
    q, k, v, softmax_out = autocast(q, k, v, None if mix is None else mix[0])
    return q, k, v, None if mix is None else (softmax_out, mix[1])


def _unpacked(x):
    """Give [total, H, D] a batch axis of one; in the pair mix, give it to softmax_out."""
    if x is None:
        return None
    return x.unsqueeze(0) if isinstance(x, Tensor) else (x[0].unsqueeze(0), x[1])
