"""The embedded teachers: small but complete WanPipeline folders, made from stock classes of diffusers and transformers.

Only the transformer is trained (by train_teacher.py). The text encoder keeps its random initialization: its outputs are
distinct, fixed vectors per word, and a vocabulary of 20 words needs no more. In captions with several shapes, each
word's vector also tells to which shape it belongs (see bind_words). The VAE is a stock AutoencoderKLWan with weights
that are set by hand, so that it is the identity between pixels and latents: the worlds are generated in pixel space.

The package includes the teacher of the small world, in FOLDER.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from linvideo.demo.world import World

FOLDER = Path(__file__).parent / "teacher"
PATCH = (1, 4, 4)


@dataclass(frozen=True)
class Settings:
    """The size of a teacher, and the settings with which it is sampled.

    Args:
        layers, heads, head_dim, ffn_dim: Size of the transformer.
        text_length: Maximum number of tokens of a caption.
        text_width, text_heads: Size of the text encoder.
        num_inference_steps, guidance_scale, flow_shift: Settings of the sampler.
    """

    layers: int
    heads: int
    head_dim: int
    ffn_dim: int
    text_length: int
    text_width: int
    text_heads: int
    num_inference_steps: int
    guidance_scale: float
    flow_shift: float


SETTINGS = {
    "small": Settings(
        layers=8,
        heads=4,
        head_dim=24,
        ffn_dim=256,
        text_length=16,
        text_width=32,
        text_heads=4,
        num_inference_steps=12,
        guidance_scale=1.5,
        flow_shift=4.0,
    ),
    "middle": Settings(
        layers=12,
        heads=6,
        head_dim=32,
        ffn_dim=512,
        text_length=24,
        text_width=128,
        text_heads=8,
        num_inference_steps=20,
        guidance_scale=1.5,
        flow_shift=4.0,
    ),
    "large": Settings(
        layers=30,
        heads=6,
        head_dim=64,
        ffn_dim=1024,
        text_length=32,
        text_width=128,
        text_heads=8,
        num_inference_steps=24,
        guidance_scale=1.5,
        flow_shift=6.0,
    ),
}


def tokens(world: World) -> int:
    """Return the number of tokens of a video in the transformer."""
    return world.frames * (world.size // PATCH[1]) ** 2


def resized(settings: Settings, layers: int | None, heads: int | None) -> Settings:
    """Return settings with another number of layers and heads, where these aren't None. The width grows with the heads.

    Raises:
        ValueError: A number is below 1.
    """
    layers, heads = settings.layers if layers is None else layers, settings.heads if heads is None else heads
    if min(layers, heads) < 1:
        raise ValueError(f"expected at least one layer and one head, got {layers} layers and {heads} heads")
    return replace(settings, layers=layers, heads=heads, ffn_dim=settings.ffn_dim * heads // settings.heads)


def build_pipeline(world: World, seed: int = 0, settings: Settings | None = None) -> WanPipeline:
    """Build the pipeline with an untrained transformer. Without settings it has the world's own."""
    settings = settings or SETTINGS[world.name]
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(world)
    text_encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=settings.text_width,
            d_kv=settings.text_width // settings.text_heads,
            d_ff=2 * settings.text_width,
            num_layers=2,
            num_heads=settings.text_heads,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).eval()
    if world.objects > 1:
        bind_words(text_encoder)
    transformer = build_transformer(settings)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=settings.flow_shift)
    return WanPipeline(tokenizer, text_encoder, identity_vae(), scheduler, transformer)


def build_transformer(settings: Settings) -> WanTransformer3DModel:
    """Build an untrained transformer. It has 1.1 million parameters and 128 tokens for the small world, 6.3 million and
    1,024 for the middle one, and 61 million and 4,096 for the large one."""
    return WanTransformer3DModel(
        patch_size=PATCH,
        num_attention_heads=settings.heads,
        attention_head_dim=settings.head_dim,
        in_channels=3,
        out_channels=3,
        text_dim=settings.text_width,
        freq_dim=64,
        ffn_dim=settings.ffn_dim,
        num_layers=settings.layers,
        rope_max_seq_len=64,
    )


def bind_words(text_encoder: UMT5EncoderModel) -> None:
    """Let each head of a random encoder look at the word at a fixed distance, from 1 to 4 words back or ahead.

    Otherwise its attention is nearly uniform, and "a red square in front of a blue disc" gives nearly the same set of
    vectors as "a blue square in front of a red disc": the transformer's cross-attention does not see their order.
    """
    with torch.no_grad():
        for block in text_encoder.encoder.block:
            bias = block.layer[0].SelfAttention.relative_attention_bias.weight  # [buckets, heads]
            ahead = bias.shape[0] // 2  # from here on, buckets are for words that follow; at first one per distance
            bias.zero_()
            for head in range(bias.shape[1]):
                bias[1 + head // 2 + ahead * (head % 2), head] = 12.0


def build_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per word; words outside the world's vocabulary become <unk>."""
    words = sorted({word for text in world.training_captions() for word in text.split()})
    vocabulary = {token: number for number, token in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=SETTINGS[world.name].text_length,
    )


def identity_vae() -> AutoencoderKLWan:
    """Build an AutoencoderKLWan that maps pixels to equal latents and back, up to 1e-3.

    Its only block is y = silu(rms_norm(h)). Six of the eight channels of h hold (x, -x), and two a large constant, so
    that the norm divides by nearly the same number everywhere; silu(a) - silu(-a) = a makes the rest exactly linear.
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
    # rms_norm multiplies by sqrt(8) / |h|; |h| is sqrt(2) * constant, except for the small share of x.
    gain = 8**0.5 / (2**0.5 * constant)
    with torch.no_grad():
        for parameter in vae.parameters():
            if parameter.dim() > 3 and parameter.shape[1:].numel() == 1:
                parameter.fill_(1.0)  # gamma of the norms
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
