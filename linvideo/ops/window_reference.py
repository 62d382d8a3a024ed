"""The definition of `window_attn` as a short program with N x N matrices in any floating dtype, for tests."""

import torch

from linvideo.ops.reference import features


def window_masks(
    tokens: int,
    *,
    frame_tokens: int,
    chunk: int,
    overlap: int,
    prefix_tokens: int,
    suffix_tokens: int,
    anchors,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which keys (columns) each query attends to with softmax and which linearly, both Bool [N, N]."""
    token = torch.arange(tokens)
    text = (token < prefix_tokens) | (token >= tokens - suffix_tokens)
    frame = (token - prefix_tokens).div(frame_tokens, rounding_mode="floor")
    last = (tokens - prefix_tokens - suffix_tokens) // frame_tokens - 1
    start = (frame // chunk * chunk)[:, None]  # the first frame of the query's chunk
    window = (frame >= start - overlap) & (frame < start + chunk + overlap)
    for anchor, index in (("first", 0), ("last", last)):
        if anchor in anchors:
            window |= frame == index
    seen = frame < start + chunk if causal else torch.ones_like(window)
    from_text, from_video = text[:, None], ~text[:, None]
    near = (from_video & (text | (window & seen))) | (from_text & (text if causal else torch.ones_like(text)))
    return near, from_video & ~text & seen & ~window


def kept_keys(k: torch.Tensor, key_mask: torch.Tensor | None, prefix_tokens: int) -> torch.Tensor:
    """Return which of all tokens are keys, Bool [B, N], from the mask of those before and after the video."""
    keep = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device)
    if key_mask is not None:
        keep[:, :prefix_tokens] = key_mask[:, :prefix_tokens]
        keep[:, k.shape[1] - key_mask.shape[1] + prefix_tokens :] = key_mask[:, prefix_tokens:]
    return keep


def window_weights(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    log_gain: torch.Tensor,
    chunk: int = 3,
    overlap: int = 1,
    prefix_tokens: int = 0,
    suffix_tokens: int = 0,
    key_mask: torch.Tensor | None = None,
    feature_map: str = "hedgehog",
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    rope: tuple[torch.Tensor, torch.Tensor] | None = None,
    scale: float | None = None,
    frame_tokens: int,
    anchors=(),
    causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the near weights [B, H, N, N], the far products a_ij [B, H, N, N] and their factor [B, H, N, 1].

    The output is (near + factor * far) v. Weights of keys that do not belong to a part are 0.
    """
    tokens, group = q.shape[1], q.shape[2] // k.shape[2]
    window = {"chunk": chunk, "overlap": overlap, "prefix_tokens": prefix_tokens, "suffix_tokens": suffix_tokens}
    masks = window_masks(tokens, frame_tokens=frame_tokens, anchors=anchors, causal=causal, **window)
    is_near, is_far = (mask.to(q.device) for mask in masks)
    keep = kept_keys(k, key_mask, prefix_tokens)
    is_near = is_near & keep[:, None, None]
    k = torch.where(keep[..., None, None], k, 0.0)  # masked keys may hold NaN
    phi_q, phi_k = features(q, q_weight, rope, feature_map), features(k, k_weight, rope, feature_map)
    far = torch.einsum("bnhf,bmhf->bhnm", phi_q, phi_k.repeat_interleave(group, 2)) * is_far
    if rope is not None:
        q, k = (features(x, None, rope, "identity") for x in (q, k))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = scale * torch.einsum("bnhd,bmhd->bhnm", q, k.repeat_interleave(group, 2))
    logits = logits.masked_fill(~is_near, float("-inf"))
    gain = log_gain.to(q.dtype)[:, None, None]
    largest = torch.maximum(logits.amax(-1, keepdim=True), gain + far.amax(-1, keepdim=True).log()).detach()
    near, factor = (logits - largest).exp(), (gain - largest).exp()
    total = near.sum(-1, keepdim=True) + factor * far.sum(-1, keepdim=True)
    return near / total, far, factor / total


def window_attn_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options) -> torch.Tensor:
    """Return o_i = (sum_near exp(s_ij) v_j + g sum_far a_ij v_j) / (sum_near exp(s_ij) + g sum_far a_ij).

    The options are those of `window_attn`, without `backend` and `fp32_precision`. Everything is computed in q's dtype
    and differentiable by autograd.
    """
    near, far, factor = window_weights(q, k, **options)
    keep = kept_keys(v, options.get("key_mask"), options.get("prefix_tokens", 0))
    v = torch.where(keep[..., None, None], v, 0.0).repeat_interleave(q.shape[2] // k.shape[2], 2)
    return torch.einsum("bhnm,bmhd->bnhd", near + factor * far, v)
