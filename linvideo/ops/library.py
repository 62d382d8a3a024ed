"""How the ops are defined in torch.library and connected to autograd and to the transforms of torch.func.

CUDA tensors always run the Triton kernels of `linvideo_kernels`. CPU tensors run `chunked`, or the same kernels in
Triton's interpreter if the environment has TRITON_INTERPRET=1. torch.compile does not look into an operator. An
operator cannot return None, so an empty tensor stands for it.

The operators are defined and connected to autograd by hand: `torch.library.custom_op` and its `register_autograd` serve
any operator, but take more of the host's time than the kernels' launches (`python -m benchmarks.host`), and they know
no forward-mode derivative. Compiled graphs in a user's cache refer to operators by name, so an operator whose arguments
or results change, or whose gradient calls another operator, needs a new name.
"""

import importlib
import os
import sys
from collections.abc import Callable

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
        if forward_ad._current_level >= 0:
            return transformed(*inputs)
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            return function(*inputs)
        return below_autograd(op, *inputs)

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
