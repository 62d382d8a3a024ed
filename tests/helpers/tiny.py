"""Tiny models that many tests share, with random weights: no download, built in a fraction of a second."""

import torch

HEADS, HEAD_DIM, TEXT_DIM, IMAGE_DIM = 2, 24, 32, 20


def tiny_transformer(num_layers: int = 3, seed: int = 0, kind: type | None = None, **config):
    """Return a WanTransformer3DModel, or another `kind`, in eval mode; `config` overrides any of its arguments."""
    from diffusers import WanTransformer3DModel

    arguments = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_DIM,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": TEXT_DIM,
        "freq_dim": 32,
        "ffn_dim": 64,
        "num_layers": num_layers,
        "rope_max_seq_len": 32,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (kind or WanTransformer3DModel)(**{**arguments, **config})
        # With weights of the default size attention is nearly uniform, and softmax and linear hardly differ.
        for block in model.blocks:
            torch.nn.init.normal_(block.attn1.to_q.weight, std=0.5)
            torch.nn.init.normal_(block.attn1.to_k.weight, std=0.5)
    return model.eval()


def tiny_inputs(batch: int = 2, dtype: torch.dtype = torch.float32, seed: int = 1) -> dict:
    """Return arguments of the transformer's forward: latents [batch, 16, 3, 8, 8] (48 tokens), 5 text tokens."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, 16, 3, 8, 8, generator=generator).to(dtype),
        "timestep": torch.linspace(900, 300, batch),
        "encoder_hidden_states": torch.randn(batch, 5, TEXT_DIM, generator=generator).to(dtype),
        "return_dict": False,
    }


def tiny_tokenizer():
    """Return a byte-level BPE tokenizer without merges, which takes any prompt and needs no download."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<unk>"]
    vocab = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def tiny_pipeline(transformer=None, seed: int = 0, **arguments):
    """Return a complete WanPipeline around `transformer` (default `tiny_transformer()`)."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline
    from transformers import UMT5Config, UMT5EncoderModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        )
        text_config = UMT5Config(
            vocab_size=259, d_model=TEXT_DIM, d_kv=8, d_ff=37, num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=1
        )
        text_encoder = UMT5EncoderModel(text_config)
    return WanPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=text_encoder.eval(),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=tiny_transformer() if transformer is None else transformer,
        **arguments,
    )


def tiny_image_transformer(clip: bool = True, seed: int = 0, **config):
    """Return the transformer of an image-to-video model, Wan 2.1's with `clip` and Wan 2.2's without."""
    image = {"image_dim": IMAGE_DIM, "added_kv_proj_dim": HEADS * HEAD_DIM} if clip else {}
    return tiny_transformer(seed=seed, in_channels=36, **image, **config)


def tiny_image_pipeline(transformer=None, seed: int = 0, **arguments):
    """Return a complete WanImageToVideoPipeline around `transformer` (default `tiny_image_transformer()`)."""
    from diffusers import WanImageToVideoPipeline
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    text_to_video = tiny_pipeline(tiny_image_transformer() if transformer is None else transformer, seed)
    parts = {**text_to_video.components, **arguments}
    if parts["transformer"].config.image_dim is not None:
        size = {"hidden_size": IMAGE_DIM, "intermediate_size": 40, "image_size": 32, "patch_size": 16}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder = CLIPVisionModel(CLIPVisionConfig(**size, num_hidden_layers=2, num_attention_heads=2))
        size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
        parts |= {"image_encoder": encoder.eval(), "image_processor": CLIPImageProcessor(**size)}
    return WanImageToVideoPipeline(**parts)


def tiny_image(seed: int = 0):
    """Return a PIL image whose size differs from that of the videos."""
    from PIL import Image

    pixels = torch.rand(4, 5, 3, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray((255 * pixels).byte().numpy()).resize((50, 40))


def sampled_states(pipeline, noise: torch.Tensor, **settings) -> torch.Tensor:
    """Return the states [S + 1, ...] of the pipeline's own sampler, from noise [...] to its result."""
    states = [noise[None]]

    def keep(_, step, timestep, kwargs):
        states.append(kwargs["latents"])
        return kwargs

    pipeline(latents=states[0], output_type="latent", callback_on_step_end=keep, **settings)
    return torch.cat(states)


def generate(pipeline, prompt: str = "a red circle moves left", seed: int = 0, num_inference_steps: int = 2):
    """Run the pipeline and return frames [5, 32, 32, 3] in [0, 1] as a numpy array."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt=prompt,
        negative_prompt="",
        height=32,
        width=32,
        num_frames=5,
        num_inference_steps=num_inference_steps,
        guidance_scale=3.0,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).frames[0]
