"""Wan and the models built from its blocks: one processor for Wan 2.1 and 2.2, VACE, SkyReels-V2 and ChronoEdit."""

import torch
from diffusers import (
    ChronoEditTransformer3DModel,
    DiffusionPipeline,
    SkyReelsV2Transformer3DModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)
from diffusers.models.transformers import transformer_chronoedit, transformer_skyreels_v2
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from linvideo.models.attention import attend
from linvideo.models.mixin import LinearAttentionMixin, tokens_of_grid
from linvideo.ops.reference import rotate


class LinVideoWanAttnProcessor(WanAttnProcessor):
    """Self-attention of a Wan block, of the type `attn.attention_type`. It has no weights of its own.

    Cross-attention is left to diffusers, so `model.set_attn_processor(LinVideoWanAttnProcessor())` restores a model
    whose processors have been replaced. With any other processor every layer runs as softmax; its linear weights are
    kept.

    Raises:
        ValueError: A layer that is not softmax is called with an attention mask.
    """

    _attention_backend = None  # diffusers writes both attributes (set_attention_backend, enable_parallelism)
    _parallel_config = None

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        if encoder_hidden_states is not None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        attention_type = getattr(attn, "attention_type", "softmax")
        if attention_type != "softmax" and attention_mask is not None:
            raise ValueError(f"a {attention_type} attention layer takes no attention mask, got one")

        query, key, value = _qkv(attn, hidden_states)
        rope = None if rotary_emb is None else _tables(*rotary_emb)
        if attention_type in ("linear", "window"):  # the op rotates q and k itself
            out = attend(self, attn, query, key, value, rope=rope)
        else:
            if rope is not None:
                query, key = rotate(query, *rope), rotate(key, *rope)
            query, key = query.type_as(value), key.type_as(value)
            out = attend(self, attn, query, key, value, attention_mask=attention_mask)

        out = out.flatten(2, 3).type_as(value)
        for layer in attn.to_out:  # projection, dropout
            out = layer(out)
        return out


def _qkv(attn: torch.nn.Module, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return normalised q, normalised k, and v, each [B, N, H, D], of states [B, N, H*D]."""
    if attn.fused_projections:
        query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
    else:
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
    # Wan normalises over all heads at once, before the split.
    query, key = attn.norm_q(query), attn.norm_k(key)
    return tuple(x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))


def _tables(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Convert diffusers' tables [1, N, 1, D], which repeat each entry for a pair of channels, to [N, D/2]."""
    return cos[0, :, 0, 0::2].contiguous(), sin[0, :, 0, 0::2].contiguous()  # one copy here instead of one per kernel


class LinVideoWanTransformer3DModel(LinearAttentionMixin, WanTransformer3DModel):
    """Wan 2.1 and 2.2, text or image to video."""

    attention_paths = (("blocks", "attn1"),)
    processor_class = LinVideoWanAttnProcessor
    tokens_per_frame = tokens_of_grid
    stock_processors = (WanAttnProcessor,)

    @classmethod
    def fps(cls, pipeline: DiffusionPipeline) -> int:
        return 24 if pipeline.config.get("expand_timesteps") else 16  # Wan 2.2 TI2V 5B, all others


class LinVideoWanVACETransformer3DModel(LinearAttentionMixin, WanVACETransformer3DModel):
    """Wan VACE. The layers of the control blocks are numbered after the main ones."""

    attention_paths = (("blocks", "attn1"), ("vace_blocks", "attn1"))
    processor_class = LinVideoWanAttnProcessor
    tokens_per_frame = tokens_of_grid
    stock_processors = (WanAttnProcessor,)


class LinVideoSkyReelsV2Transformer3DModel(LinearAttentionMixin, SkyReelsV2Transformer3DModel):
    """SkyReels-V2 with full attention."""

    attention_paths = (("blocks", "attn1"),)
    processor_class = LinVideoWanAttnProcessor
    tokens_per_frame = tokens_of_grid
    stock_processors = (transformer_skyreels_v2.SkyReelsV2AttnProcessor,)

    @classmethod
    def fps(cls, pipeline: DiffusionPipeline) -> int:
        return 24

    @classmethod
    def check_convertible(cls, model: SkyReelsV2Transformer3DModel) -> None:
        """Raise ValueError for a model with a block-causal mask, which has no linear form."""
        if model.config.num_frame_per_block > 1:
            raise ValueError(
                "expected a SkyReels-V2 model with full attention, got num_frame_per_block"
                f" {model.config.num_frame_per_block}: its block-causal mask has no linear form"
            )


class LinVideoChronoEditTransformer3DModel(LinearAttentionMixin, ChronoEditTransformer3DModel):
    """ChronoEdit."""

    attention_paths = (("blocks", "attn1"),)
    processor_class = LinVideoWanAttnProcessor
    tokens_per_frame = tokens_of_grid
    stock_processors = (transformer_chronoedit.WanAttnProcessor,)
