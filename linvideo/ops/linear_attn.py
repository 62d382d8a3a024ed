"""The public op: validation, autocast, torch.library registration and autograd.

`linvideo::linear_attn_forward` and `linvideo::linear_attn_backward` are opaque to torch.compile. CUDA tensors run the
Triton kernels of `linvideo_kernels`, never anything else; CPU tensors run `chunked`, or with TRITON_INTERPRET=1 in the
environment the same kernels in Triton's interpreter.
"""

import math
import os

import linvideo_kernels
import torch
from torch import Tensor

from linvideo.ops import chunked
from linvideo.ops.reference import FEATURE_MAPS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 128


def linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str = "hedgehog",
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    scale: float | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
) -> Tensor:
    """Bidirectional linear attention, O(N) in time and memory (LinVideo, arXiv 2510.08318; Hedgehog, arXiv 2402.04347).

    o_n = phi(q_n) S / (phi(q_n) z + eps) with S = sum_m phi(k_m)^T v_m and z = sum_m phi(k_m) over all Nk keys.

    Args:
        q: [B, Nq, H, D]; k, v: [B, Nk, H, D]. One dtype of float32, float16, bfloat16; D a multiple of 8 up to 128. Any
            strides; a copy is made only where the last stride is not 1.
        feature_map: "hedgehog", phi(x) = [softmax(xW), softmax(-xW)]; "elu": elu(x) + 1; "relu";
            "softmax" (over D); "identity" (only with normalize=False).
        q_weight, k_weight: [H, D, D], the W of "hedgehog" (xW is [.., D] @ [D, D] per head); required for it, refused
            otherwise. Any of the three dtypes; cast to q's, gradients come back in their own.
        scale: multiplies phi(q), so it acts only with normalize=False; default 1.
        normalize: divide by phi(q) z + eps. eps is added to the plain sum over Nk.

    Returns [B, Nq, H, D] in q's dtype; under torch.autocast the inputs are cast to its dtype first, as for
    scaled_dot_product_attention. Sums are float32. Differentiable (once) in q, k, v and the weights; reruns are
    bit-equal.

    Raises ValueError on anything that does not fit the above.
    """
    if torch.amp.is_autocast_available(q.device.type) and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x.to(dtype) if x.dtype in DTYPES else x for x in (q, k, v))
    _check(q, k, v, feature_map, q_weight, k_weight, scale, normalize, eps)
    scale = 1.0 if scale is None else float(scale)
    return torch.ops.linvideo.linear_attn_forward(
        q, k, v, q_weight, k_weight, feature_map, scale, normalize, float(eps)
    )[0]


def _check(q, k, v, feature_map, q_weight, k_weight, scale, normalize, eps) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"expected {name} of shape [B, N, H, D], got {x.dim()} dimensions")
        if x.dtype != q.dtype or x.dtype not in DTYPES:
            raise ValueError(
                f"expected q, k, v in one dtype of float32, float16, bfloat16, got {q.dtype}, {name} {x.dtype}"
            )
        if x.device != q.device:
            raise ValueError(f"expected q, k, v on one device, got q on {q.device}, {name} on {x.device}")
    batch, length, heads, dim = q.shape
    if dim % 8 or not 8 <= dim <= MAX_HEAD_DIM:
        raise ValueError(f"expected a head dimension D that is a multiple of 8 up to {MAX_HEAD_DIM}, got {dim}")
    if k.shape[0] != batch or k.shape[2] != heads or k.shape[3] != dim:
        raise ValueError(f"expected k of shape [{batch}, Nk, {heads}, {dim}] to go with q, got {tuple(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"expected v of k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    if 0 in (batch, length, heads, k.shape[1]):
        raise ValueError(
            f"expected at least one batch, head, query and key, got q {tuple(q.shape)}, k {tuple(k.shape)}"
        )
    if feature_map not in FEATURE_MAPS:
        raise ValueError(f"expected feature_map to be one of {', '.join(FEATURE_MAPS)}, got {feature_map!r}")
    if feature_map == "identity" and normalize:
        raise ValueError("expected normalize=False with feature_map='identity' (its denominator can vanish), got True")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if feature_map != "hedgehog":
            if weight is not None:
                raise ValueError(f"expected no {name} with the parameter-free feature_map {feature_map!r}, got one")
            continue
        if weight is None:
            raise ValueError(f"expected {name} of shape [{heads}, {dim}, {dim}] with feature_map='hedgehog', got None")
        if tuple(weight.shape) != (heads, dim, dim):
            raise ValueError(f"expected {name} of shape [{heads}, {dim}, {dim}], got {tuple(weight.shape)}")
        if weight.dtype not in DTYPES:
            raise ValueError(f"expected {name} in float32, float16 or bfloat16, got {weight.dtype}")
        if weight.device != q.device:
            raise ValueError(f"expected {name} on q's device {q.device}, got {weight.device}")
    if not (math.isfinite(eps) and eps >= torch.finfo(torch.float32).tiny):
        raise ValueError(f"expected a finite, normal float32 eps > 0, got {eps}")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"expected a finite scale, got {scale}")


@torch.library.custom_op("linvideo::linear_attn_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    feature_map: str,
    scale: float,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns o and what the backward needs of the keys: the summed state and its row statistics, neither of size N."""
    backend = _kernels(q) if _uses_kernels(q) else chunked
    with torch.autocast(q.device.type, enabled=False):  # q's dtype is decided; sums stay in fp32
        return backend.forward(q, k, v, q_weight, k_weight, feature_map, scale, normalize, eps)


@torch.library.custom_op("linvideo::linear_attn_backward", mutates_args=())
def _backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    state: Tensor,
    stats: Tensor,
    feature_map: str,
    scale: float,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns dq, dk, dv, dq_weight, dk_weight; the last two are empty without weights (an op cannot return None)."""
    backend = _kernels(q) if _uses_kernels(q) else chunked
    with torch.autocast(q.device.type, enabled=False):
        grads = backend.backward(do, q, k, v, q_weight, k_weight, state, stats, feature_map, scale, normalize, eps)
    return tuple(q.new_empty(0) if grad is None else grad for grad in grads)


@_forward.register_fake
def _(q, k, v, q_weight, k_weight, feature_map, scale, normalize, eps):
    batch, _, heads, dim = q.shape
    signs = 2 if feature_map == "hedgehog" else 1
    if _uses_kernels(q):
        from linvideo_kernels.linear_attn import configs

        state, stats = configs.saved_shapes(batch, heads, dim, signs)
        saved = q.new_empty(state), q.new_empty(stats, dtype=torch.float32)
    else:
        features = signs * dim
        saved = (
            q.new_empty(batch, heads, features, dim, dtype=torch.float32),
            q.new_empty(batch, heads, features, dtype=torch.float32),
        )
    return q.new_empty(q.shape), *saved


@_backward.register_fake
def _(do, q, k, v, q_weight, k_weight, state, stats, feature_map, scale, normalize, eps):
    weights = (q.new_empty(0) if w is None else w.new_empty(w.shape) for w in (q_weight, k_weight))
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), *weights


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, q_weight, k_weight, *ctx.settings = inputs
    _, state, stats = output
    ctx.save_for_backward(q, k, v, q_weight, k_weight, state, stats)
    ctx.set_materialize_grads(False)


def _autograd(ctx, do, _dstate, _dstats):
    if do is None:
        return (None,) * 9
    saved = ctx.saved_tensors  # once: under activation checkpointing a second read raises
    grads = torch.ops.linvideo.linear_attn_backward(do, *saved, *ctx.settings)
    weights = grads[3:] if saved[3] is not None else (None, None)
    return *grads[:3], *weights, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _uses_kernels(x: Tensor) -> bool:
    return x.device.type == "cuda" or (x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")


def _kernels(x: Tensor):
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 and not linvideo_kernels.interpreter_bf16_ok:
        raise ValueError("expected float32 or float16 under TRITON_INTERPRET=1, whose bfloat16 is wrong, got bfloat16")
    try:
        from linvideo_kernels import linear_attn as kernels
    except ImportError as error:
        raise RuntimeError("linear_attn on CUDA tensors needs Triton: pip install triton") from error
    return kernels
