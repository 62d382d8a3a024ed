"""The student's own sampling in training: its few steps from noise, without any data ("backward simulation" of DMD2).

A step jumps to x_0 and noises it again to the next timestep, as FewStepScheduler does at inference.
"""

from collections.abc import Callable

import torch

from linvideo.trajectories.conditions import Conditions
from linvideo.trajectories.flow import NUM_TRAIN_TIMESTEPS, like, predict_velocity


def noised(clean: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """x_t = (1 - t) x_0 + t eps; t [B]."""
    return (1 - like(t, clean)) * clean + like(t, clean) * noise


def jump(model: torch.nn.Module, x: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> torch.Tensor:
    """The model's x_0 from x at t [B]: x - t u."""
    return x - like(t, x) * predict_velocity(model, x, NUM_TRAIN_TIMESTEPS * t, conditions)


@torch.no_grad()
def states_at(
    student: torch.nn.Module,
    sigmas: torch.Tensor,
    index: torch.Tensor,
    noise: Callable[[int], torch.Tensor],
    conditions: Conditions,
) -> torch.Tensor:
    """The state [B, ...] that the student's sampling is in before step `index` [B] of each sample.

    Every step but the last is made whatever the indices are, so that all ranks make the same forwards.

    Args:
        sigmas: [K], the student's t, falling.
        noise: number -> [B, ...]: 0 is what sampling starts from, k what comes in before step k.
    """
    x = noise(0)
    chosen = x.clone()
    for step in range(1, len(sigmas)):
        before, after = (sigmas[k].to(x.device).expand(len(x)) for k in (step - 1, step))
        x = noised(jump(student, x, before, conditions), after, noise(step))
        here = (index == step).to(x.device)
        chosen[here] = x[here]
    # older PyTorch would take weights that autocast has cast in here for those of the forward with gradient
    torch.clear_autocast_cache()
    return chosen
