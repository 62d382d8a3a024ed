"""Sums over the ranks of a process group that work with autograd and torch.compile."""

import torch
import torch.distributed._functional_collectives as funcol
from torch.distributed import ProcessGroup


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return funcol.wait_tensor(funcol.all_reduce(x, "sum", group))

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        # every rank's loss depends on the sum, so the gradients of all ranks add up
        return funcol.wait_tensor(funcol.all_reduce(grad.contiguous(), "sum", ctx.group)), None


def all_reduce_sum(x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """Return the sum of x over the ranks. Its gradient is the sum of the ranks' gradients."""
    return _AllReduce.apply(x.contiguous(), group)
