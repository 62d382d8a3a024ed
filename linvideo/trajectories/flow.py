"""Rectified flow as Wan uses it: x_t = (1 - t) x_0 + t eps with t = 1 noise, t = 0 data; the model predicts eps - x_0.

A model timestep is 1000 t; an Euler step from t to t' is x + (t' - t) u; the one-step estimate of x_0 is x - t u. The
score is s_t(x) = -(x + (1 - t) u) / t, because E[eps | x_t] = x_t + (1 - t) u.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from linvideo.trajectories.conditions import Conditions

NUM_TRAIN_TIMESTEPS = 1000


def predict_velocity(
    model: torch.nn.Module, x: torch.Tensor, timestep: torch.Tensor, conditions: Conditions
) -> torch.Tensor:
    """Return the velocity u of `model` at x [B, C, F, H, W] under B conditions, in fp32 and in the shape of x.

    timestep: Timestep (1000 t), [B] or scalar.
    """
    inputs = conditions.model_inputs(x, model.dtype)
    # with context parallelism, the output hook accepts only a tuple
    u = model(**inputs, timestep=timestep.expand(x.shape[0]), return_dict=False)[0]
    return u.float()


def guide(u_cond: torch.Tensor, u_negative: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    """Apply classifier-free guidance to velocities, in WanPipeline's form: u_neg + w (u_cond - u_neg)."""
    return u_negative + guidance_scale * (u_cond - u_negative)


def score_from_velocity(x: torch.Tensor, u: torch.Tensor, t: torch.Tensor | float) -> torch.Tensor:
    """s_t(x) = -(x + (1 - t) u) / t; t broadcasts against x."""
    return -(x + (1 - t) * u) / t


def like(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Reshape [B] to [B, 1, 1, ...] on the device of x, to broadcast against x."""
    return values.to(x.device).view(-1, *[1] * (x.dim() - 1))


@dataclass(frozen=True)
class LowNoise:
    """The model and the guidance scale that a sampler of Wan 2.2 uses at timesteps below `boundary_timestep`."""

    model: torch.nn.Module
    boundary_timestep: float
    guidance_scale: float


@dataclass
class SamplerStep:
    """One step of a sampler: the state, the model's velocity there, and the next state.

    Args:
        index: Number of the step, from 0.
        timestep: Timestep that the model was given, a scalar.
        sigma: The t of this step, in [0, 1].
        sigma_next: The t of the next step.
        x: State at `timestep` [B, C, F, H, W], fp32.
        u: Velocity there under the prompt, fp32.
        u_negative: Velocity there under the negative prompt; None without guidance.
        x_next: State after the step.
    """

    index: int
    timestep: torch.Tensor
    sigma: float
    sigma_next: float
    x: torch.Tensor
    u: torch.Tensor
    u_negative: torch.Tensor | None
    x_next: torch.Tensor


def sampler_grid(scheduler, num_inference_steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the timesteps [n] and sigmas [n + 1] of a scheduler; the last sigma is where sampling ends.

    Raises:
        ValueError: The scheduler makes more than one model call per step, or is not a flow-matching scheduler.
    """
    scheduler = fresh_scheduler(scheduler, num_inference_steps)
    timesteps, sigmas = scheduler.timesteps.float().cpu(), scheduler.sigmas.float().cpu()
    if len(timesteps) != num_inference_steps or len(sigmas) != num_inference_steps + 1:
        raise ValueError(
            f"the scheduler must make one model call per step: for {num_inference_steps} steps,"
            f" {type(scheduler).__name__} has {len(timesteps)} timesteps and {len(sigmas)} sigmas"
        )
    if not (float(sigmas.max()) <= 1.0 and bool((sigmas.diff() < 0).all())):
        raise ValueError(
            f"expected a flow-matching scheduler with decreasing sigmas up to 1, got {type(scheduler).__name__} "
            f"with sigmas from {float(sigmas[0]):.3g} to {float(sigmas[-1]):.3g}"
        )
    return timesteps, sigmas


def fresh_scheduler(scheduler, num_inference_steps: int, device: torch.device | str | None = None):
    """Return a copy of `scheduler`, set to its first step. Multistep schedulers remember the batch they work on."""
    if not hasattr(scheduler, "set_begin_index"):
        raise ValueError(f"expected a flow-matching scheduler, got {type(scheduler).__name__}")
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(num_inference_steps, device=device)
    scheduler.set_begin_index(0)
    return scheduler


@torch.no_grad()
def sample_steps(
    model: torch.nn.Module,
    scheduler,
    num_inference_steps: int,
    noise: torch.Tensor,
    conditions: Conditions,
    negative_conditions: Conditions | None = None,
    guidance_scale: float = 1.0,
    low_noise: LowNoise | None = None,
) -> Iterator[SamplerStep]:
    """Run the sampler of WanPipeline and yield every step; `x_next` of the last step is the sample.

    Args:
        noise: Start at sigma = 1, [B, C, F, H, W].
        conditions, negative_conditions: B conditions each. The second are needed if guidance_scale > 1.
        low_noise: Model that replaces `model` below a boundary, with a guidance scale of its own. Whether there is
            guidance at all depends on guidance_scale alone, as in WanPipeline.
    """
    if guidance_scale > 1 and negative_conditions is None:
        raise ValueError(f"guidance_scale {guidance_scale} needs conditions of the negative prompt, got none")
    scheduler = fresh_scheduler(scheduler, num_inference_steps, noise.device)
    x, scale = noise.float(), guidance_scale
    for index, timestep in enumerate(scheduler.timesteps):
        if low_noise is not None and timestep < low_noise.boundary_timestep:
            model, scale = low_noise.model, low_noise.guidance_scale
        u = moved = predict_velocity(model, x, timestep, conditions)
        u_negative = None
        if guidance_scale > 1:
            u_negative = predict_velocity(model, x, timestep, negative_conditions)
            moved = guide(u, u_negative, scale)
        x_next = scheduler.step(moved, timestep, x, return_dict=False)[0].float()
        sigma, sigma_next = (float(s) for s in scheduler.sigmas[index : index + 2])
        yield SamplerStep(index, timestep, sigma, sigma_next, x, u, u_negative, x_next)
        x = x_next
