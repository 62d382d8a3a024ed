"""Window attention as the benchmarks run it: with the default window of converted models, and what to compare with."""

import torch

from benchmarks.shapes import Shape
from linvideo.ops.reference import features, rotate
from linvideo.ops.window_layout import Layout

CHUNK, OVERLAP = 3, 1  # frames
CHECKED = 64  # number of queries whose results are compared with the definition


def layout(shape: Shape) -> Layout:
    """Return the division of a shape's tokens, with the text first."""
    others = {"suffix_tokens": 0, "first_anchor": False, "last_anchor": False, "causal": False}
    return Layout(shape.frames, **options(shape), **others)


def kept(shape: Shape) -> float:
    """Return the share of all pairs of tokens to which a layer attends with softmax."""
    parts, size = layout(shape), shape.frame_tokens
    pairs = shape.text * shape.tokens
    for chunk in range(parts.chunks):
        first, last = parts.window(chunk)
        pairs += min(CHUNK, shape.frames - chunk * CHUNK) * size * ((last - first) * size + shape.text)
    return pairs / shape.tokens**2


def options(shape: Shape) -> dict:
    """Return the arguments of `window_attn` for a shape."""
    return {"frame_tokens": shape.frame_tokens, "prefix_tokens": shape.text, "chunk": CHUNK, "overlap": OVERLAP}


def near(query: torch.Tensor, key: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Return whether queries attend to keys with softmax, from the numbers of their tokens."""
    frame = torch.div(key - shape.text, shape.frame_tokens, rounding_mode="floor")
    start = torch.div(query - shape.text, shape.frame_tokens * CHUNK, rounding_mode="floor") * CHUNK
    window = (frame >= start - OVERLAP) & (frame < start + CHUNK + OVERLAP)
    return window | (key < shape.text) | (query < shape.text)


def expected(x) -> tuple[torch.Tensor, torch.Tensor]:
    """Return some queries' numbers and their outputs by the definition, for the inputs of one head in fp32."""
    shape = x.shape
    tokens = torch.arange(shape.tokens, device=x.q.device)
    rows = torch.linspace(0, shape.tokens - 1, CHECKED, device=x.q.device).long()
    at_rows = tuple(table[rows] for table in x.rope)
    q, k = rotate(x.q[:, rows], *at_rows), rotate(x.k, *x.rope)
    phi_q, phi_k = (features(u, weight, None, "hedgehog") for u, weight in ((q, x.q_weight), (k, x.k_weight)))
    far = x.log_gain[0].exp() * torch.einsum("bnhf,bmhf->bhnm", phi_q, phi_k)
    logits = torch.einsum("bnhd,bmhd->bhnm", q, k) / x.q.shape[-1] ** 0.5
    weights = torch.where(near(rows[:, None], tokens, shape), logits.exp(), far)
    return rows, torch.einsum("bhnm,bmhd->bnhd", weights / weights.sum(-1, keepdim=True), x.v)


def flex(x):
    """Build FlexAttention over the windows alone: the near part without the far part."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def mask(batch, head, query, key):
        return near(query, key, x.shape)

    tokens = x.shape.tokens
    blocks = create_block_mask(mask, None, None, tokens, tokens, device=x.q.device, _compile=True)
    attention = torch.compile(flex_attention, dynamic=False)
    return lambda: attention(*x.heads_first, block_mask=blocks).transpose(1, 2)
