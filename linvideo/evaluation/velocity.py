"""The velocity error of a student against its teacher, along the sampling trajectories of both.

    error = sum_k (sigma_k - sigma_{k+1}) * mean |u_S(x_k, t_k, c) - u_T(x_k, t_k, c)|^2

on states x_k through which the student (own_state_error) or the teacher (teacher_state_error) passes from the same
noise. The first tells how far sampling will drift; the second is what training on the teacher's states minimizes.
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
    """Return the error along the sampling trajectories of `mover`, and its samples (fp32 latents in the noise's shape).

    Args:
        mover: Model that samples.
        other: Model with which it is compared on the way.
        noise: Start of each video [V, C, F, H, W].
        prompt_embeds: Prompts [V, L, E]. Velocities are compared under these, with or without guidance.
        scheduler: Flow-matching scheduler of diffusers; a copy is used.
        num_inference_steps: Number of sampling steps.
        negative_prompt_embeds: Negative prompts [V or 1, L, E], for a guidance_scale above 1.
        guidance_scale: Guidance scale of the sampler that moves the states.
        batch_size: Number of videos sampled at once.

    Raises:
        ValueError: The numbers of noises and prompts differ, or guidance lacks negative_prompt_embeds.
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
    """Return both errors (own_state_error, teacher_state_error) and the samples made on the way (student_samples,
    teacher_samples). The arguments after the models are those of `trajectory_error`."""
    result: dict[str, Any] = {}
    for who, mover, other in (("student", student, teacher), ("teacher", teacher, student)):
        error, result[f"{who}_samples"] = trajectory_error(mover, other, *arguments, **keywords)
        result["own_state_error" if who == "student" else "teacher_state_error"] = error
    return result
