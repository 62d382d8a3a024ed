"""Image-to-video: the outputs of the pipeline's own VAE and image encoder for the prompts' images, computed once.

An image becomes channels next to the latents (a mask of given frames, and the latents of a video that is grey after
the first frame) and, for Wan 2.1, CLIP embeddings. The negative prompt is used with the same image.
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
    # compares names, because importing the class warns about torchvision
    return type(pipeline).__name__ == "WanImageToVideoPipeline"


def check_images(pipeline, images: Sequence[str | Path | Image.Image | None]) -> None:
    """Check that training supports this pipeline with these images, one for each prompt; [] checks the pipeline alone.

    Raises:
        ValueError: A text-to-video pipeline gets an image, an image-to-video pipeline lacks one, or the pipeline is of
            another kind.
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
                f"prompts of a text-to-video model must not have images, but {len(images) - missing} of"
                f" {len(images)} have one"
            )
        return
    if pipeline.config.expand_timesteps:
        raise ValueError(
            "expected an image-to-video model that reads the image from separate channels, got one that reads it in"
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
            f"every prompt of an image-to-video model needs an image, but {missing} of {len(images)} have none"
            ' (prompts.prompts_file: a .jsonl with "caption" and "image" in each line)'
        )


def digest(image: str | Path | Image.Image) -> str:
    """Return 32 hex digits that identify the image's size and pixels.

    Raises:
        ValueError: The image cannot be read: see `read_image`.
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
    """Add the encoded images (see `encode_images`) to the prompts, if the pipeline takes images."""
    if takes_images(pipeline):
        prompts.latents, prompts.image_embeds = encode_images(pipeline, images, video, cache, device)


def encode_images(
    pipeline: DiffusionPipeline,
    images: Sequence[str | Path | Image.Image],
    video: TrajectoryConfig,
    cache: str | Path | None = None,
    device: torch.device | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the latents [P, C, F, H, W] and image_embeds [P, N, D] (or None) of Conditions, on the CPU, in the
    transformer's dtype.

    They are read from the file `cache` if it holds exactly these, otherwise computed and written there.

    Args:
        images: Images in memory, or image files. Each is resized to the size of `video` in the pipeline's way.
        device: Device for VAE and image encoder while they work. None leaves them where they are.

    Raises:
        ValueError: A file is not an image (see `read_image`), or the size does not fit the pipeline.
    """
    latent_shape(pipeline, video)
    embeds = pipeline.transformer.config.image_dim is not None
    size = (video.height, video.width, video.num_frames)
    models = [fingerprint(pipeline.vae)] + ([fingerprint(pipeline.image_encoder)] if embeds else [])
    request = repr((size, models, str(pipeline.transformer.dtype), [digest(image) for image in images]))
    key = hashlib.blake2b(request.encode(), digest_size=16).hexdigest()
    if cache is not None and (found := read_cached(cache, key)) is not None:
        return found["latents"], found.get("image_embeds")

    # one at a time, because open images may be large
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
    channels, unused = pipeline.vae.config.z_dim, torch.zeros((), device=device)  # stands in for the noise
    video = (height, width, num_frames, torch.float32, device)
    result = {"latents": pipeline.prepare_latents(pixels, 1, channels, *video, latents=unused)[1]}
    if embeds:
        result["image_embeds"] = pipeline.encode_image(image, device)
    return {name: value.to("cpu", dtype) for name, value in result.items()}


def read_image(image: str | Path | Image.Image) -> Image.Image:
    """Return an RGB image.

    A file is read by diffusers' load_image, which rotates it according to its EXIF orientation. An image in memory is
    not rotated, because pipelines do not rotate it either.

    Raises:
        ValueError: There is no such file, or it is not an image, is damaged, or has more than 178 million pixels.
    """
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if not Path(image).is_file():  # opening a named pipe would wait forever
        raise ValueError(f"cannot read the image {image}: there is no such file")
    try:
        with (
            warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning),
            Image.open(image) as file,
        ):
            return load_image(file)
    except Exception as error:  # Pillow's readers raise almost anything when a file is damaged
        raise ValueError(f"cannot read the image {image}: {error}") from None
