"""Sums over the ranks of a process group, and exchanges between them, for autograd and torch.compile."""

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


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return funcol.wait_tensor(funcol.all_to_all_single(x, None, None, group))

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return funcol.wait_tensor(funcol.all_to_all_single(grad.contiguous(), None, None, ctx.group)), None


def gather_tokens(x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """Exchange heads for tokens: return all tokens of this rank's heads, [S, B, N, H / ranks, D].

    Args:
        x: This rank's tokens with all heads, [S, B, N / ranks, H, D].
        group: Ranks, in the order of their tokens.
    """
    heads = x.unflatten(3, (group.size(), -1)).movedim(3, 0)  # one slice per rank that receives it
    return _AllToAll.apply(heads.contiguous(), group).movedim(0, 2).flatten(2, 3)


def gather_heads(x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """Undo `gather_tokens`."""
    tokens = x.unflatten(2, (group.size(), -1)).movedim(2, 0)
    return _AllToAll.apply(tokens.contiguous(), group).movedim(0, 3).flatten(3, 4)
