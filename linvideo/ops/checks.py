"""Checks of what `linear_attn` and its two halves accept. Each ValueError says what was expected and what came."""

import math
import numbers

import torch
from torch import Tensor
from torch.autograd import forward_ad

from linvideo.ops.library import PLAIN, uses_kernels
from linvideo.ops.reference import FEATURE_MAPS, WEIGHTED_MAPS, feature_count, sum_dtype

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAMES = "float32, float16 or bfloat16 (or float64 with float64 rows)"
MAX_HEAD_DIM = 128
PRECISIONS = ("ieee", "tf32x3")
TINY = torch.finfo(torch.float32).tiny


def check_tensors(**arguments: Tensor) -> None:
    for name, x in arguments.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"expected {name} to be a tensor, got {type(x).__name__}")


def check_rows(name: str, x: Tensor, like: Tensor | None = None) -> None:
    """Check that x is [B, N, H, D] of a supported dtype and head dimension and, if given, on the device of `like`."""
    if x.dim() != 4:
        raise ValueError(f"expected {name} of shape [B, N, H, D], got {x.dim()} dimensions")
    if not accepts(x.dtype, x) or (like is not None and x.dtype != like.dtype):
        other = "" if like is None else f"{like.dtype} and "
        raise ValueError(
            "expected q, k, v in one dtype of float32, float16, bfloat16 and, on the CPU without Triton's interpreter,"
            f" float64, got {other}{name} {x.dtype}"
        )
    if like is not None and x.device != like.device:
        raise ValueError(f"expected q, k, v on one device, got {like.device} and {name} on {x.device}")
    batch, length, heads, dim = x.shape
    if dim % 8 or not 8 <= dim <= MAX_HEAD_DIM:
        raise ValueError(f"expected a head dimension D that is a multiple of 8 up to {MAX_HEAD_DIM}, got {dim}")
    if not heads:
        raise ValueError(f"expected at least one head, got {name} {tuple(x.shape)}")


def accepts(dtype: torch.dtype, x: Tensor) -> bool:
    """Return whether the op takes x with another tensor of that dtype; float64 is for float64 rows only."""
    return dtype in DTYPES or (dtype == torch.float64 == x.dtype and x.device.type != "cuda" and not uses_kernels(x))


def check_values(k: Tensor, v: Tensor) -> None:
    check_rows("v", v, k)
    if v.shape != k.shape:
        raise ValueError(f"expected v of k's shape {tuple(k.shape)}, got {tuple(v.shape)}")


def check_pair(q: Tensor, k: Tensor) -> None:
    """Check that queries and keys have the same batch and head dimension and compatible heads."""
    (batch, _, heads, dim), key_heads = q.shape, k.shape[2]
    if k.shape[0] != batch or k.shape[3] != dim or heads % key_heads:
        raise ValueError(
            f"expected k of shape [{batch}, Nk, Hk, {dim}], Hk a divisor of {heads}, to go with q, got {tuple(k.shape)}"
        )


def check_features(name: str, weight: Tensor | None, x: Tensor, feature_map: str, precision: str) -> None:
    """Check the feature map, its weight for the rows x, and the precision."""
    if feature_map not in FEATURE_MAPS:
        raise ValueError(f"expected feature_map to be one of {', '.join(FEATURE_MAPS)}, got {feature_map!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"expected fp32_precision to be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if feature_map not in WEIGHTED_MAPS:
        if weight is not None:
            raise ValueError(f"expected no {name} with the parameter-free feature_map {feature_map!r}, got one")
        return
    shape = (*x.shape[2:], x.shape[3])
    if weight is None:
        raise ValueError(f"expected {name} of shape {list(shape)} with feature_map={feature_map!r}, got None")
    check_tensors(**{name: weight})
    if tuple(weight.shape) != shape:
        raise ValueError(f"expected {name} of shape {list(shape)}, got {tuple(weight.shape)}")
    if not accepts(weight.dtype, x):
        raise ValueError(f"expected {name} in {NAMES}, got {weight.dtype}")
    check_device(name, weight, x)


def check_rope(rope, x: Tensor) -> None:
    if rope is None:
        return
    if not isinstance(rope, tuple | list) or len(rope) != 2 or not all(isinstance(t, Tensor) for t in rope):
        raise ValueError(f"expected rope to be two tensors (cos, sin), got {type(rope).__name__}")
    shape = (x.shape[1], x.shape[3] // 2)
    for name, table in zip(("cos", "sin"), rope, strict=True):
        if tuple(table.shape) != shape:
            raise ValueError(f"expected rope's {name} of shape {list(shape)}, [N, D/2], got {tuple(table.shape)}")
        if not accepts(table.dtype, x):
            raise ValueError(f"expected rope's {name} in {NAMES}, got {table.dtype}")
        check_device(f"rope's {name}", table, x)


def check_mix_pair(mix) -> None:
    if mix is None:
        return
    if not isinstance(mix, tuple | list) or len(mix) != 2 or not all(isinstance(t, Tensor) for t in mix):
        raise ValueError(f"expected mix to be two tensors (softmax_out, r), got {type(mix).__name__}")


def check_mix(mix: tuple[Tensor, Tensor] | None, q: Tensor) -> None:
    """Check the pair that `check_mix_pair` has accepted against the rows q."""
    if mix is None:
        return
    softmax_out, r = mix
    if softmax_out.shape != q.shape or softmax_out.dtype != q.dtype:
        raise ValueError(
            f"expected softmax_out like q, {tuple(q.shape)} {q.dtype}, got {tuple(softmax_out.shape)}"
            f" {softmax_out.dtype}"
        )
    if r.numel() != 1 or not accepts(r.dtype, q):
        raise ValueError(f"expected r to be one number in {NAMES}, got {tuple(r.shape)} {r.dtype}")
    check_device("softmax_out", softmax_out, q)
    check_device("r", r, q)


def check_key_mask(key_mask: Tensor | None, k: Tensor) -> None:
    if key_mask is None:
        return
    check_tensors(key_mask=key_mask)
    if key_mask.dtype != torch.bool or key_mask.shape != k.shape[:2]:
        raise ValueError(
            f"expected key_mask to be bool of shape {list(k.shape[:2])}, [B, Nk], got {key_mask.dtype}"
            f" {tuple(key_mask.shape)}"
        )
    check_device("key_mask", key_mask, k)


def check_packed(name: str, cu_seqlens: Tensor | None, x: Tensor) -> None:
    """Check cu_seqlens of the rows x. Its values are checked on the CPU only: reading them would wait for a GPU."""
    if cu_seqlens is None:
        return
    check_tensors(**{name: cu_seqlens})
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"expected {name} to be int32 or int64 of shape [sequences + 1], got {cu_seqlens.dtype}"
            f" {tuple(cu_seqlens.shape)}"
        )
    check_device(name, cu_seqlens, x)
    if x.shape[0] != 1:
        raise ValueError(f"expected a batch of 1 (or [total, H, D]) with {name}, got a batch of {x.shape[0]}")
    if _readable(cu_seqlens):
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != x.shape[1] or ends != sorted(ends):
            raise ValueError(f"expected {name} to rise from 0 to {x.shape[1]}, got {ends[:8]}")


def check_packed_pair(cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None) -> None:
    """Check that queries and keys are packed into as many sequences, or neither is packed."""
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if x is not None:
            check_tensors(**{name: x})
    shapes = [None if x is None else list(x.shape) for x in (cu_seqlens_q, cu_seqlens_k)]
    if shapes[0] != shapes[1]:
        found = f"{shapes[0]} and {shapes[1]}"
        raise ValueError(f"expected cu_seqlens_q and cu_seqlens_k of one shape, or neither, got {found}")


def _readable(x: Tensor) -> bool:
    """Return whether x is an ordinary CPU tensor, whose values can be read here."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or type(x) not in PLAIN:
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(x)


def check_state(state: Tensor, z: Tensor, q: Tensor, cu_seqlens: Tensor | None, feature_map: str) -> None:
    batch = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    heads, dim = q.shape[2:]
    features = feature_count(feature_map, dim)
    fits = state.dim() == 4 and state.shape[0] == batch and tuple(state.shape[2:]) == (features, dim)
    if not fits or not state.shape[1] or heads % state.shape[1]:
        raise ValueError(
            f"expected S of shape [{batch}, Hk, {features}, {dim}], Hk a divisor of {heads}, got {tuple(state.shape)}"
        )
    if z.shape != state.shape[:3]:
        raise ValueError(f"expected z of shape {list(state.shape[:3])}, got {tuple(z.shape)}")
    for name, x in (("S", state), ("z", z)):
        if x.dtype != sum_dtype(q):
            raise ValueError(f"expected {name} in {sum_dtype(q)} for {q.dtype} queries, got {x.dtype}")
        check_device(name, x, q)


def check_scaling(scale: float | None, eps: float) -> None:
    for name, x in (("scale", 1.0 if scale is None else scale), ("eps", eps)):
        if isinstance(x, Tensor) and _is_differentiated(x):
            raise TypeError(f"expected {name} to be a number, which has no gradient, got a tensor that requires one")
        if not (isinstance(x, int | float | numbers.Real) or (isinstance(x, Tensor) and x.dim() == 0)):
            raise ValueError(f"expected {name} to be a number, got {type(x).__name__}")
        # Comparisons and not math.isfinite, which torch.compile cannot trace with dynamic=True.
        if not -math.inf < x < math.inf:
            raise ValueError(f"expected a finite {name}, got {x}")
    if eps < TINY:
        raise ValueError(f"expected a normal float32 eps > 0, got {eps}")


def _is_differentiated(x: Tensor) -> bool:
    """Return whether a number given as a tensor takes part in a derivative or another transform."""
    if torch.compiler.is_compiling() or x.requires_grad:
        return x.requires_grad and torch.is_grad_enabled()
    return torch._C._functorch.is_functorch_wrapped_tensor(x) or forward_ad.unpack_dual(x).tangent is not None


def check_device(name: str, x: Tensor, like: Tensor) -> None:
    if x.device != like.device:
        raise ValueError(f"expected {name} on the rows' device {like.device}, got {x.device}")
