"""Sizes of a Wan pipeline, counted on models that are built from its configs on the meta device, without weights."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, WanPipeline, WanTransformer3DModel
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from linvideo.models.branches import kept_whole
from linvideo.models.pipelines import ONLY_WAN
from linvideo.nn import LinearAttentionBranch, WindowAttentionBranch
from linvideo.packaged import packaged
from linvideo.planning.known import HUB, KNOWN
from linvideo.trajectories.collect import TrajectoryConfig, latent_shape
from linvideo.trajectories.images import check_images

EXPECTED = f"one of {', '.join(KNOWN)}, a pipeline folder or a Hub id"
UMT5_XXL = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
UMT5_XXL |= {"feed_forward_proj": "gated-gelu"}
CLIP_H = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
CLIP_H |= {"image_size": 224, "patch_size": 14}
STOCK, IMAGE_TO_VIDEO = "WanTransformer3DModel", "WanImageToVideoPipeline"
MOST_LAYERS = 1000
TEXT_TOKENS = 512  # WanPipeline's padding; a tokenizer with a lower limit gives fewer


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters and other sizes of one pipeline.

    Args:
        name: Name, folder or Hub id that the user gave.
        config: Config of the transformer.
        latents: Shape (C, F, H, W) of the latents of one video.
        tokens: Number of tokens of one video, after patchifying.
        parameters: Parameters of the stock transformer; of each expert if there are two.
        cast: Those parameters that are in Linear and Conv layers, which autocast casts.
        kept: Those parameters that stay in fp32 when the model is loaded in bf16.
        whole: Those parameters that training does not shard.
        block: Parameters of one block.
        block_cast: Parameters of one block that autocast casts.
        block_linears: Shapes (in, out) of the block's Linear layers, by name.
        text_encoder: Parameters of the text encoder.
        text_heads: Attention heads of the text encoder.
        vae: Parameters of the VAE.
        vae_config: Config of the VAE.
        image_encoder: Parameters of the image encoder; 0 without one.
        image_tokens: Tokens that the image encoder makes from an image; 0 without one.
        experts: Number of transformers in the pipeline.
    """

    name: str
    config: SimpleNamespace
    latents: tuple[int, int, int, int]
    tokens: int
    parameters: int
    cast: int
    kept: int
    whole: int
    block: int
    block_cast: int
    block_linears: dict[str, tuple[int, int]]
    text_encoder: int
    text_heads: int
    vae: int
    vae_config: SimpleNamespace
    image_encoder: int
    image_tokens: int
    experts: int

    @property
    def width(self) -> int:
        return self.config.num_attention_heads * self.config.attention_head_dim

    @property
    def condition_channels(self) -> int:
        """Number of channels that an image-to-video model reads next to the latents; 0 for text-to-video."""
        return self.config.in_channels - self.config.out_channels

    def branch(self, feature_map: str, kind: str) -> int:
        """Count the parameters of the branch of one layer of a kind: of the feature map, and r or the gains."""
        if kind == "softmax":
            return 0
        sizes = self.config.num_attention_heads, self.config.attention_head_dim, feature_map
        with torch.device("meta"):
            if kind == "window":
                return _count(WindowAttentionBranch(*sizes))
            return _count(LinearAttentionBranch(*sizes, mixed=kind == "mixed"))


def read_sizes(model: str, video: TrajectoryConfig) -> Sizes:
    """Return the sizes of a known model, a pipeline folder or a Hub id, for videos of the size in `video`.

    Raises:
        ValueError: There is no such pipeline, `linvideo train` does not take it, or the video does not fit it.
    """
    model = packaged(HUB.get(model, model))
    try:
        return _sizes(model, video)
    except ValueError:
        raise
    except Exception as error:  # diffusers trusts what it reads: a damaged config surfaces as anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"expected {EXPECTED}, but cannot build from the configs of {model}: {reason}") from None


def known_name(model: str) -> str | None:
    """Return the name of the published model that this is, or None for any other.

    A name or Hub id is looked up; a pipeline folder is recognized by the shape of its transformers. Nothing is
    downloaded.
    """
    model = packaged(HUB.get(model, model))
    if model in KNOWN:
        return model
    if not Path(model).is_dir():
        return None
    try:
        index = _index(model)
        config = WanTransformer3DModel.load_config(model, subfolder="transformer")
    except Exception:  # diffusers trusts what it reads: a damaged config surfaces as anything
        return None
    two = _kind(index, "transformer_2") is not None
    for name, known in KNOWN.items():
        expected = {"in_channels": 16, "image_dim": None, "added_kv_proj_dim": None} | known
        if name.startswith("wan2.2") == two and expected.items() <= {**dict.fromkeys(expected), **config}.items():
            return name
    return None


def _sizes(model: str, video: TrajectoryConfig) -> Sizes:
    pipeline = _pipeline(model)
    check_images(pipeline, [])  # checks the pipeline alone
    wan, clip = pipeline.transformer, getattr(pipeline, "image_encoder", None)
    latents, patch = latent_shape(pipeline, video), wan.config.patch_size
    keep = set(WanTransformer3DModel._keep_in_fp32_modules)
    return Sizes(
        name=model,
        config=SimpleNamespace(**wan.config),
        latents=latents,
        tokens=latents[1] // patch[0] * (latents[2] // patch[1]) * (latents[3] // patch[2]),
        parameters=_count(wan),
        cast=_cast(wan),
        kept=sum(p.numel() for name, p in wan.named_parameters() if keep & set(name.split("."))),
        whole=sum(p.numel() for p in kept_whole(wan).values()),
        block=_count(wan.blocks[0]),
        block_cast=_cast(wan.blocks[0]),
        block_linears={
            name: (part.in_features, part.out_features)
            for name, part in wan.blocks[0].named_modules()
            if isinstance(part, torch.nn.Linear)
        },
        text_encoder=_count(pipeline.text_encoder),
        text_heads=pipeline.text_encoder.config.num_heads,
        vae=_count(pipeline.vae),
        vae_config=SimpleNamespace(**pipeline.vae.config),
        image_encoder=0 if clip is None else _count(clip),
        image_tokens=0 if clip is None else (clip.config.image_size // clip.config.patch_size) ** 2 + 1,
        experts=1 + (pipeline.transformer_2 is not None),
    )


def _pipeline(model: str) -> DiffusionPipeline:
    """Build the pipeline of a name, folder or Hub id on the meta device; of two experts, one stands for both."""
    known = KNOWN.get(model)
    if known is None:
        index = _index(model)
        transformer = WanTransformer3DModel.load_config(model, subfolder="transformer")
        text = UMT5Config.from_pretrained(model, subfolder="text_encoder")
        decoder = AutoencoderKLWan.load_config(model, subfolder="vae")
        counts = {"transformer": transformer["num_layers"], "text encoder": text.num_layers}
        counts["VAE's residual block"] = decoder.get("num_res_blocks", 1)
        for part, count in counts.items():  # layers take time to build, even without weights
            if not isinstance(count, int) or not 1 <= count <= MOST_LAYERS:
                expected = f"expected 1 to {MOST_LAYERS} layers of the {part}, got {count!r}"
                raise ValueError(f"cannot build from the configs of {model}: {expected}")
    else:
        index = {"_class_name": IMAGE_TO_VIDEO if known.get("in_channels", 16) > 16 else "WanPipeline"}
        index["transformer_2"] = [STOCK, STOCK] if model.startswith("wan2.2") else [None, None]
        transformer, text, decoder = known, UMT5Config(**UMT5_XXL), {}
    images = index.get("_class_name") == IMAGE_TO_VIDEO
    parts = dict.fromkeys(("tokenizer", "scheduler"))
    with torch.device("meta"):
        parts["transformer"] = WanTransformer3DModel.from_config(transformer)
        parts["transformer_2"] = None if _kind(index, "transformer_2") is None else parts["transformer"]
        parts["text_encoder"], parts["vae"] = UMT5EncoderModel(text), AutoencoderKLWan.from_config(decoder)
        if images and parts["transformer"].config.image_dim is not None:
            clip = (
                CLIPVisionConfig.from_pretrained(model, subfolder="image_encoder")
                if known is None
                else CLIPVisionConfig(**CLIP_H)
            )
            parts["image_encoder"] = CLIPVisionModel(clip)
    # taken from diffusers only when needed: importing an image-to-video pipeline warns about torchvision
    kind = diffusers.WanImageToVideoPipeline if images else WanPipeline
    return kind(**parts, expand_timesteps=index.get("expand_timesteps", False))


def _index(model: str) -> dict[str, Any]:
    """Return the pipeline's model_index.json."""
    if not Path(model).is_dir() and (model.count("/") != 1 or model.startswith((".", "/", "~"))):
        raise ValueError(f"model must be {EXPECTED}, got {model!r}")
    index = DiffusionPipeline.load_config(model)
    kinds = {part: _kind(index, part) for part in ("transformer", "transformer_2")}
    if kinds["transformer"] != STOCK or kinds["transformer_2"] not in (None, STOCK):
        raise ValueError(f"expected a pipeline of stock {STOCK}s, got {model} with {kinds}; {ONLY_WAN}")
    return index


def _kind(index: dict[str, Any], part: str) -> str | None:
    """Return the class name of a part, or None if the pipeline does not have it."""
    return (index.get(part) or [None, None])[1]


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _cast(module: torch.nn.Module) -> int:
    return sum(_count(part) for part in module.modules() if isinstance(part, torch.nn.Linear | torch.nn.Conv3d))
