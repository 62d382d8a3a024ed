"""torch.vmap of the operators: the samples become more heads.

Heads are independent of each other and have weights of their own, so samples may share their weights or each have their
own, and each gets its own gradient of them. Arguments without heads, such as a mask, must be shared; otherwise the
samples are computed one at a time.
"""

from collections.abc import Callable

import torch
from torch import Tensor

SUMMED = "summed"  # in place of the axis of an argument whose gradient is a sum over heads


def over_heads(axes: tuple[int | str | None, ...], result_axes: tuple[int | None, ...]) -> Callable[[type], type]:
    """Give a torch.autograd.Function, whose methods don't depend on the number of heads, its rule for torch.vmap.

    Args:
        axes: Axis of the heads in each of the first arguments; None or SUMMED for tensors without heads. The arguments
            after these are no tensors.
        result_axes: Axis of the heads in each result; there may be fewer results.
    """

    def decorate(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
        def vmap(info, in_dims, *inputs):
            size, tensors = info.batch_size, list(zip(inputs, in_dims, axes, strict=False))
            if not size:  # one sample tells the shapes of none
                sample = [x if dim is None else x.new_zeros(x.movedim(dim, 0).shape[1:]) for x, dim, _ in tensors]
                results = function.apply(*sample, *inputs[len(axes) :])
                return tuple(x.new_empty(0, *x.shape) for x in results), (0,) * len(results)
            if any(_alone(x, dim, axis) for x, dim, axis in tensors):
                samples = ([x if dim is None else x.select(dim, i) for x, dim, _ in tensors] for i in range(size))
                results = [function.apply(*sample, *inputs[len(axes) :]) for sample in samples]
                return tuple(torch.stack(result) for result in zip(*results, strict=True)), (0,) * len(results[0])
            folded = [x if axis is None or x is None else _folded(x, dim, axis, size) for x, dim, axis in tensors]
            results = function.apply(*folded, *inputs[len(axes) :])
            dims = [None if _absent(x) else axis for x, axis in zip(results, result_axes, strict=False)]
            unfolded = [
                x if dim is None else x.unflatten(dim, (size, -1)) for x, dim in zip(results, dims, strict=True)
            ]
            return tuple(unfolded), tuple(dims)

        function.vmap = staticmethod(vmap)
        return function

    return decorate


def _alone(x: Tensor | None, dim: int | None, axis: int | str | None) -> bool:
    return x is not None and (axis == SUMMED or (axis is None and dim is not None))


def _folded(x: Tensor, dim: int | None, axis: int, size: int) -> Tensor:
    """Return x with the samples next to its heads, as one axis."""
    if _absent(x):
        return x
    x = x.unsqueeze(axis).expand(*x.shape[:axis], size, *x.shape[axis:]) if dim is None else x.movedim(dim, axis)
    return x.flatten(axis, axis + 1)


def _absent(x: Tensor) -> bool:
    """Return whether x is the empty tensor that stands for no result."""
    return x.dim() == 1 and not x.numel()
