"""What `linear_attn` means, as the shortest program in any floating dtype; O(N F) memory. Tests measure against it."""

import torch

FEATURE_MAPS = ("hedgehog", "hedgehog_joint", "elu", "relu", "softmax", "identity")
WEIGHTED_MAPS = ("hedgehog", "hedgehog_joint")


def activate(x: torch.Tensor, feature_map: str) -> torch.Tensor:
    """Features [..., F] of logits [..., D]; F = 2D for the maps with weights and D otherwise."""
    if feature_map == "hedgehog":
        return torch.cat([x.softmax(-1), (-x).softmax(-1)], dim=-1)
    if feature_map == "hedgehog_joint":
        return torch.cat([2 * x, -2 * x], dim=-1).softmax(-1)
    if feature_map == "elu":  # elu(x) + 1, written so that exp(x) is not lost beside 1
        return torch.where(x > 0, x + 1, x.clamp(max=0).exp())
    if feature_map == "relu":
        return x.relu()
    if feature_map == "softmax":
        return x.softmax(-1)
    return x


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of the channel pairs (2i, 2i + 1) of x [B, N, H, D] by cos, sin [N, D/2]; x's dtype."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)


def features(x: torch.Tensor, weight: torch.Tensor | None, rope, feature_map: str) -> torch.Tensor:
    """phi [B, N, H, F] of x [B, N, H, D]."""
    if rope is not None:
        x = rotate(x, *rope)
    if weight is not None:
        x = torch.einsum("bnhd,hde->bnhe", x, weight.to(x.dtype))
    return activate(x, feature_map)


def spans(x: torch.Tensor, cu_seqlens: torch.Tensor | None) -> list[slice]:
    """The rows of each packed sequence of x [1, N, H, D]; all of them where nothing is packed."""
    if cu_seqlens is None:
        return [slice(0, x.shape[1])]
    ends = cu_seqlens.tolist()
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
    """o = phi(q) S / (phi(q) z + eps) with S = sum_m phi(k_m)^T v_m, z = sum_m phi(k_m); arguments as `linear_attn`.

    With normalize=False, o = scale phi(q) S. Differentiable by autograd; everything runs in q's dtype.
    """
    if key_mask is not None:  # whatever the others hold, NaN included
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
