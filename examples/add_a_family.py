"""Convert a transformer that linvideo doesn't know, Allegro of diffusers: python examples/add_a_family.py"""

import tempfile

import torch
from diffusers import AllegroTransformer3DModel
from diffusers.models.attention_processor import AllegroAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb_allegro

import linvideo
from linvideo.models import LinearAttentionMixin, attend, tokens_of_grid


class LinearAllegroProcessor(AllegroAttnProcessor2_0):
    _attention_backend = _parallel_config = None  # diffusers sets them where a processor has them

    def __call__(self, attn, x, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        if encoder_hidden_states is not None or attention_mask is not None:  # cross-attention stays diffusers'
            return super().__call__(attn, x, encoder_hidden_states, attention_mask)
        q, k, v = (layer(x).unflatten(2, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v))
        if image_rotary_emb is not None:
            q, k = (apply_rotary_emb_allegro(y.transpose(1, 2), *image_rotary_emb).transpose(1, 2) for y in (q, k))
        return attn.to_out[0](attend(self, attn, q, k, v).flatten(2))  # of the layer's type


class LinearAllegro(LinearAttentionMixin, AllegroTransformer3DModel):  # defining it makes the family known
    attention_paths = (("transformer_blocks", "attn1"),)  # where the self-attention layers are
    processor_class = LinearAllegroProcessor
    stock_processors = (AllegroAttnProcessor2_0,)
    tokens_per_frame = tokens_of_grid  # for window layers: the latents are [B, C, F, H, W]


stock = AllegroTransformer3DModel(num_attention_heads=2, num_layers=4, cross_attention_dim=192)  # random weights
inputs = {"hidden_states": torch.randn(1, 4, 2, 8, 8), "encoder_hidden_states": torch.randn(1, 5, 4096)}
models = stock, linvideo.convert(stock, mode="mixed", r_init=1.0)  # r = 1 is softmax alone
outputs = [model(**inputs, timestep=torch.tensor([500])).sample for model in models]
assert torch.equal(*outputs)  # so the new processor computes exactly what diffusers' does
with tempfile.TemporaryDirectory() as folder:
    linvideo.convert(stock, layers=[0, 1], mode="linear").save_pretrained(folder)
    print(linvideo.describe(LinearAllegro.from_pretrained(folder)))
