"""Velocity error of a student against its teacher, along both of their sampling trajectories.

    error = sum_k (sigma_k - sigma_{k+1}) * mean |u_S(x_k, t_k, c) - u_T(x_k, t_k, c)|^2

on states x_k that the student (own_state_error) or the teacher (teacher_state_error) passes through from the same
noise. The first says how far sampling will drift, the second is what training on teacher states minimises.
"""

from typing import Any

import torch

from linvideo.trajectories.conditions import Conditions
from linvideo.trajectories.flow import predict_velocity, sample_steps


@torch.no_grad()
def trajectory_error(
    mover: torch.nn.Module,
    other: torch.nn.Module,
    noise: torch.Tensor,
    prompt_embeds: torch.Tensor,
    scheduler: Any,
    num_inference_steps: int,
    negative_prompt_embeds: torch.Tensor | None = None,
    guidance_scale: float = 1.0,
    batch_size: int = 16,
) -> tuple[float, torch.Tensor]:
    """The error along `mover`'s sampling trajectories, and its samples (latents like noise, fp32).

    Args:
        noise: [V, C, F, H, W], one start per video.
        prompt_embeds: [V, L, E]. Velocities are compared under these, whatever the guidance.
        scheduler: a diffusers flow-matching scheduler; a copy is used.
        negative_prompt_embeds: [V or 1, L, E], with guidance_scale > 1: the sampler that moves the states is then
        guided.
        batch_size: videos at once.

    Raises:
        ValueError: noise and prompt_embeds do not go together, or guidance without negative_prompt_embeds.
    """
    count = len(noise)
    if len(prompt_embeds) != count:
        raise ValueError(f"expected one prompt embedding per noise, got {len(prompt_embeds)} for {count}")
    if negative_prompt_embeds is not None:
        negative_prompt_embeds = negative_prompt_embeds.expand(count, -1, -1)
    error, samples = 0.0, []
    for part in (slice(start, start + batch_size) for start in range(0, count, batch_size)):
        under = Conditions(prompt_embeds[part])
        negative = None if negative_prompt_embeds is None else Conditions(negative_prompt_embeds[part])
        for step in sample_steps(mover, scheduler, num_inference_steps, noise[part], under, negative, guidance_scale):
            difference = step.u - predict_velocity(other, step.x, step.timestep, under)
            share = len(under) / count
            error += share * (step.sigma - step.sigma_next) * float(difference.square().mean())
        samples.append(step.x_next)
    return error, torch.cat(samples)


def velocity_errors(
    student: torch.nn.Module, teacher: torch.nn.Module, *arguments: Any, **keywords: Any
) -> dict[str, float | torch.Tensor]:
    """Both errors, and the samples made on the way.

    The arguments after the models are those of `trajectory_error`.

    Returns own_state_error, teacher_state_error (floats) and student_samples, teacher_samples.
    """
    result: dict[str, Any] = {}
    for who, mover, other in (("student", student, teacher), ("teacher", teacher, student)):
        error, result[f"{who}_samples"] = trajectory_error(mover, other, *arguments, **keywords)
        result["own_state_error" if who == "student" else "teacher_state_error"] = error
    return result
