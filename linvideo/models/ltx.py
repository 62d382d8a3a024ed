"""LTX-Video: text enters through cross-attention; RoPE rotates q and k before they are split into heads."""

from typing import Any

import torch
from diffusers import DiffusionPipeline, LTXVideoTransformer3DModel
from diffusers.models.transformers.transformer_ltx import LTXVideoAttnProcessor, apply_rotary_emb

from linvideo.models.attention import attend, context_group
from linvideo.models.mixin import LinearAttentionMixin


class LinVideoLTXAttnProcessor(LTXVideoAttnProcessor):
    """Self-attention of an LTX block, of the type `attn.attention_type`. It has no weights of its own.

    Cross-attention is left to diffusers.

    Raises:
        ValueError: A layer that is not softmax is called with an attention mask.
    """

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        attention_type = getattr(attn, "attention_type", "softmax")
        if encoder_hidden_states is not None or (attention_type == "softmax" and attention_mask is not None):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        if attention_mask is not None:
            raise ValueError(f"a {attention_type} attention layer takes no attention mask, got one")

        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        if image_rotary_emb is not None:
            query, key = apply_rotary_emb(query, image_rotary_emb), apply_rotary_emb(key, image_rotary_emb)
        value = attn.to_v(hidden_states)
        query, key = query.type_as(value), key.type_as(value)
        out = attend(self, attn, *(x.unflatten(2, (attn.heads, -1)) for x in (query, key, value)))

        out = out.flatten(2, 3).type_as(value)
        for layer in attn.to_out:  # projection, dropout
            out = layer(out)
        return out


class LinVideoLTXVideoTransformer3DModel(LinearAttentionMixin, LTXVideoTransformer3DModel):
    """LTX-Video."""

    attention_paths = (("transformer_blocks", "attn1"),)
    processor_class = LinVideoLTXAttnProcessor
    stock_processors = (LTXVideoAttnProcessor,)

    @classmethod
    def fps(cls, pipeline: DiffusionPipeline) -> int:
        return 25

    def tokens_per_frame(self, inputs: dict[str, Any]) -> int:
        """Return height x width: the latents come as packed tokens, with their grid as arguments.

        Raises:
            ValueError: The grid is missing, or the latents hold other tokens than this grid, such as LTX's conditions.
        """
        grid = [inputs.get(name) for name in ("num_frames", "height", "width")]
        if None in grid:
            raise ValueError(f"expected num_frames, height and width in a model with window layers, got {grid}")
        frames, height, width = grid
        group = context_group(self.transformer_blocks[0].attn1.processor)
        tokens = inputs["hidden_states"].shape[1] * (1 if group is None else group.size())
        if tokens != frames * height * width:
            raise ValueError(
                f"expected {frames} x {height} x {width} = {frames * height * width} tokens in a model with window"
                f" layers, got {tokens}"
            )
        return height * width
