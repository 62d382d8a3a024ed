"""HunyuanVideo 1.5: video and text attend jointly, text last. The text's padding is masked as keys.

Linear and window layers also compute the rows of padding tokens, which softmax layers leave out. No other token reads
them.
"""

import torch
from diffusers import DiffusionPipeline, HunyuanVideo15Transformer3DModel
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15AttnProcessor2_0
from torch.nn.functional import pad

from linvideo.models.attention import attend
from linvideo.models.mixin import LinearAttentionMixin, tokens_of_grid


class LinVideoHunyuanVideo15AttnProcessor(HunyuanVideo15AttnProcessor2_0):
    """Joint attention of a HunyuanVideo 1.5 block, of the type `attn.attention_type`. It has no weights of its own."""

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return video and text after attention; attention_mask is [B, text tokens], true for text, not padding."""
        query, key, value = (
            layer(hidden_states).unflatten(2, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = attn.norm_q(query), attn.norm_k(key)
        if image_rotary_emb is not None:
            query, key = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (query, key))

        projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text = [layer(encoder_hidden_states).unflatten(2, (attn.heads, -1)) for layer in projections]
        for place, norm in enumerate((attn.norm_added_q, attn.norm_added_k)):
            text[place] = text[place] if norm is None else norm(text[place])
        query, key, value = (torch.cat(pair, dim=1) for pair in zip((query, key, value), text, strict=True))
        query, key = query.type_as(value), key.type_as(value)

        key_mask = pad(attention_mask, (query.shape[1] - attention_mask.shape[1], 0), value=True).bool()
        pairs = None
        if getattr(attn, "attention_type", "softmax") not in ("linear", "window"):  # these need no N x N mask
            pairs = key_mask[:, None, :, None] & key_mask[:, None, None, :]
        masks = {"key_mask": key_mask, "attention_mask": pairs, "suffix_tokens": encoder_hidden_states.shape[1]}
        out = attend(self, attn, query, key, value, **masks)

        out = out.flatten(2, 3).type_as(value)
        video, text = out.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
        for layer in attn.to_out:  # projection, dropout
            video = layer(video)
        return video, attn.to_add_out(text)


class LinVideoHunyuanVideo15Transformer3DModel(LinearAttentionMixin, HunyuanVideo15Transformer3DModel):
    """HunyuanVideo 1.5."""

    attention_paths = (("transformer_blocks", "attn"),)
    processor_class = LinVideoHunyuanVideo15AttnProcessor
    tokens_per_frame = tokens_of_grid
    stock_processors = (HunyuanVideo15AttnProcessor2_0,)

    @classmethod
    def fps(cls, pipeline: DiffusionPipeline) -> int:
        return 24
