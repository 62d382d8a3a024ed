"""Generating videos with a pipeline of any family, including the small embedded Wan model of the demo."""

import inspect
import logging
import math

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX, ChronoEditPipeline

from linvideo.models.attention import video_transformers
from linvideo.models.few_step import own_settings


def generate_video(
    pipeline, prompt: str | list[str] | None, num_frames: int | None = None, output_type: str = "np", **kwargs
):
    """Generate videos with a pipeline.

    Args:
        pipeline: Diffusers video pipeline, stock or converted.
        prompt: Caption, or a list of captions; None if `prompt_embeds` is given.
        num_frames: Number of frames. None is the pipeline's default. A number of frames, or a size, that the pipeline
            would round is refused.
        output_type: Type of the result, as for the pipeline: "np" for floats in [0, 1] of shape [F, height, width, 3],
            "pt", "pil" or "latent".
        kwargs: Other arguments of the pipeline, such as height and width (in pixels), num_inference_steps,
            guidance_scale, negative_prompt, generator, latents and prompt_embeds. A distilled pipeline runs with its
            own number of steps and without guidance, which is in its weights.

    Returns:
        One video if `prompt` is a string, otherwise all videos.

    Raises:
        ValueError: num_frames is not 1 plus a multiple of the VAE's temporal compression; height or width is not a
            multiple of 16 and of what the VAE and the patches need; the pipeline has no such argument; the video is not
            finite; or a distilled pipeline is called with guidance or with another number of steps.
    """
    arguments = inspect.signature(pipeline.__call__).parameters
    if not any(argument.kind is argument.VAR_KEYWORD for argument in arguments.values()):
        if unknown := sorted(set(kwargs) - set(arguments)):
            raise ValueError(f"{type(pipeline).__name__} takes no {' and no '.join(unknown)}")
    if isinstance(pipeline, ChronoEditPipeline) and not kwargs.get("enable_temporal_reasoning"):
        if num_frames not in (None, 5):
            raise ValueError(f"num_frames must be 5 for ChronoEdit without enable_temporal_reasoning, got {num_frames}")
        num_frames = 5
    if num_frames is None and "num_frames" in arguments:
        num_frames = arguments["num_frames"].default
    names = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio")
    temporal = next(getattr(pipeline, name) for name in names if hasattr(pipeline, name))
    if isinstance(pipeline.vae, AutoencoderKLCogVideoX):
        temporal *= 2  # it decodes pairs of latent frames; an even number of them gives a longer video
    if num_frames is not None and (num_frames < 1 or (num_frames - 1) % temporal):
        raise ValueError(f"num_frames must be 1 plus a multiple of {temporal} for this VAE, got {num_frames}")
    for side, step in zip(("height", "width"), _steps(pipeline), strict=True):
        if side in kwargs and (kwargs[side] % step or kwargs[side] < step):
            raise ValueError(f"{side} must be a positive multiple of {step}, got {kwargs[side]}")
    for name, value in kwargs.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
    for name, value in own_settings(pipeline).items():
        if kwargs.setdefault(name, value) != value:
            raise ValueError(f"{name} of this distilled model must be {value}, got {kwargs[name]}")
    if kwargs.get("num_inference_steps", 1) < 1:
        raise ValueError(f"num_inference_steps must be at least 1, got {kwargs['num_inference_steps']}")
    if temporal == 1 and num_frames is not None:
        # WanPipeline rounds to 1 plus a multiple of the factor; for a factor of 1 that adds a frame, with a warning.
        num_frames -= 1
        logging.getLogger(type(pipeline).__module__).setLevel(logging.ERROR)
    if num_frames is not None:
        kwargs["num_frames"] = num_frames
    if "max_sequence_length" in arguments:
        kwargs["max_sequence_length"] = min(
            arguments["max_sequence_length"].default, pipeline.tokenizer.model_max_length
        )
    with torch.no_grad():
        videos = pipeline(prompt=prompt, output_type=output_type, **kwargs).frames
    if isinstance(videos, torch.Tensor | np.ndarray) and not (finite := torch.as_tensor(videos).isfinite()).all():
        raise ValueError(
            f"the sampled video is not finite ({(~finite).sum():,} of {finite.numel():,} values): check the weights for"
            f" NaN, or use a dtype with more range than {pipeline.dtype}"
        )
    return videos[0] if isinstance(prompt, str) else videos


def _steps(pipeline) -> list[int]:
    """Return the numbers that height and width must be multiples of: of 16, and of a patch of latents."""
    patch = next(iter(video_transformers(pipeline).values())).config.patch_size
    names = ("vae_scale_factor_spatial", "vae_spatial_compression_ratio")
    spatial = next(getattr(pipeline, name) for name in names if hasattr(pipeline, name))
    return [
        math.lcm(16, spatial * side) for side in (patch[-2:] if isinstance(patch, list | tuple) else (patch, patch))
    ]
