"""Window attention: softmax to near frames and linear attention to all other frames, under one normaliser."""

from collections.abc import Collection

import torch
from torch import Tensor

from linvideo.ops import checks, softmax_backends
from linvideo.ops.inputs import autocast, split_rope
from linvideo.ops.library import dispatch, needs_gradient
from linvideo.ops.window_library import forward_op

ANCHORS = ("first", "last")


def window_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    frame_tokens: int,
    log_gain: Tensor,
    chunk: int = 3,
    overlap: int = 1,
    prefix_tokens: int = 0,
    suffix_tokens: int = 0,
    anchors: Collection[str] = (),
    causal: bool = False,
    key_mask: Tensor | None = None,
    feature_map: str = "hedgehog",
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    backend: str | None = None,
    fp32_precision: str = "ieee",
) -> Tensor:
    """Attention of a video to itself: softmax within a window of frames, linear outside.

    The rows are F frames of `frame_tokens` tokens each. The queries of a chunk of `chunk` frames attend with softmax to
    a window: the chunk and `overlap` frames on either side. They attend linearly to exactly the other frames. One
    normaliser serves both, so that the content decides how much weight the far frames get:

        o_i = (sum_near exp(s_ij) v_j + g sum_far a_ij v_j) / (sum_near exp(s_ij) + g sum_far a_ij)

    with s_ij = scale q_i.k_j, a_ij = phi(q_i).phi(k_j) and a gain g per head. It goes beyond LinVideo
    (arXiv 2510.08318), whose layers are softmax or linear as a whole; ReHyAt and ARL2 combine the two similarly.

    Time and memory are O(N), but for F^2 additions of states, of [H, features, D] each, which are few next to the rest
    if frames have hundreds of tokens.

    Args:
        q: Queries [B, N, H, D] in float32, float16 or bfloat16, or float64 on the CPU; D is a multiple of 8 up to 128.
            N is prefix_tokens + F frame_tokens + suffix_tokens, for any number of frames F.
        k, v: Keys and values [B, N, Hk, D] in q's dtype; H is a multiple of Hk.
        frame_tokens: Number of tokens per (latent) frame.
        log_gain: Logarithm of the gain g of each query head, [H] in any of q's dtypes.
        chunk: Number of frames that share a window. The last chunk may be shorter.
        overlap: Number of frames on either side of a chunk that belong to its window.
        prefix_tokens, suffix_tokens: Number of tokens before and after the video's, such as a text's. They are keys of
            every window, and their own queries attend to all tokens with softmax.
        anchors: Frames that are keys of every window as well: any of "first" and "last".
        causal: Whether to leave out all frames after the query's chunk, from softmax and linear attention. The frames
            of one chunk still see each other, and the tokens before and after the video see only themselves.
        key_mask: Bool [B, prefix_tokens + suffix_tokens], False for those tokens that are not to be keys. What they
            hold does not matter, even NaN.
        feature_map, q_weight, k_weight, rope, fp32_precision: Arguments of `linear_attn`. The rotary embedding rotates
            q and k for both parts.
        scale: Factor of the logits of the softmax. None means D^-0.5.
        backend: Name of the library that computes the softmax (see linvideo/ops/softmax_backends.py). None is a choice
            by device and dtype.

    Returns:
        o [B, N, H, D] in q's dtype. If the windows cover the whole video, it is what the backend returns for softmax
        attention over all tokens. It is differentiable once, with respect to q, k, v, the weights and log_gain.

    Raises:
        ValueError: An argument does not fit this description.
    """
    checks.check_tensors(q=q, k=k, v=v)
    q, k, v = autocast(q, k, v)
    checks.check_rows("q", q)
    checks.check_values(k, v)
    checks.check_rows("k", k, q)
    checks.check_pair(q, k)
    if k.shape[1] != q.shape[1]:
        raise ValueError(f"expected as many keys as queries, got {k.shape[1]} keys, {q.shape[1]} queries")
    for name, x, weight in (("q_weight", q, q_weight), ("k_weight", k, k_weight)):
        checks.check_features(name, weight, x, feature_map, fp32_precision)
    if feature_map == "identity":
        raise ValueError("expected a feature_map whose features are not negative, got 'identity'")
    checks.check_scaling(scale, 1.0)
    checks.check_rope(rope, q)
    text = prefix_tokens, suffix_tokens
    frames = _check_window(q.shape[1], frame_tokens, chunk, overlap, *text, anchors, causal)
    _check_log_gain(log_gain, q)
    if key_mask is not None:
        _check_key_mask(key_mask, q, sum(text))
    leaves = [q, k, v, log_gain, *(weight for weight in (q_weight, k_weight) if weight is not None)]
    training = needs_gradient(leaves)
    softmax_backends.choose(backend, q, masked=key_mask is not None, training=training)  # raises before any work
    (q, k), cos, sin = split_rope(rope, q, k)
    rows = q, k, v, log_gain, q_weight, k_weight, cos, sin, key_mask
    flags = int("first" in anchors), int("last" in anchors), int(causal)  # Dynamo takes no bool among symbolic numbers
    window = [frames, frame_tokens, chunk, overlap, *text, *flags]
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return dispatch(forward_op, *rows, window, feature_map, scale, backend, fp32_precision, False)[0]


def _check_window(tokens, frame_tokens, chunk, overlap, prefix_tokens, suffix_tokens, anchors, causal) -> int:
    """Return the number of frames."""
    numbers = {"frame_tokens": 1, "chunk": 1, "overlap": 0, "prefix_tokens": 0, "suffix_tokens": 0}
    given = (frame_tokens, chunk, overlap, prefix_tokens, suffix_tokens)
    for (name, least), value in zip(numbers.items(), given, strict=True):
        if isinstance(value, bool) or not isinstance(value, int | torch.SymInt) or value < least:
            raise ValueError(f"expected {name} to be an integer of at least {least}, got {value!r}")
    if isinstance(anchors, str) or not isinstance(anchors, Collection) or any(name not in ANCHORS for name in anchors):
        raise ValueError(f"expected anchors to be a collection of 'first' and 'last', got {anchors!r}")
    if not isinstance(causal, bool):
        raise ValueError(f"expected causal to be True or False, got {causal!r}")
    if causal and "last" in anchors:
        raise ValueError("expected no anchor 'last' with causal=True, which leaves out later frames, got it")
    video = tokens - prefix_tokens - suffix_tokens
    if video < frame_tokens or video % frame_tokens:
        raise ValueError(
            f"expected prefix_tokens + F frame_tokens + suffix_tokens = {tokens} tokens for a whole number of frames"
            f" F > 0, got {prefix_tokens} + F {frame_tokens} + {suffix_tokens}"
        )
    return video // frame_tokens


def _check_log_gain(log_gain: Tensor, q: Tensor) -> None:
    fits = isinstance(log_gain, Tensor) and checks.accepts(log_gain.dtype, q) and log_gain.shape == (q.shape[2],)
    if not fits:
        raise ValueError(f"expected log_gain of shape [{q.shape[2]}] in {checks.NAMES}, got {_described(log_gain)}")
    checks.check_device("log_gain", log_gain, q)


def _check_key_mask(key_mask: Tensor, q: Tensor, tokens: int) -> None:
    shape = (q.shape[0], tokens)
    if not isinstance(key_mask, Tensor) or key_mask.dtype != torch.bool or key_mask.shape != shape:
        raise ValueError(
            f"expected key_mask to be bool of shape {list(shape)}, [B, prefix_tokens + suffix_tokens], got"
            f" {_described(key_mask)}"
        )
    checks.check_device("key_mask", key_mask, q)


def _described(x: object) -> str:
    return f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
