"""What `linear_attn` means, as the shortest program in any floating dtype; O(N F) memory. Tests measure against it."""

import torch

FEATURE_MAPS = ("hedgehog", "elu", "relu", "softmax", "identity")


def activate(x: torch.Tensor, feature_map: str) -> torch.Tensor:
    """Features [..., F] of logits [..., D]; F = 2D for "hedgehog" and D otherwise."""
    if feature_map == "hedgehog":
        return torch.cat([x.softmax(-1), (-x).softmax(-1)], dim=-1)
    if feature_map == "elu":  # elu(x) + 1, written so that exp(x) is not lost beside 1
        return torch.where(x > 0, x + 1, x.clamp(max=0).exp())
    if feature_map == "relu":
        return x.relu()
    if feature_map == "softmax":
        return x.softmax(-1)
    return x


def linear_attn_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    feature_map: str = "hedgehog",
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    scale: float | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
) -> torch.Tensor:
    """o = phi(q) S / (phi(q) z + eps) with S = sum_m phi(k_m)^T v_m, z = sum_m phi(k_m); arguments as `linear_attn`.

    With normalize=False, o = scale phi(q) S. Differentiable by autograd; everything runs in q's dtype.
    """
    if feature_map == "hedgehog":
        q = torch.einsum("bnhd,hde->bnhe", q, q_weight.to(q.dtype))
        k = torch.einsum("bnhd,hde->bnhe", k, k_weight.to(k.dtype))
    phi_q, phi_k = activate(q, feature_map), activate(k, feature_map)
    numerator = torch.einsum("bnhf,bhfd->bnhd", phi_q, torch.einsum("bmhf,bmhd->bhfd", phi_k, v))
    if not normalize:
        return numerator if scale is None else scale * numerator
    return numerator / (torch.einsum("bnhf,bhf->bnh", phi_q, phi_k.sum(1)) + eps).unsqueeze(-1)
