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
    """u of `model` at x [B, C, F, H, W], timestep [B] or scalar (= 1000 t), under B conditions; fp32, x's shape."""
    inputs = conditions.model_inputs(x, model.dtype)
    # with context parallelism the output hook takes a tuple only
    u = model(**inputs, timestep=timestep.expand(x.shape[0]), return_dict=False)[0]
    return u.float()


def guide(u_cond: torch.Tensor, u_negative: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    """Classifier-free guidance on velocities, WanPipeline's form: u_neg + w (u_cond - u_neg)."""
    return u_negative + guidance_scale * (u_cond - u_negative)


def score_from_velocity(x: torch.Tensor, u: torch.Tensor, t: torch.Tensor | float) -> torch.Tensor:
    """s_t(x) = -(x + (1 - t) u) / t; t broadcasts against x."""
    return -(x + (1 - t) * u) / t


def like(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[B] -> [B, 1, 1, ...] on x's device, to broadcast against x."""
    return values.to(x.device).view(-1, *[1] * (x.dim() - 1))


@dataclass(frozen=True)
class LowNoise:
    """What a sampler of Wan 2.2 uses at timesteps below `boundary_timestep`."""

    model: torch.nn.Module
    boundary_timestep: float
    guidance_scale: float


@dataclass
class SamplerStep:
    """One step of a sampler: where it was, what the model said there, where it went."""

    index: int
    timestep: torch.Tensor  # scalar, what the model was given
    sigma: float  # t of this step, in [0, 1]
    sigma_next: float
    x: torch.Tensor  # [B, C, F, H, W] fp32, the state at `timestep`
    u: torch.Tensor  # conditional velocity there, fp32
    u_negative: torch.Tensor | None  # under the negative prompt; None when guidance is off
    x_next: torch.Tensor


def sampler_grid(scheduler, num_inference_steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(timesteps [n], sigmas [n + 1]) of a copy of `scheduler`; the last sigma is where sampling ends.

    Raises:
        ValueError: a scheduler that takes more than one model call a step, or that is no flow-matching scheduler.
    """
    scheduler = fresh_scheduler(scheduler, num_inference_steps)
    timesteps, sigmas = scheduler.timesteps.float().cpu(), scheduler.sigmas.float().cpu()
    if len(timesteps) != num_inference_steps or len(sigmas) != num_inference_steps + 1:
        raise ValueError(
            f"the scheduler must make one model call a step: asked for {num_inference_steps} steps, "
            f"{type(scheduler).__name__} gives {len(timesteps)} timesteps and {len(sigmas)} sigmas"
        )
    if not (float(sigmas.max()) <= 1.0 and bool((sigmas.diff() < 0).all())):
        raise ValueError(
            f"expected a flow-matching scheduler with sigmas falling from at most 1, got {type(scheduler).__name__} "
            f"with sigmas from {float(sigmas[0]):.3g} to {float(sigmas[-1]):.3g}"
        )
    return timesteps, sigmas


def fresh_scheduler(scheduler, num_inference_steps: int, device: torch.device | str | None = None):
    """A copy of `scheduler`, set to its first step: multistep schedulers remember the batch they are used on."""
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
    """Run the sampler WanPipeline would run and yield every step; the last step's `x_next` is the sample.

    Args:
        noise: [B, C, F, H, W], the start at sigma = 1.
        conditions, negative_conditions: B each; the second is used, and needed, when guidance_scale > 1.
        low_noise: takes over from `model` and its guidance_scale; steps are guided when the first scale says so.
    """
    if guidance_scale > 1 and negative_conditions is None:
        raise ValueError(f"guidance_scale {guidance_scale} needs conditions of the negative prompt, got None")
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
