"""How the ops are defined in torch.library and connected to autograd and to the transforms of torch.func.

CUDA tensors always run the Triton kernels of `linvideo_kernels`. CPU tensors run `chunked`, or the same kernels in
Triton's interpreter if the environment has TRITON_INTERPRET=1. torch.compile does not look into an operator. An
operator cannot return None, so an empty tensor stands for it.

The operators are defined and connected to autograd by hand: `torch.library.custom_op` and its `register_autograd` serve
any operator, but take more of the host's time than the kernels' launches (`python -m benchmarks.host`), and they know
no forward-mode derivative. Compiled graphs in a user's cache refer to operators by name, so an operator whose arguments
or results change, or whose gradient calls another operator, needs a new name.
"""

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from linvideo.ops.over_heads import over_heads


def uses_kernels(x: Tensor) -> bool:
    return x.device.type == "cuda" or (x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")


LIBRARY = torch.library.Library("linvideo", "FRAGMENT")
# What parts of PyTorch have to know about the operators. Importing these parts takes long, so it is left to the user.
REGISTRATIONS = {"torch.distributed.tensor": "linvideo.ops.dtensor", "torch.utils.flop_counter": "linvideo.ops.flops"}


def register() -> None:
    """Register the operators with the parts of PyTorch in REGISTRATIONS that are in use."""
    for part, registration in REGISTRATIONS.items():
        if part in sys.modules and registration not in sys.modules:
            importlib.import_module(registration)


_functions: dict[torch._ops.OpOverload, Callable] = {}  # what each operator computes
_differentiable: dict[torch._ops.OpOverload, Callable] = {}  # the same for calls that need a gradient


def operator(name: str) -> Callable[[Callable], torch._ops.OpOverload]:
    """Define linvideo::<name> as the decorated function, on every device. Dynamo does not look inside."""

    def define(function: Callable) -> torch._ops.OpOverload:
        schema = torch.library.infer_schema(function, mutates_args=())
        LIBRARY.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
        LIBRARY.impl(name, torch._disable_dynamo(function), "CompositeExplicitAutograd")
        op = getattr(torch.ops.linvideo, name).default
        _functions[op] = function
        return op

    return define


def dispatch(op: torch._ops.OpOverload, *inputs):
    """Call an operator; for ordinary CPU tensors without the dispatcher, which takes as long as hundreds of rows."""
    if not _is_ordinary(inputs):
        return op(*inputs)
    return _differentiable[op](*inputs) if needs_gradient(inputs) else _functions[op](*inputs)


PLAIN = (Tensor, torch.nn.Parameter)


def _is_ordinary(inputs: tuple) -> bool:
    """Return whether the inputs are CPU tensors that only autograd watches: no transform, mode, tracer or profiler.

    The tensors that a backward has saved may still be wrapped by a transform that has ended.
    """
    return (
        not torch.compiler.is_compiling()
        and inputs[0].is_cpu
        and forward_ad._current_level < 0
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()  # such as a default device
        and not torch._C._are_functorch_transforms_active()
        and not torch.jit.is_tracing()
        and not torch.autograd._profiler_enabled()
        and not any(isinstance(x, Tensor) and (type(x) not in PLAIN or _is_wrapped(x)) for x in inputs)
    )


def _is_wrapped(x: Tensor) -> bool:
    """Return whether x is a tensor of torch.func, or of torch.autograd.grad(is_grads_batched=True)."""
    return torch._C._functorch.is_functorch_wrapped_tensor(x) or torch._C._functorch.is_legacy_batchedtensor(x)


def _in_forward_mode(inputs: tuple) -> bool:
    """Return whether inputs may have tangents. Only the tensors tell when torch.compile traces, without the level."""
    if forward_ad._current_level >= 0:
        return True
    return bool(torch._C._len_torch_dispatch_stack()) and any(
        isinstance(x, Tensor) and torch._VF._unpack_dual(x, level=0)[1] is not None for x in inputs
    )


def needs_gradient(inputs: Iterable) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)


def fake(op: torch._ops.OpOverload) -> Callable:
    """Decorate the function that gives the shapes of an operator's results."""
    return torch.library.register_fake(op.name(), lib=LIBRARY)


def differentiate(op: torch._ops.OpOverload, function: Callable, transformed: Callable | None = None) -> None:
    """Have calls that need a derivative run `function`, which applies a torch.autograd.Function around the operator.

    Args:
        op: The operator.
        function: Function that takes the place of a call that needs a gradient.
        transformed: The same inside of a transform of torch.func or at a level of forward-mode AD, if it is not
            `function`. The dispatch key of torch.func precedes all others, so that `Function.apply` sees the tensors as
            the transforms have wrapped them.
    """
    transformed = transformed or function

    def call(*inputs):
        register()  # for torch.compile, which traces what a call from Python does before it
        if _in_forward_mode(inputs):
            return transformed(*inputs)
        if needs_gradient(inputs):
            return function(*inputs)
        return below_autograd(op, *inputs)

    _differentiable[op] = function
    LIBRARY.impl(op.name(), torch._disable_dynamo(call), "Autograd")
    LIBRARY.impl(op.name(), torch._disable_dynamo(transformed), "FuncTorchDynamicLayerFrontMode")


def applied(function: type[torch.autograd.Function]) -> Callable:
    """Return function.apply, without what that does for keyword arguments outside of transforms.

    It binds the arguments to the signature of `forward` there, which takes longer than launching a kernel.
    """
    fast = super(torch.autograd.Function, function).apply

    def apply(*inputs):
        return function.apply(*inputs) if torch._C._are_functorch_transforms_active() else fast(*inputs)

    return apply


def below_autograd(op: torch._ops.OpOverload, *inputs):
    if _is_ordinary(inputs):
        return _functions[op](*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*inputs)


def differentiate_never(op: torch._ops.OpOverload, heads: tuple, result_heads: tuple) -> None:
    """Have every derivative of an operator raise RuntimeError: it computes a derivative itself.

    Args:
        op: The operator.
        heads, result_heads: Arguments of `over_heads`.
    """

    @over_heads(heads, result_heads)
    class Derivative(torch.autograd.Function):
        @staticmethod
        def forward(*inputs):
            return below_autograd(op, *inputs)

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, *grads):
            raise RuntimeError(
                "linear_attn and window_attn are differentiable once: their gradients and tangents have no derivative"
            )

        jvp = backward

    differentiate(op, applied(Derivative))


def without_autocast(x: Tensor):
    """Return a context in which x's device computes in the dtypes of its tensors: sums stay in fp32."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


def keep(ctx, *saved: Tensor | None) -> None:
    """Save tensors for both derivatives; gradients and tangents that do not exist reach them as None."""
    ctx.save_for_backward(*saved)
    ctx.save_for_forward(*saved)
    ctx.set_materialize_grads(False)


def tensors(like: Tensor, *outputs: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(torch.empty(0, dtype=like.dtype, device=like.device) if x is None else x for x in outputs)


def given(grad: Tensor, x: Tensor | None) -> Tensor | None:
    return None if x is None else grad


def like_input(grad: Tensor | None, x: Tensor | None) -> Tensor | None:
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
