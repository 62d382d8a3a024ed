"""What a Wan pipeline weighs: counted on models built from its configs on the meta device, no weights are read."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from linvideo.models.pipelines import ONLY_WAN
from linvideo.nn import LinearAttentionBranch
from linvideo.planning.known import HUB, KNOWN
from linvideo.training.branches import kept_whole
from linvideo.training.trajectories import TrajectoryConfig, latent_shape

EXPECTED = f"one of {', '.join(KNOWN)}, a pipeline folder or a Hub id"
UMT5_XXL = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
UMT5_XXL |= {"feed_forward_proj": "gated-gelu"}
TEXT_TOKENS = 512  # WanPipeline's padding; a tokenizer with a lower limit gives fewer


@dataclass(frozen=True)
class Sizes:
    """One pipeline in numbers of parameters, with the transformer's config and the latents' shape.

    Args:
        name: as it was asked for. latents: (C, F, H, W) of one video. tokens: of one video, after patchifying.
        parameters: of the stock transformer; with two experts, of each.
        cast: those of them in Linear and Conv layers, which autocast casts.
        kept: those that stay fp32 when the model is loaded as bf16. whole: those that training does not shard.
        block, block_cast: `parameters` and `cast` of one block. block_linears: name -> (in, out) of its Linear layers.
        text_encoder, vae: of these. experts: transformers in the pipeline.
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
    vae: int
    experts: int = 1

    @property
    def width(self) -> int:
        return self.config.num_attention_heads * self.config.attention_head_dim

    def branch(self, feature_map: str, mixed: bool = True) -> int:
        """Parameters of one layer's linear branch: the feature map's and, when mixed, r."""
        with torch.device("meta"):
            heads, dim = self.config.num_attention_heads, self.config.attention_head_dim
            return _count(LinearAttentionBranch(heads, dim, feature_map, mixed=mixed))


def read_sizes(model: str, video: TrajectoryConfig) -> Sizes:
    """Sizes of a known name, a pipeline folder or a Hub id, for videos of `video`'s size.

    Raises:
        ValueError: no such pipeline, one that `linvideo train` does not take, or a video that does not fit it.
    """
    model = HUB.get(model, model)
    known = KNOWN.get(model)
    try:
        two = model == "wan2.2-a14b"
        configs = _configs(model) if known is None else (known, UMT5Config(**UMT5_XXL), {}, 1 + two)
        with torch.device("meta"):
            wan, decoder = WanTransformer3DModel.from_config(configs[0]), AutoencoderKLWan.from_config(configs[2])
            encoder = UMT5EncoderModel(configs[1])
    except (OSError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        # diffusers trusts what it reads: a damaged config surfaces as any of these
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"expected {EXPECTED}, cannot build from the configs of {model}: {reason}") from None
    if wan.config.in_channels != wan.config.out_channels:
        raise ValueError(f"expected a text-to-video model, got {model} with image conditions beside the latents")
    pipeline = SimpleNamespace(transformer=wan)
    pipeline.vae_scale_factor_temporal = decoder.config.scale_factor_temporal
    pipeline.vae_scale_factor_spatial = decoder.config.scale_factor_spatial
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
        text_encoder=_count(encoder),
        vae=_count(decoder),
        experts=configs[3],
    )


def _configs(model: str) -> tuple[dict, UMT5Config, dict, int]:
    """Those of transformer, text encoder and VAE, and how many transformers there are."""
    if not Path(model).is_dir() and (model.count("/") != 1 or model.startswith((".", "/", "~"))):
        raise ValueError(f"model must be {EXPECTED}, got {model!r}")
    index = DiffusionPipeline.load_config(model)
    kinds = {part: (index.get(part) or [None, None])[1] for part in ("transformer", "transformer_2")}
    stock = "WanTransformer3DModel"
    if kinds["transformer"] != stock or kinds["transformer_2"] not in (None, stock):
        raise ValueError(f"expected a pipeline of stock {stock}s, got {model} with {kinds}; {ONLY_WAN}")
    transformer = WanTransformer3DModel.load_config(model, subfolder="transformer")
    text_encoder = UMT5Config.from_pretrained(model, subfolder="text_encoder")
    decoder = AutoencoderKLWan.load_config(model, subfolder="vae")
    return transformer, text_encoder, decoder, 1 + (kinds["transformer_2"] is not None)


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _cast(module: torch.nn.Module) -> int:
    return sum(_count(part) for part in module.modules() if isinstance(part, torch.nn.Linear | torch.nn.Conv3d))
