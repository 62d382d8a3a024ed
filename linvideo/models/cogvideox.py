"""CogVideoX: text and video attend jointly, text first, without masks.

It can be converted but not trained: CogVideoX predicts v of a DDPM, and linvideo's training objectives are those of
rectified flow.
"""

from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel, DiffusionPipeline
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0, FusedCogVideoXAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb

from linvideo.models.attention import attend, self_attentions
from linvideo.models.mixin import LinearAttentionMixin


class LinVideoCogVideoXAttnProcessor(CogVideoXAttnProcessor2_0):
    """Joint attention of a CogVideoX block, of the type `attn.attention_type`. It has no weights of its own.

    Unlike diffusers' processor it supports attention backends.

    Raises:
        ValueError: A layer that is not softmax is called with an attention mask.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if attention_mask is not None:
            attention_type = getattr(attn, "attention_type", "softmax")
            if attention_type != "softmax":
                raise ValueError(f"a {attention_type} attention layer takes no attention mask, got one")
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        text_tokens = encoder_hidden_states.shape[1]
        joint = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        if attn.fused_projections:
            query, key, value = attn.to_qkv(joint).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(joint), attn.to_k(joint), attn.to_v(joint)
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        if image_rotary_emb is not None:
            query, key = (_rotate_video(x, image_rotary_emb, text_tokens) for x in (query, key))

        query, key = query.type_as(value), key.type_as(value)
        out = attend(self, attn, query, key, value, prefix_tokens=text_tokens).flatten(2, 3).type_as(value)
        for layer in attn.to_out:  # projection, dropout
            out = layer(out)
        text, video = out.split([text_tokens, hidden_states.shape[1]], dim=1)
        return video, text


def _rotate_video(x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], text_tokens: int) -> torch.Tensor:
    """Apply RoPE to the tokens of x [B, N, H, D] that come after the text."""
    return torch.cat([x[:, :text_tokens], apply_rotary_emb(x[:, text_tokens:], rope, sequence_dim=1)], dim=1)


class LinVideoCogVideoXTransformer3DModel(LinearAttentionMixin, CogVideoXTransformer3DModel):
    """CogVideoX."""

    attention_paths = (("transformer_blocks", "attn1"),)
    processor_class = LinVideoCogVideoXAttnProcessor
    stock_processors = (CogVideoXAttnProcessor2_0, FusedCogVideoXAttnProcessor2_0)
    _repeated_blocks = ["CogVideoXBlock"]  # for compile_repeated_blocks; diffusers leaves it out

    @classmethod
    def fps(cls, pipeline: DiffusionPipeline) -> int:
        return 8 if pipeline.transformer.config.patch_size_t is None else 16  # CogVideoX, CogVideoX 1.5

    def tokens_per_frame(self, inputs: dict[str, Any]) -> int:
        height, width = inputs["hidden_states"].shape[3:]  # after the frames
        return (height // self.config.patch_size) * (width // self.config.patch_size)

    def fuse_qkv_projections(self) -> None:
        """Fuse the projections of q, k and v. diffusers' method would also replace the processors."""
        for attn in self_attentions(self):
            attn.fuse_projections(fuse=True)

    def unfuse_qkv_projections(self) -> None:
        for attn in self_attentions(self):
            attn.fused_projections = False
