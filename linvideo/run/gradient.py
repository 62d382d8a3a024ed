"""The gradient of a global batch, and the precision it is computed in."""

from collections.abc import Callable

import torch

from linvideo.run.parallel import Ranks
from linvideo.run.run_config import RunConfig
from linvideo.trajectories.conditions import Conditions
from linvideo.trajectories.flow import predict_velocity


def accumulate(
    loss_of: Callable[[int], torch.Tensor], model: torch.nn.Module, config: RunConfig, ranks: Ranks
) -> float:
    """Add the gradient of loss_of(number), averaged over all micro-batches of all ranks, to `model`.

    Returns the mean loss.
    """
    count, total = config.gradient_accumulation_steps, torch.zeros((), device=ranks.device)
    for micro in range(count):
        with autocast(config, ranks.device):
            loss = loss_of(micro)
        # Gradients are averaged over all ranks, but ranks that share a sample each hold only a part of its gradient.
        (loss * ranks.context_size / count).backward()
        total += loss.detach() / count
    ranks.average_gradients(model.parameters())
    return float(ranks.mean(total))


def autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16")


@torch.no_grad()
def teacher_velocity(
    teacher: Callable, x: torch.Tensor, timestep: torch.Tensor, conditions: Conditions
) -> torch.Tensor:
    """Return `predict_velocity` of the teacher in its own dtype, without the student's autocast.

    Its trajectories were made in that dtype, too.
    """
    with torch.autocast(x.device.type, enabled=False):
        return predict_velocity(teacher, x, timestep, conditions)


def mean_square(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x.float() - y.float()).square().mean()


def descend(sample: torch.Tensor, gradient: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return a loss of value `value` whose derivative with respect to `sample` is gradient / sample.numel()."""
    surrogate = (sample * gradient.detach()).mean()
    return surrogate - surrogate.detach() + value.detach()
