"""The op's two halves in torch.library: four operators that torch.compile does not look into, connected to autograd.

They are `linvideo::linear_attn_state` and `linvideo::linear_attn_apply_v2`, each with its `_backward`. CUDA tensors
always run the Triton kernels of `linvideo_kernels`. CPU tensors run `chunked`, or the same kernels in Triton's
interpreter if the environment has TRITON_INTERPRET=1. An operator cannot return None, so an empty tensor stands for it.

The operators are defined and connected to autograd by hand: `torch.library.custom_op` and its `register_autograd` serve
any operator, but take more of the host's time than the kernels' launches (`python -m benchmarks.host`). Compiled graphs
in a user's cache refer to operators by name, so an operator whose arguments or results change needs a new name.
"""

import os
from collections.abc import Callable

import torch
from torch import Tensor

from linvideo.ops import chunked
from linvideo.ops.reference import WEIGHTED_MAPS


def uses_kernels(x: Tensor) -> bool:
    return x.device.type == "cuda" or (x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")


LIBRARY = torch.library.Library("linvideo", "FRAGMENT")


def operator(name: str) -> Callable[[Callable], torch._ops.OpOverload]:
    """Define linvideo::<name> as the decorated function, on every device. Dynamo does not look inside."""

    def define(function: Callable) -> torch._ops.OpOverload:
        schema = torch.library.infer_schema(function, mutates_args=())
        LIBRARY.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
        LIBRARY.impl(name, torch._disable_dynamo(function), "CompositeExplicitAutograd")
        return getattr(torch.ops.linvideo, name).default

    return define


def fake(op: torch._ops.OpOverload) -> Callable:
    """Decorate the function that gives the shapes of an operator's results."""
    return torch.library.register_fake(op.name(), lib=LIBRARY)


def differentiate(op: torch._ops.OpOverload, function: Callable) -> None:
    """Have calls that need a gradient run `function`, which applies a torch.autograd.Function around the operator."""

    def call(*inputs):
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            return function(*inputs)
        return below_autograd(op, *inputs)

    LIBRARY.impl(op.name(), torch._disable_dynamo(call), "Autograd")


def below_autograd(op: torch._ops.OpOverload, *inputs):
    with torch._C._AutoDispatchBelowAutograd():
        return op(*inputs)


class _Once(torch.autograd.Function):
    """Identity whose backward raises: it marks gradients that cannot be differentiated again."""

    @staticmethod
    def forward(ctx, *grads):
        return grads

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError("linear_attn and window_attn are differentiable once: their gradients have no gradient")


def once(op: torch._ops.OpOverload, *inputs) -> tuple[Tensor | None, ...]:
    """Run the operator of a backward; differentiating its results raises RuntimeError."""
    if not torch.is_grad_enabled():  # enabled in a backward only by create_graph=True
        return op(*inputs)
    with torch.no_grad():
        grads = op(*inputs)
    return _Once.apply(*(grad.requires_grad_() for grad in grads))


@operator("linear_attn_state")
def state_op(
    k: Tensor,
    v: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    feature_map: str,
    precision: str,
    save_rotated: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return S and z in fp32 and, if `save_rotated`, the rotated k for the backward."""
    if not uses_kernels(k):
        with torch.autocast(k.device.type, enabled=False):  # k's dtype is decided; sums stay in fp32
            return *chunked.state(k, v, weight, key_mask, cu_seqlens, feature_map), k.new_empty(0)
    rope = None if cos is None else (cos, sin)
    options = {"key_mask": key_mask, "cu_seqlens": cu_seqlens, "feature_map": feature_map, "precision": precision}
    return tensors(k, *kernels(k).state(k, v, weight, rope, **options, training=save_rotated))


@operator("linear_attn_state_backward")
def state_backward_op(
    dstate: Tensor,
    dz: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    state: Tensor,
    z: Tensor,
    feature_map: str,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dk, dv and dweight. k is the k that the forward has rotated."""
    if not uses_kernels(k):
        with torch.autocast(k.device.type, enabled=False):
            grads = chunked.state_backward(dstate, dz, k, v, weight, key_mask, cu_seqlens, feature_map)
    else:
        rope = None if cos is None else (cos, sin)
        options = {"key_mask": key_mask, "cu_seqlens": cu_seqlens, "feature_map": feature_map, "precision": precision}
        grads = kernels(k).state_backward(dstate, dz, k, v, weight, rope, state=state, z=z, **options)
    return tensors(k, *grads[:2], _like(grads[2], weight))


@operator("linear_attn_apply_v2")
def apply_op(
    q: Tensor,
    state: Tensor,
    z: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    softmax_out: Tensor | None,
    r: Tensor | None,
    cu_seqlens: Tensor | None,
    feature_map: str,
    scale: float,
    normalize: bool,
    eps: float,
    precision: str,
    save_rotated: bool,
    return_normalizer: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return o, den if `return_normalizer`, and the rotated q for the backward if `save_rotated`."""
    options = {"cu_seqlens": cu_seqlens, "feature_map": feature_map, "scale": scale, "normalize": normalize, "eps": eps}
    if not uses_kernels(q):
        with torch.autocast(q.device.type, enabled=False):
            o, den = chunked.apply(q, state, z, weight, **options, return_normalizer=return_normalizer)
        return tensors(q, o, den, None)
    rope = None if cos is None else (cos, sin)
    options |= {"softmax_out": softmax_out, "r": r, "precision": precision, "training": save_rotated}
    o, den, rotated, *_ = kernels(q).apply(
        q, state, z, weight, rope, **options, return_normalizer=return_normalizer
    )  # fmt: skip
    return tensors(q, o, den, rotated)


@operator("linear_attn_apply_v2_backward")
def apply_backward_op(
    do: Tensor,
    den_grad: Tensor | None,
    q: Tensor,
    state: Tensor,
    z: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    softmax_out: Tensor | None,
    r: Tensor | None,
    cu_seqlens: Tensor | None,
    feature_map: str,
    scale: float,
    normalize: bool,
    eps: float,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return dq, dstate, dz, dweight, dsoftmax_out and dr. q is the q that the forward has rotated."""
    options = {"cu_seqlens": cu_seqlens, "feature_map": feature_map, "scale": scale, "normalize": normalize, "eps": eps}
    if not uses_kernels(q):
        with torch.autocast(q.device.type, enabled=False):
            grads = *chunked.apply_backward(do, q, state, z, weight, **options, den_grad=den_grad), None, None
    else:
        rope = None if cos is None else (cos, sin)
        options |= {"softmax_out": softmax_out, "r": r, "precision": precision}
        prepared = kernels(q).prepare(state.contiguous(), z.contiguous(), q.dtype, normalize)
        grads = kernels(q).apply_backward(do, q, z, weight, rope, prepared=prepared, **options, den_grad=den_grad)
    return tensors(q, *grads[:3], _like(grads[3], weight), grads[4], _like(grads[5], r))


@fake(state_op)
def _(k, v, weight, cos, sin, key_mask, cu_seqlens, feature_map, precision, save_rotated):
    batch, _, heads, dim = k.shape
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    features = 2 * dim if feature_map in WEIGHTED_MAPS else dim
    state = k.new_empty(sequences, heads, features, dim, dtype=torch.float32)
    z = k.new_empty(sequences, heads, features, dtype=torch.float32)
    return state, z, k.new_empty(k.shape if save_rotated else 0)


@fake(state_backward_op)
def _(dstate, dz, k, v, weight, cos, sin, key_mask, cu_seqlens, state, z, feature_map, precision):
    return k.new_empty(k.shape), v.new_empty(v.shape), new(k, weight)


@fake(apply_op)
def _(q, state, z, weight, cos, sin, softmax_out, r, cu_seqlens, *settings):
    save_rotated, return_normalizer = settings[-2:]
    batch, length, heads, _ = q.shape
    den = q.new_empty((batch, heads, length) if return_normalizer else 0, dtype=torch.float32)
    return q.new_empty(q.shape), den, q.new_empty(q.shape if save_rotated else 0)


@fake(apply_backward_op)
def _(do, den_grad, q, state, z, weight, cos, sin, softmax_out, r, cu_seqlens, *settings):
    return q.new_empty(q.shape), new(q, state), new(q, z), new(q, weight), new(q, softmax_out), new(q, r)


class _State(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        k, v, weight, cos, sin, key_mask, cu_seqlens, feature_map, precision, save_rotated = inputs
        state, z, rotated = below_autograd(state_op, *inputs)
        k = rotated if save_rotated else k
        ctx.save_for_backward(k, v, weight, cos, sin, key_mask, cu_seqlens, state, z)
        ctx.settings = feature_map, precision
        ctx.set_materialize_grads(False)
        return state, z, rotated

    @staticmethod
    def backward(ctx, dstate, dz, _drotated):
        if dstate is None and dz is None:
            return (None,) * 10
        saved = ctx.saved_tensors  # read only once: under activation checkpointing a second read raises
        state, z = saved[-2:]
        dstate = torch.zeros_like(state) if dstate is None else dstate
        dz = torch.zeros_like(z) if dz is None else dz
        dk, dv, dweight = once(state_backward_op, dstate, dz, *saved, *ctx.settings)
        return dk, dv, given(dweight, saved[2]), *(None,) * 7


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        q, *tensors = inputs[:9]
        *ctx.settings, save_rotated, return_normalizer = inputs[9:]
        o, den, rotated = below_autograd(apply_op, *inputs)
        ctx.save_for_backward(rotated if save_rotated else q, *tensors)
        ctx.set_materialize_grads(False)
        if not return_normalizer:
            ctx.mark_non_differentiable(den)
        return o, den, rotated

    @staticmethod
    def backward(ctx, do, den_grad, _drotated):
        if do is None and den_grad is None:
            return (None,) * 16
        saved = ctx.saved_tensors
        do = torch.zeros_like(saved[0]) if do is None else do
        dq, dstate, dz, dweight, dsoftmax, dr = once(apply_backward_op, do, den_grad, *saved, *ctx.settings)
        mixed = given(dsoftmax, saved[6]), given(dr, saved[7])
        return dq, dstate, dz, given(dweight, saved[3]), None, None, *mixed, *(None,) * 8


differentiate(state_op, _State.apply)
differentiate(apply_op, _Apply.apply)


def tensors(like: Tensor, *outputs: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(torch.empty(0, dtype=like.dtype, device=like.device) if x is None else x for x in outputs)


def given(grad: Tensor, x: Tensor | None) -> Tensor | None:
    return None if x is None else grad


def _like(grad: Tensor | None, x: Tensor | None) -> Tensor | None:
    return None if x is None else grad.to(x.dtype).view(x.shape)


def new(like: Tensor, x: Tensor | None) -> Tensor:
    return like.new_empty(0) if x is None else x.new_empty(x.shape)


def check_interpreted(x: Tensor) -> None:
    """Refuse bfloat16 on the CPU, where Triton's interpreter runs the kernels: its tl.dot multiplies bit patterns."""
    if x.device.type == "cpu" and x.dtype == torch.bfloat16:
        raise ValueError(
            "expected float32 or float16 under TRITON_INTERPRET=1, got bfloat16, which Triton's interpreter gets wrong"
        )


def kernels(x: Tensor):
    check_interpreted(x)
    try:
        from linvideo_kernels import linear_attn
    except ImportError as error:
        raise RuntimeError("linear_attn on CUDA tensors needs Triton: pip install triton") from error
    return linear_attn
