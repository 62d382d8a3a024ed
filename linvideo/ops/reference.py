"""The definition of `linear_attn` as a short program in any floating dtype, with O(N F) memory, for tests.

Its parts that say what the feature maps, rotations and packed sequences are also serve the ops themselves.
"""

import torch

FEATURE_MAPS = ("hedgehog", "hedgehog_joint", "elu", "relu", "softmax", "identity")
WEIGHTED_MAPS = ("hedgehog", "hedgehog_joint")


def sum_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype in which the ops sum rows x: float64 for float64, otherwise float32."""
    return torch.promote_types(x.dtype, torch.float32)


def feature_count(feature_map: str, dim: int) -> int:
    """Return the number F of features of D channels."""
    return 2 * dim if feature_map in WEIGHTED_MAPS else dim


def activate(x: torch.Tensor, feature_map: str) -> torch.Tensor:
    """Return the features [..., F] of logits [..., D]; F is 2D for the maps with weights and D for the others."""
    if feature_map == "hedgehog":
        return torch.cat([x.softmax(-1), (-x).softmax(-1)], dim=-1)
    if feature_map == "hedgehog_joint":
        return torch.cat([2 * x, -2 * x], dim=-1).softmax(-1)
    if feature_map == "elu":  # elu(x) + 1, written so that a small exp(x) is not lost in (exp(x) - 1) + 1
        return torch.where(x > 0, x + 1, x.clamp(max=0).exp())
    if feature_map == "relu":
        return x.relu()
    if feature_map == "softmax":
        return x.softmax(-1)
    return x


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the channel pairs (2i, 2i + 1) of x [B, N, H, D] by cos, sin [N, D/2]; the result has x's dtype."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)


def features(x: torch.Tensor, weight: torch.Tensor | None, rope, feature_map: str) -> torch.Tensor:
    """Return phi [B, N, H, F] of x [B, N, H, D]."""
    if rope is not None:
        x = rotate(x, *rope)
    if weight is not None:
        x = torch.einsum("bnhd,hde->bnhe", x, weight.to(x.dtype))
    return activate(x, feature_map)


def spans(x: torch.Tensor, cu_seqlens: torch.Tensor | None) -> list[slice]:
    """Return the rows of each packed sequence of x [1, N, H, D], or all rows of x if cu_seqlens is None."""
    if cu_seqlens is None:
        return [slice(0, x.shape[1])]
    ends = cu_seqlens.tolist()
    if ends != sorted(ends) or ends[0] < 0 or ends[-1] > x.shape[1]:
        raise ValueError(f"expected cu_seqlens to rise from 0 to {x.shape[1]}, got {ends[:8]}")
    return [slice(*ends[i : i + 2]) for i in range(len(ends) - 1)]


def linear_attn_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    feature_map: str = "hedgehog",
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    rope: tuple[torch.Tensor, torch.Tensor] | None = None,
    mix: tuple[torch.Tensor, torch.Tensor] | None = None,
    key_mask: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    scale: float | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Return o = phi(q) S / (phi(q) z + eps) with S = sum_m phi(k_m)^T v_m and z = sum_m phi(k_m).

    With normalize=False, o = scale phi(q) S. The arguments are those of `linear_attn`. Everything is computed in q's
    dtype and differentiable by autograd.
    """
    if key_mask is not None:  # not a factor 0: masked keys may hold NaN
        k, v = (torch.where(key_mask[:, :, None, None], x, 0.0) for x in (k, v))
    phi_q, phi_k = features(q, q_weight, rope, feature_map), features(k, k_weight, rope, feature_map)
    if key_mask is not None:
        phi_k = phi_k * key_mask[:, :, None, None]
    group = q.shape[2] // k.shape[2]
    phi_k, v = phi_k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    outputs = []
    for queries, keys in zip(spans(q, cu_seqlens_q), spans(k, cu_seqlens_k), strict=True):
        state = torch.einsum("bmhf,bmhd->bhfd", phi_k[:, keys], v[:, keys])
        out = torch.einsum("bnhf,bhfd->bnhd", phi_q[:, queries], state)
        if normalize:
            out = out / (torch.einsum("bnhf,bhf->bnh", phi_q[:, queries], phi_k[:, keys].sum(1)) + eps).unsqueeze(-1)
        elif scale is not None:
            out = scale * out
        outputs.append(out)
    out = torch.cat(outputs, 1)
    return out if mix is None else (mix[1] * mix[0] + (1 - mix[1]) * out).to(out.dtype)
