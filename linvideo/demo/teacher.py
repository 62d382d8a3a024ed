"""The embedded teacher: a small but complete WanPipeline folder, made of the stock diffusers and transformers classes.

Only the transformer is trained (by train_teacher.py). The text encoder keeps its random initialisation: its outputs are
distinct, fixed vectors per word, which is all a vocabulary of 20 words needs. The VAE is a stock AutoencoderKLWan whose
weights are set by hand so that it is the identity between pixels and latents: the world is generated in pixel space.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from linvideo.demo import world

FOLDER = Path(__file__).parent / "teacher"
MAX_SEQUENCE_LENGTH = 16
NUM_INFERENCE_STEPS = 12
GUIDANCE_SCALE = 1.5
FLOW_SHIFT = 4.0


def build_pipeline(seed: int = 0) -> WanPipeline:
    """The pipeline with an untrained transformer: 8 layers, 4 heads of 24, 8 x 4 x 4 = 128 tokens, 1.0 M parameters."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    text_encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).eval()
    transformer = WanTransformer3DModel(
        patch_size=(1, 4, 4),
        num_attention_heads=4,
        attention_head_dim=24,
        in_channels=3,
        out_channels=3,
        text_dim=32,
        freq_dim=64,
        ffn_dim=256,
        num_layers=8,
        rope_max_seq_len=64,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT)
    return WanPipeline(tokenizer, text_encoder, identity_vae(), scheduler, transformer)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; words outside the world's vocabulary become <unk>."""
    words = sorted({word for text in world.all_captions() for word in text.split()})
    vocabulary = {token: number for number, token in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=MAX_SEQUENCE_LENGTH,
    )


def identity_vae() -> AutoencoderKLWan:
    """AutoencoderKLWan that maps pixels to equal latents and back, up to 1e-3.

    Its one block is y = silu(rms_norm(h)). Of the eight channels, h carries (x, -x) in six and a large constant in two,
    so the norm divides by nearly the same number everywhere, and silu(a) - silu(-a) = a makes the rest exactly linear.
    """
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=3,
        dim_mult=[1],
        num_res_blocks=1,
        temperal_downsample=[],
        latents_mean=[0.0] * 3,
        latents_std=[1.0] * 3,
        scale_factor_temporal=1,
        scale_factor_spatial=1,
    ).eval()
    constant = 100.0
    # rms_norm multiplies by sqrt(8) / |h|; |h| is sqrt(2) * constant but for x's own small share.
    gain = 8**0.5 / (2**0.5 * constant)
    with torch.no_grad():
        for parameter in vae.parameters():
            if parameter.dim() > 3 and parameter.shape[1:].numel() == 1:
                parameter.fill_(1.0)  # the norms' gamma
            else:
                parameter.zero_()  # residual branches and attention add nothing
        for half, out_channels in ((vae.encoder, 6), (vae.decoder, 3)):
            # Causal in time: the last of the three taps is the frame itself.
            for channel in range(3):
                half.conv_in.weight[channel, channel, -1, 1, 1] = 1.0
                half.conv_in.weight[3 + channel, channel, -1, 1, 1] = -1.0
                half.conv_out.weight[channel, channel, -1, 1, 1] = 1.0 / gain
                half.conv_out.weight[channel, 3 + channel, -1, 1, 1] = -1.0 / gain
            half.conv_in.bias[6:] = constant
            if out_channels == 6:
                half.conv_out.bias[3:] = -30.0  # log variance: a deterministic posterior
        for conv in (vae.quant_conv, vae.post_quant_conv):
            for channel in range(conv.in_channels):
                conv.weight[channel, channel] = 1.0
    return vae


def caption_embeddings(pipeline: WanPipeline) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of `world.all_captions()`, float [144, 16, 32], and of the empty prompt, float [1, 16, 32]."""
    with torch.no_grad():
        positive, negative = pipeline.encode_prompt(
            world.all_captions(), negative_prompt="", max_sequence_length=MAX_SEQUENCE_LENGTH
        )
    return positive, negative[:1]
