"""Sampling and decoding videos of a model in training."""

import warnings
from collections.abc import Callable
from typing import Any

import torch

from linvideo.trajectories.conditions import Conditions
from linvideo.trajectories.devices import on_device
from linvideo.trajectories.experts import low_noise_sampler
from linvideo.trajectories.flow import sample_steps


def sample(
    models: Any,
    scheduler: Any,
    request: dict[str, Any],
    num_inference_steps: int,
    noise: torch.Tensor,
    conditions: Conditions,
    negative_conditions: Conditions,
    stop: Callable[[], bool] = lambda: False,
) -> torch.Tensor | None:
    """Sample latents [B, C, F, H, W] the way the trajectories are sampled.

    Args:
        models: Object with the attribute `transformer` and, for two experts, `transformer_2`.
        scheduler: Scheduler of the sampler.
        request: Request of the trajectory store, which has the guidance scales and the boundary of the experts.
        num_inference_steps: Number of sampler steps.
        noise: Noise to start from.
        conditions: Conditions of the prompts.
        negative_conditions: Conditions of the negative prompt, for guidance.
        stop: Function that is asked after each step whether to stop.

    Returns the latents, or None if `stop` returned True.
    """
    low_noise = low_noise_sampler(models, request)
    conditions = (conditions, negative_conditions)
    arguments = (scheduler, num_inference_steps, noise, *conditions, request["guidance_scale"], low_noise)
    sampled = None
    for step in sample_steps(models.transformer, *arguments):
        if stop():
            return None
        sampled = step.x_next
    return sampled


@torch.no_grad()
def decode(pipeline: Any, latents: torch.Tensor) -> list:
    """Decode the latents of one video [1, C, F, H, W] to PIL images. Moves the VAE to their device meanwhile.

    Non-finite pixels are drawn black, with a warning, because the metrics of such a video mean nothing.
    """
    video = decode_latents(pipeline.vae, latents)
    if not (finite := video.isfinite()).all():
        warnings.warn(
            f"a validation video is not finite ({(~finite).sum():,} of {finite.numel():,} values): its metrics mean"
            " nothing; look at the losses, or use a dtype with more range",
            stacklevel=2,
        )
        video = video.where(finite, -1.0)
    return pipeline.video_processor.postprocess_video(video.float(), output_type="pil")[0]


@torch.no_grad()
def decode_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Decode latents [1, C, F, H, W] to a video [1, 3, frames, height, width] in [-1, 1], in the VAE's dtype."""
    mean, std = (
        torch.tensor(vae.config[name], device=latents.device).view(1, -1, 1, 1, 1)
        for name in ("latents_mean", "latents_std")
    )
    with on_device(latents.device, vae):
        return vae.decode((latents * std + mean).to(vae.dtype), return_dict=False)[0]
