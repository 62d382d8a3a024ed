"""The public op: bidirectional linear attention, whole or as its two halves, the state of the keys and its reading."""

import torch
from torch import Tensor

from linvideo.ops import checks, whole
from linvideo.ops.library import apply_op, state_op, uses_kernels
from linvideo.ops.reference import rotate


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

    o_n = phi(q_n) S / (phi(q_n) z + eps) with S = sum_m phi(k_m)^T v_m and z = sum_m phi(k_m) over all Nk keys.

    Args:
        q: [B, Nq, H, D]; k, v: [B, Nk, Hk, D], H a multiple of Hk (query head h reads key head h // (H / Hk)). One
            dtype of float32, float16, bfloat16; D a multiple of 8 up to 128. Any strides, so [B, H, N, D] comes as
            x.transpose(1, 2) at no cost; a copy is made only where the last stride is not 1 or rows do not start at
            multiples of 8 elements.
        feature_map: "hedgehog", phi(x) = [softmax(xW), softmax(-xW)], the paper's; "hedgehog_joint",
            softmax([2xW, -2xW]), as flash-linear-attention has it (its layer adds a bias that starts at 0; this has
            none); "elu": elu(x) + 1; "relu"; "softmax" (over D); "identity" (only with normalize=False). On CUDA the
            logits of a softmax must stay below 2^30.
        q_weight [H, D, D], k_weight [Hk, D, D]: the W of the hedgehog maps (xW is [.., D] @ [D, D] per head); required
            for them, refused otherwise. Any of the three dtypes; cast to q's, gradients come back in their own.
        rope: (cos, sin), each [N, D/2] with N = Nq = Nk: rotates the channel pairs (2i, 2i + 1) of q and k before the
            map, in float32, rounded to q's dtype. No gradient flows to the tables.
        mix: (softmax_out like q, r of one element): returns r softmax_out + (1 - r) o, mixed in float32; gradients
            reach both. At r = 1 exactly softmax_out, at r = 0 exactly o, both being finite (LinVideo's selective
            transfer).
        key_mask: bool [B, Nk], False leaves a key out, whatever it holds.
        cu_seqlens_q, cu_seqlens_k: int32 [sequences + 1], both or none: q [total, H, D] or [1, total, H, D] holds
            sequences one after another, as in FlashAttention; sequence i of q attends to sequence i of k. Key_mask is
            [1, total] then, and rope has a row per packed token. They have to rise from 0 to total; on CUDA that is not
            checked (it would wait for the GPU), and rows that no sequence covers come back 0.
        scale: multiplies phi(q), so it acts only with normalize=False; default 1.
        normalize: divide by phi(q) z + eps. eps is added to the plain sum over Nk.
        fp32_precision: products of float32 inputs on CUDA: "ieee", or "tf32x3" (three tensor-core products for one;
            not on AMD's GPUs).

    Returns q's shape and dtype; under torch.autocast the inputs are cast to its dtype first, as for
    scaled_dot_product_attention. Sums are float32. Differentiable (once) in q, k, v, the weights and mix; reruns are
    bit-equal. On CUDA nothing waits for the GPU: a CUDA graph can capture the forward, and the forward with its
    backward, once the same call has been made outside of a capture, which compiles the kernels.

    Raises ValueError on anything that does not fit the above.
    """
    checks.check_mix_pair(mix)
    q, k, v, mix = _autocast(q, k, v, mix)
    packed = cu_seqlens_q is not None and q.dim() == 3
    if packed:
        q, k, v, mix = (_unpacked(x) for x in (q, k, v, mix))
    checks.check_rows("q", q)
    checks.check_rows("k", k, q)
    checks.check_pair(q, k)
    if (cu_seqlens_q is None) != (cu_seqlens_k is None) or (
        cu_seqlens_q is not None and cu_seqlens_q.shape != cu_seqlens_k.shape
    ):
        raise ValueError("expected cu_seqlens_q and cu_seqlens_k of one length or neither, got another combination")
    _check_state_arguments(k, v, feature_map, k_weight, None, key_mask, cu_seqlens_k, fp32_precision)
    scaling = {"scale": scale, "normalize": normalize, "eps": eps}
    _check_apply_arguments(q, feature_map, q_weight, rope, mix, cu_seqlens_q, fp32_precision, **scaling)
    if rope is not None and k.shape[1] != q.shape[1]:
        raise ValueError(f"expected as many keys as queries with rope, got {q.shape[1]} and {k.shape[1]}")
    (q, k), cos, sin = _rope(rope, q, k)
    fused, ends = _fused(mix, q), (key_mask, cu_seqlens_q, cu_seqlens_k)
    settings = feature_map, 1.0 if scale is None else float(scale), normalize, float(eps), fp32_precision, False
    out = whole.forward_op(q, k, v, q_weight, k_weight, cos, sin, *fused, *ends, *settings)[0]
    out = _mixed(out, mix)
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
    """The keys' half of `linear_attn`: S = sum_m phi(k_m)^T v_m [B, Hk, F, D] and z = sum_m phi(k_m) [B, Hk, F].

    Plain sums in float32, F = 2D for the hedgehog maps and D otherwise, B the number of sequences where they are
    packed: the states of parts of a sequence add up to the state of the whole, so that ranks of a context-parallel
    group all-reduce them and a stream adds what comes. Arguments as in `linear_attn`; rope's tables belong to these
    keys.

    Returns (S, z), differentiable (once) in k, v and the weight. `linear_attn_apply` reads them:
    linear_attn(q, k, v) equals linear_attn_apply(q, *linear_attn_state(k, v)) bit for bit.

    Raises ValueError on anything that does not fit.
    """
    k, v, _, _ = _autocast(k, v)
    if cu_seqlens_k is not None and k.dim() == 3:
        k, v = _unpacked(k), _unpacked(v)
    checks.check_rows("k", k)
    _check_state_arguments(k, v, feature_map, k_weight, rope, key_mask, cu_seqlens_k, fp32_precision)
    (k,), cos, sin = _rope(rope, k)
    save_rotated = cos is not None and _needs_grad(k, v, k_weight)
    arguments = k_weight, cos, sin, key_mask, cu_seqlens_k, feature_map, fp32_precision, save_rotated
    return state_op(k, v, *arguments)[:2]


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
) -> Tensor:
    """The queries' half of `linear_attn`: phi(q) S / (phi(q) z + eps), mixed if asked for.

    S [B, Hk, F, D], z [B, Hk, F] float32 of `linear_attn_state` or sums of such; the rest as in `linear_attn`, rope's
    tables those of these queries. Differentiable (once) in q, S, z, the weight and mix; with float16 inputs the
    gradients of S and z are 0 for features that no key has (z = 0).

    Returns q's shape and dtype. Raises ValueError on anything that does not fit.
    """
    checks.check_mix_pair(mix)
    q, _, _, mix = _autocast(q, mix=mix)
    packed = cu_seqlens_q is not None and q.dim() == 3
    if packed:
        q, mix = _unpacked(q), _unpacked(mix)
    checks.check_rows("q", q)
    scaling = {"scale": scale, "normalize": normalize, "eps": eps}
    _check_apply_arguments(q, feature_map, q_weight, rope, mix, cu_seqlens_q, fp32_precision, **scaling)
    checks.check_state(S, z, q, cu_seqlens_q, feature_map)
    (q,), cos, sin = _rope(rope, q)
    fused = _fused(mix, q)
    save_rotated = cos is not None and _needs_grad(q, S, z, q_weight, *fused)
    settings = feature_map, 1.0 if scale is None else float(scale), normalize, float(eps), fp32_precision, save_rotated
    out = _mixed(apply_op(q, S, z, q_weight, cos, sin, *fused, cu_seqlens_q, *settings)[0], mix)
    return out.squeeze(0) if packed else out


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
    checks.check_scaling(feature_map, scale, normalize, eps)


def _rope(rope, *rows: Tensor) -> tuple[tuple[Tensor, ...], Tensor | None, Tensor | None]:
    """The rows and the tables; where no kernel rotates, the rotated rows and no tables."""
    if rope is None:
        return rows, None, None
    cos, sin = rope[0].detach(), rope[1].detach()
    if uses_kernels(rows[0]):
        return rows, cos, sin
    return tuple(rotate(x, cos.float(), sin.float()) for x in rows), None, None


def _fused(mix, q: Tensor):
    """(softmax_out, r) where a kernel mixes."""
    return mix if mix is not None and uses_kernels(q) else (None, None)


def _mixed(out: Tensor, mix) -> Tensor:
    """The mixture where no kernel mixes."""
    if mix is None or uses_kernels(out):
        return out
    softmax_out, r = mix[0], mix[1].float().reshape(1)  # of one axis, so that the mixture is float32
    return (r * softmax_out + (1 - r) * out).to(out.dtype)


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _autocast(a: Tensor, b: Tensor | None = None, c: Tensor | None = None, mix=None):
    """The rows in torch.autocast's dtype where it is on."""
    kind = a.device.type
    # torch.amp.is_autocast_available would say it of meta too, but Dynamo of PyTorch 2.11 cannot trace it
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return a, b, c, mix
    dtype = torch.get_autocast_dtype(kind)
    a, b, c = (x.to(dtype) if x is not None and x.dtype in checks.DTYPES else x for x in (a, b, c))
    if mix is not None and mix[0].dtype in checks.DTYPES:
        mix = (mix[0].to(dtype), mix[1])
    return a, b, c, mix


def _unpacked(x):
    """[total, H, D] as a batch of one; for mix, its softmax_out."""
    if x is None:
        return None
    return x.unsqueeze(0) if isinstance(x, Tensor) else (x[0].unsqueeze(0), x[1])
