"""Validation: what is made of the student every so many steps, and how a pipeline makes it."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from linvideo.models.generate import generate_video


@dataclass
class ValidationConfig:
    """Videos of the student during selection and fine-tuning, compared with the teacher's from the same noise.

    Sizes and guidance are those of the trajectories; in fine-tuning with use_ema it is the averaged weights that are
    validated. The result of a run does not depend on it, nothing is drawn that training would draw.

    Args:
        steps: validate each so many steps of the whole run, and at the end of both stages; 0 is never.
        prompts: of the videos, in turn; None is the first captions of the run.
        num_videos: made each time, one after another.
        num_inference_steps: of the sampler; None is that of the trajectories.
        fps: of the mp4 files.
        seed: of the noise, which is the same each time.
    """

    steps: int = 0
    prompts: list[str] | None = None
    num_videos: int = 4
    num_inference_steps: int | None = None
    fps: int = 16
    seed: int = 0

    def __post_init__(self):
        if self.steps < 0:
            raise ValueError(f"validation.steps must not be negative, got {self.steps}")
        if self.prompts is not None and not self.prompts:
            raise ValueError("validation.prompts must hold at least one prompt, got none")
        for name in ("num_videos", "num_inference_steps", "fps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"validation.{name} must be at least 1, got {value}")


def sample(pipeline: Any, stop: Callable[[], bool] = lambda: False, **settings: Any) -> torch.Tensor | None:
    """Latents [B, C, F, H, W] by the pipeline's own sampler; None when `stop` said so after one of its steps.

    settings: latents, prompt_embeds and negative_prompt_embeds, height, width, num_frames, ... of the pipeline's call.
    The pipeline is as it was afterwards, and its text encoder and VAE may be on any device.
    """
    sampler = copy.copy(pipeline)
    # without the other models the transformer alone says on which device to sample
    sampler.text_encoder = sampler.vae = None
    sampler.scheduler = copy.deepcopy(pipeline.scheduler)
    sampler.set_progress_bar_config(disable=True)

    def after_step(running: Any, *_: Any) -> dict:
        running._interrupt = stop()  # how diffusers' pipelines are asked to end
        return {}

    latents = generate_video(sampler, None, output_type="latent", callback_on_step_end=after_step, **settings)
    return None if sampler.interrupt else latents


@torch.no_grad()
def decode(pipeline: Any, latents: torch.Tensor) -> list:
    """The frames of one video's latents [1, C, F, H, W], as PIL images; the VAE comes to the latents' device for it."""
    vae, home = pipeline.vae, pipeline.vae.device
    mean, std = (
        torch.tensor(vae.config[name], device=latents.device).view(1, -1, 1, 1, 1)
        for name in ("latents_mean", "latents_std")
    )
    vae.to(latents.device)
    try:
        video = vae.decode((latents * std + mean).to(vae.dtype), return_dict=False)[0]
    finally:
        vae.to(home)
    return pipeline.video_processor.postprocess_video(video.float(), output_type="pil")[0]
