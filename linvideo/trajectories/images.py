"""Image-to-video: what the pipeline's own VAE and image encoder make of the prompts' images, computed once.

An image becomes the channels next to the latents (a mask of given frames, and the latents of a video that is grey after
the first frame) and, for Wan 2.1, embeddings by CLIP. The negative prompt goes with the same image.
"""

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import load_image
from PIL import Image

from linvideo.trajectories.atomic_files import read_cached, write_cached
from linvideo.trajectories.collect import TrajectoryConfig, latent_shape
from linvideo.trajectories.devices import on_device
from linvideo.trajectories.fingerprint import fingerprint
from linvideo.trajectories.prompts import PromptEmbeddings


def takes_images(pipeline) -> bool:
    return type(pipeline).__name__ == "WanImageToVideoPipeline"  # its import warns of torchvision


def check_images(pipeline, images: Sequence[str | Path | Image.Image | None]) -> None:
    """Whether training takes this pipeline with these images, one for each prompt; [] asks about the pipeline alone.

    Raises:
        ValueError: a text-to-video pipeline with an image, an image-to-video one without some, or another kind.
    """
    config, missing = pipeline.transformer.config, sum(image is None for image in images)
    if not takes_images(pipeline):
        if config.in_channels != config.out_channels:
            raise ValueError(
                "expected a text-to-video model or a WanImageToVideoPipeline, got a"
                f" {type(pipeline).__name__} with {config.in_channels} channels for latents of {config.out_channels}"
            )
        if missing < len(images):
            raise ValueError(
                f"prompts of a text-to-video model must have no image, got {len(images) - missing} of"
                f" {len(images)} with one"
            )
        return
    if pipeline.config.expand_timesteps:
        raise ValueError(
            "expected an image-to-video model that takes the image in channels of its own, got one that takes it in"
            " place of the first frame (expand_timesteps, Wan 2.2 TI2V), which training does not support"
        )
    expected = config.out_channels + pipeline.vae_scale_factor_temporal + pipeline.vae.config.z_dim
    if config.in_channels != expected:
        raise ValueError(
            f"expected an image-to-video model with {expected} channels (latents, mask and image), got one with"
            f" {config.in_channels}"
        )
    if config.pos_embed_seq_len is not None:
        raise ValueError(
            "expected an image-to-video model for a first frame, got one for a first and a last frame, which training"
            " does not support"
        )
    if missing:
        raise ValueError(
            f"every prompt of an image-to-video model needs an image, {missing} of {len(images)} have none"
            ' (prompts.prompts_file: a .jsonl with "caption" and "image" in each line)'
        )


def digest(image: str | Path | Image.Image) -> str:
    """32 hex digits of the image's size and pixels.

    Raises:
        ValueError: as `read_image`.
    """
    image = read_image(image)
    return hashlib.blake2b(repr(image.size).encode() + image.tobytes(), digest_size=16).hexdigest()


def add_images(
    prompts: PromptEmbeddings,
    pipeline: DiffusionPipeline,
    images: Sequence[str | Path | Image.Image | None],
    video: TrajectoryConfig,
    cache: str | Path | None = None,
    device: torch.device | None = None,
) -> None:
    """Give the prompts what `encode_images` makes of their images; nothing where the pipeline takes none."""
    if takes_images(pipeline):
        prompts.latents, prompts.image_embeds = encode_images(pipeline, images, video, cache, device)


def encode_images(
    pipeline: DiffusionPipeline,
    images: Sequence[str | Path | Image.Image],
    video: TrajectoryConfig,
    cache: str | Path | None = None,
    device: torch.device | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(latents [P, C, F, H, W], image_embeds [P, N, D] or None) of Conditions, on the CPU in the transformer's dtype.

    Read from the file `cache` when it holds exactly these, else written there.

    Args:
        images: in memory or files; each is resized to the size of `video`, as by the pipeline.
        device: where VAE and image encoder are meanwhile; None is where they are.

    Raises:
        ValueError: a file that is no image (see `read_image`), or a size that does not fit the pipeline.
    """
    latent_shape(pipeline, video)
    embeds = pipeline.transformer.config.image_dim is not None
    size = (video.height, video.width, video.num_frames)
    models = [fingerprint(pipeline.vae)] + ([fingerprint(pipeline.image_encoder)] if embeds else [])
    request = repr((size, models, str(pipeline.transformer.dtype), [digest(image) for image in images]))
    key = hashlib.blake2b(request.encode(), digest_size=16).hexdigest()
    if cache is not None and (found := read_cached(cache, key)) is not None:
        return found["latents"], found.get("image_embeds")

    # one at a time: opened, they may be large
    with on_device(device, pipeline.vae, pipeline.image_encoder):
        parts = [_encode(pipeline, image, *size, embeds) for image in map(read_image, images)]
    result = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if cache is not None:
        write_cached(cache, result, key)
    return result["latents"], result.get("image_embeds")


@torch.no_grad()
def _encode(pipeline, image: Image.Image, height: int, width: int, num_frames: int, embeds: bool) -> dict:
    device, dtype = pipeline.vae.device, pipeline.transformer.dtype
    pixels = pipeline.video_processor.preprocess(image, height=height, width=width).to(device, torch.float32)
    channels, unused = pipeline.vae.config.z_dim, torch.zeros((), device=device)  # in place of noise
    video = (height, width, num_frames, torch.float32, device)
    result = {"latents": pipeline.prepare_latents(pixels, 1, channels, *video, latents=unused)[1]}
    if embeds:
        result["image_embeds"] = pipeline.encode_image(image, device)
    return {name: value.to("cpu", dtype) for name, value in result.items()}


def read_image(image: str | Path | Image.Image) -> Image.Image:
    """An RGB image; of a file, upright as its EXIF orientation says, as diffusers' load_image reads it. An image in
    memory is taken as it is, as pipelines take it.

    Raises:
        ValueError: no such file, or one that is no image, is damaged, or has more than 178 million pixels.
    """
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if not Path(image).is_file():  # opening a pipe would wait for ever
        raise ValueError(f"cannot read the image {image}: there is no such file")
    try:
        with (
            warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning),
            Image.open(image) as file,
        ):
            return load_image(file)
    except Exception as error:  # Pillow's readers raise almost anything when a file is damaged
        raise ValueError(f"cannot read the image {image}: {error}") from None
