"""Videos of a model in training: sampling their latents, and decoding them."""

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
    """Latents [B, C, F, H, W] as the trajectories are sampled; None when `stop` said so after a step.

    models: has `transformer` and, with two experts, `transformer_2`. request: of the trajectory store.
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
    """The frames of one video's latents [1, C, F, H, W], as PIL images; the VAE comes to the latents' device for it.

    Warns where they are not finite: such pixels are drawn black, and the metrics of such a video mean nothing.
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
    """The video [1, 3, frames, height, width] in [-1, 1] of latents [1, C, F, H, W], in the VAE's dtype."""
    mean, std = (
        torch.tensor(vae.config[name], device=latents.device).view(1, -1, 1, 1, 1)
        for name in ("latents_mean", "latents_std")
    )
    with on_device(latents.device, vae):
        return vae.decode((latents * std + mean).to(vae.dtype), return_dict=False)[0]
