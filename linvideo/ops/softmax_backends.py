"""Softmax attention that returns its log-sum-exp: the near part of `window_attn`, on each of several libraries.

A backend is a pair of functions on q [B, Nq, H, D] and k, v [B, Nk, H, D], which may be views of any strides, also ones
whose batch entries overlap, as long as each row is as `aligned` makes it:

    forward(q, k, v, scale, mask=None) -> o [B, Nq, H, D], lse [B, H, Nq]
    backward(do, q, k, v, o, lse, scale, mask=None) -> dq, dk, dv

lse_i = log sum_j exp(scale q_i . k_j), in float32. `mask` is Bool [B, Nk], False for keys to leave out; their k and v
must be finite. A batch entry without any key gets finite results and an lse of about -3e4. Only "cpu" and "efficient"
take a mask.

`backward` accepts an o and lse that are not its own: with o and lse of attention to more keys than k, it returns the
gradients' share of these keys. That is exact, because a flash backward recomputes exp(scale q.k - lse) and needs
nothing else from the forward than do . o. There is no autograd in this file.
"""

import functools
import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

BACKENDS = ("cpu", "flash", "cudnn", "efficient", "flash_attn_2", "flash_attn_3", "flash_attn_4")
FLOAT32 = ("cpu", "efficient")  # the others take 16 bits only
PACKAGES = {  # the modules that provide a backend; a module of the second group has no backward
    "flash_attn_2": (("flash_attn.flash_attn_interface",), ()),
    "flash_attn_3": (("flash_attn_interface",), ("fa3_fwd_interface",)),
    "flash_attn_4": (("flash_attn.cute.interface",), ()),
}
LEFT_OUT = -3e4  # added to the logits of masked keys: finite in every dtype, and exp of it is 0

aten = torch.ops.aten


class Backend(NamedTuple):
    name: str
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def choose(backend: str | None, q: Tensor, masked: bool, training: bool) -> Backend:
    """Return the backend called `backend`, or the default one for q's device and dtype.

    The default is "cpu" on the CPU. On CUDA it is "efficient" for float32 or with a mask, else "flash", which
    `torch.nn.attention.activate_flash_attention_impl` can turn into FlashAttention 3 or 4. A masked call on CUDA always
    runs "efficient", the only backend there that takes a mask; the backend asked for runs the other calls of a layer.

    Args:
        backend: One of BACKENDS, or None.
        q: The queries.
        masked: Whether the call has a mask.
        training: Whether the backward is needed. Packages that hold only a forward are refused then.
    """
    default = "cpu" if q.device.type == "cpu" else "efficient" if q.dtype == torch.float32 else "flash"
    name = default if backend is None else backend
    if name not in BACKENDS:
        raise ValueError(f"expected a softmax backend of {', '.join(BACKENDS)}, got {backend!r}")
    device = "cpu" if name == "cpu" else "cuda"
    if q.device.type not in (device, "meta"):
        raise ValueError(f"expected tensors on {device} for the softmax backend {name!r}, got {q.device}")
    if q.dtype == torch.float32 and name not in FLOAT32:
        raise ValueError(f"expected float16 or bfloat16 for the softmax backend {name!r}, got float32")
    if name in PACKAGES:
        _module(name, training)
    if masked and device == "cuda":
        name = "efficient"
    return Backend(name, *_FUNCTIONS[name])


def aligned(x: Tensor) -> Tensor:
    """Return x, or a copy if its last stride is not 1 or a row does not start at a multiple of 16 bytes.

    The libraries read 16 bytes at a time, and some do not check that they may.
    """
    fits = x.stride(-1) == 1 and not any(stride % 8 for stride in x.stride()[:-1]) and x.data_ptr() % 16 == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _module(name: str, training: bool):
    """Import the package of a backend."""
    complete, forward_only = PACKAGES[name]
    for module in complete if training else complete + forward_only:
        try:
            return importlib.import_module(module)
        except ImportError as error:
            if not f"{module}.".startswith(f"{error.name}."):  # it is installed, and what it imports is not
                raise ValueError(f"expected {module} for the softmax backend {name!r} to load, got: {error}") from error
    what = "with a backward" if training and forward_only else "installed"
    raise ValueError(f"expected {' or '.join(complete)} {what} for the softmax backend {name!r}, got no such module")


def _rows_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Swap [B, N, H, D], which is what we use, and [B, H, N, D], which is what PyTorch's operators use."""
    return tuple(x.transpose(1, 2) for x in tensors)


def _bias(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor | None:
    """Return the mask as an additive bias, expanded to [B, H, Nq, Nk] without memory for it.

    The "efficient" operator wants rows that start at multiples of 16 values.
    """
    if mask is None:
        return None
    keys = k.shape[1]
    bias = q.new_zeros(mask.shape[0], -(-keys // 16) * 16)[:, :keys]
    bias.masked_fill_(~mask, LEFT_OUT)
    return bias[:, None, None].expand(-1, q.shape[2], q.shape[1], -1)


def _cpu_forward(q, k, v, scale, mask=None):
    settings = {"attn_mask": _bias(q, k, mask), "scale": scale}
    o, lse = aten._scaled_dot_product_flash_attention_for_cpu(*_rows_first(q, k, v), **settings)
    return o.transpose(1, 2), lse


def _cpu_backward(do, q, k, v, o, lse, scale, mask=None):
    settings = {"dropout_p": 0.0, "is_causal": False, "attn_mask": _bias(q, k, mask), "scale": scale}
    do, q_, k_, v_, o = _rows_first(do, q, k, v, o)
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    return _rows_first(*backward(do, q_, k_, v_, o, lse, **settings))


def _no_dropout(like: Tensor) -> dict:
    """Return the settings of no dropout. Its seeds are not read."""
    seed = torch.empty(2, dtype=torch.uint64, device=like.device)
    return {"dropout_p": 0.0, "is_causal": False, "philox_seed": seed, "philox_offset": seed[0]}


def _flash_forward(q, k, v, scale, mask=None):
    o, lse, *_ = aten._scaled_dot_product_flash_attention(*_rows_first(q, k, v), scale=scale)
    return o.transpose(1, 2), lse


def _flash_backward(do, q, k, v, o, lse, scale, mask=None):
    lengths = {"cum_seq_q": None, "cum_seq_k": None, "max_q": q.shape[1], "max_k": k.shape[1]}
    do, q_, k_, v_, o = _rows_first(do, q, k, v, o)
    backward = aten._scaled_dot_product_flash_attention_backward
    return _rows_first(*backward(do, q_, k_, v_, o, lse.contiguous(), **lengths, **_no_dropout(q), scale=scale))


def _cudnn_forward(q, k, v, scale, mask=None):
    # PyTorch keeps one backward graph for each layout of q, k and v, and it expects o and do in q's: hence contiguous
    settings = {"attn_bias": None, "compute_log_sumexp": True, "scale": scale}
    o, lse, *_ = aten._scaled_dot_product_cudnn_attention(*_rows_first(q.contiguous(), k, v), **settings)
    return o.transpose(1, 2), lse.reshape(q.shape[0], q.shape[2], q.shape[1])


@functools.cache
def _cudnn_lse_dims(device: torch.device) -> int:
    """Return 3 where cuDNN's log-sum-exp is [B, H, N] and 4 where it is [B, H, N, 1], which depends on PyTorch's
    version. The backward takes no other shape.
    """
    x = torch.zeros(1, 1, 64, 64, dtype=torch.float16, device=device)
    return aten._scaled_dot_product_cudnn_attention(x, x, x, attn_bias=None, compute_log_sumexp=True)[1].dim()


def _cudnn_backward(do, q, k, v, o, lse, scale, mask=None):
    lengths = {"attn_bias": None, "cum_seq_q": None, "cum_seq_k": None, "max_q": q.shape[1], "max_k": k.shape[1]}
    lse = lse.contiguous().reshape(lse.shape + (1,) * (_cudnn_lse_dims(q.device) - 3))
    do, q_, k_, v_, o = _rows_first(do.contiguous(), q.contiguous(), k, v, o.contiguous())
    backward = aten._scaled_dot_product_cudnn_attention_backward
    return _rows_first(*backward(do, q_, k_, v_, o, lse, **lengths, **_no_dropout(q), scale=scale))


def _efficient_forward(q, k, v, scale, mask=None):
    settings = {"attn_bias": _bias(q, k, mask), "compute_log_sumexp": True, "scale": scale}
    o, lse, *_ = aten._scaled_dot_product_efficient_attention(*_rows_first(q, k, v), **settings)
    return o.transpose(1, 2), lse[..., : q.shape[1]]


def _efficient_backward(do, q, k, v, o, lse, scale, mask=None):
    settings = {"attn_bias": _bias(q, k, mask), "grad_input_mask": [True, True, True, False], "scale": scale}
    if torch.version.hip is None:  # NVIDIA's kernel reads blocks of 32 rows; exp(x - inf) is 0 in the missing ones
        lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=float("inf"))
    do, q_, k_, v_, o = _rows_first(do, q, k, v, o.contiguous())
    backward = aten._scaled_dot_product_efficient_attention_backward
    grads = backward(do, q_, k_, v_, out=o, logsumexp=lse.contiguous(), **_no_dropout(q), **settings)
    return _rows_first(*grads[:3])


def _deterministic() -> dict:
    return {"deterministic": torch.are_deterministic_algorithms_enabled()}


def _flash_attn_forward(name, q, k, v, scale, mask=None):
    module = _module(name, training=False)
    return module.flash_attn_func(q, k, v, softmax_scale=scale, return_attn_probs=True)[:2]


def _flash_attn_2_backward(do, q, k, v, o, lse, scale, mask=None):
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    module = _module("flash_attn_2", training=True)
    module._flash_attn_backward(
        dout=do.contiguous(),
        q=q,
        k=k,
        v=v,
        out=o.contiguous(),
        softmax_lse=lse.contiguous(),
        dq=dq,
        dk=dk,
        dv=dv,
        dropout_p=0.0,
        softmax_scale=scale,
        causal=False,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        **_deterministic(),
    )
    return dq, dk, dv


def _flash_attn_3_backward(do, q, k, v, o, lse, scale, mask=None):
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    module = _module("flash_attn_3", training=True)
    rows = do.contiguous(), q, k, v, o.contiguous(), lse.contiguous()
    packed = (None,) * 6  # cu_seqlens, seqused and max_seqlen, each of q and k
    # by position up to causal, whose name differs between versions
    module._flash_attn_backward(*rows, *packed, dq, dk, dv, scale, False, **_deterministic())
    return dq, dk, dv


def _flash_attn_4_forward(q, k, v, scale, mask=None):
    return _module("flash_attn_4", training=False)._flash_attn_fwd(q, k, v, softmax_scale=scale, return_lse=True)[:2]


def _flash_attn_4_backward(do, q, k, v, o, lse, scale, mask=None):
    module = _module("flash_attn_4", training=True)
    given = {"dout": do.contiguous(), "out": o.contiguous(), "lse": lse.contiguous(), "softmax_scale": scale}
    return module._flash_attn_bwd(q=q, k=k, v=v, **given, **_deterministic())[:3]


_FUNCTIONS = {
    "cpu": (_cpu_forward, _cpu_backward),
    "flash": (_flash_forward, _flash_backward),
    "cudnn": (_cudnn_forward, _cudnn_backward),
    "efficient": (_efficient_forward, _efficient_backward),
    "flash_attn_2": (functools.partial(_flash_attn_forward, "flash_attn_2"), _flash_attn_2_backward),
    "flash_attn_3": (functools.partial(_flash_attn_forward, "flash_attn_3"), _flash_attn_3_backward),
    "flash_attn_4": (_flash_attn_4_forward, _flash_attn_4_backward),
}
