"""Rollouts of the few-step student in training: it samples from noise, without data (DMD2's "backward simulation").

A step jumps to x_0 and adds noise to reach the next timestep, as FewStepScheduler does at inference.
"""

from collections.abc import Callable

import torch

from linvideo.trajectories.conditions import Conditions
from linvideo.trajectories.flow import NUM_TRAIN_TIMESTEPS, like, predict_velocity


def noised(clean: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Return x_t = (1 - t) x_0 + t eps for t [B]."""
    return (1 - like(t, clean)) * clean + like(t, clean) * noise


def jump(model: torch.nn.Module, x: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> torch.Tensor:
    """Return the model's estimate of x_0 from x at t [B], x - t u."""
    return x - like(t, x) * predict_velocity(model, x, NUM_TRAIN_TIMESTEPS * t, conditions)


@torch.no_grad()
def states_at(
    student: torch.nn.Module,
    sigmas: torch.Tensor,
    index: torch.Tensor,
    noise: Callable[[int], torch.Tensor],
    conditions: Conditions,
) -> torch.Tensor:
    """Return the states [B, ...] of the student's sampling before step `index` [B] of each sample.

    All steps but the last are always made, so that all ranks make the same forwards.

    Args:
        student: The few-step student.
        sigmas: [K], the student's t in descending order.
        index: [B], step of each sample.
        noise: Function k -> noise [B, ...]: for k = 0 the noise that sampling starts from, else that added before step
            k.
        conditions: Conditions of the samples.
    """
    x = noise(0)
    chosen = x.clone()
    for step in range(1, len(sigmas)):
        before, after = (sigmas[k].to(x.device).expand(len(x)) for k in (step - 1, step))
        x = noised(jump(student, x, before, conditions), after, noise(step))
        here = (index == step).to(x.device)
        chosen[here] = x[here]
    # else older PyTorch would reuse weights that autocast has cast here, without gradient, in the forward with gradient
    torch.clear_autocast_cache()
    return chosen
