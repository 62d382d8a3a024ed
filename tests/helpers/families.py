"""For each family, a tiny random model, the inputs of its forward, and a complete tiny pipeline around it."""

from collections.abc import Callable
from dataclasses import dataclass, field

import diffusers
import numpy as np
import torch
from tiny import (
    HEAD_DIM,
    HEADS,
    IMAGE_DIM,
    TEXT_DIM,
    tiny_image,
    tiny_image_pipeline,
    tiny_image_transformer,
    tiny_inputs,
    tiny_pipeline,
    tiny_tokenizer,
    tiny_transformer,
)

LTX_CHANNELS, HUNYUAN_CHANNELS, COG_CHANNELS = 8, 4, 4


@dataclass(frozen=True)
class Family:
    """What the tests need from a family. Every call of `transformer`, `inputs` and `pipeline` gives the same values."""

    transformer: Callable[[], diffusers.ModelMixin]
    inputs: Callable[[], dict]  # a batch of two
    pipeline: Callable[[], diffusers.DiffusionPipeline]
    num_layers: int = 3
    arguments: Callable[[], dict] = dict  # arguments of the pipeline's call that differ between families
    settings: dict = field(default_factory=dict)  # attributes of the pipeline that are not saved in its folder


def run(family: Family, model: torch.nn.Module, **changed) -> torch.Tensor:
    with torch.no_grad():
        return model(**{**family.inputs(), **changed})[0]


def generate(family: Family, pipeline: diffusers.DiffusionPipeline) -> np.ndarray:
    """Run two steps of the pipeline and return frames [F, 32, 32, 3] in [0, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    for name, value in family.settings.items():
        setattr(pipeline, name, value)
    arguments = {
        "prompt": "a red circle",
        "negative_prompt": "",
        "height": 32,
        "width": 32,
        "num_frames": 5,
        "num_inference_steps": 2,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "np",
    }
    return np.asarray(pipeline(**{**arguments, **family.arguments()}).frames[0])


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


def guided() -> dict:
    return {"guidance_scale": 3.0, "max_sequence_length": 16}


def image_to_video_inputs() -> dict:
    return tiny_inputs() | {
        "hidden_states": randn(2, 36, 3, 8, 8, seed=1),
        "encoder_hidden_states_image": randn(2, 5, IMAGE_DIM, seed=2),
    }


def vace_inputs() -> dict:
    return tiny_inputs() | {
        "control_hidden_states": randn(2, 96, 3, 8, 8, seed=2),
        "control_hidden_states_scale": torch.ones(2),
    }


def vace_transformer() -> diffusers.WanVACETransformer3DModel:
    return tiny_transformer(kind=diffusers.WanVACETransformer3DModel, vace_layers=[0, 2])


def sky_reels_transformer() -> diffusers.SkyReelsV2Transformer3DModel:
    return tiny_transformer(kind=diffusers.SkyReelsV2Transformer3DModel)


def sky_reels_pipeline() -> diffusers.SkyReelsV2Pipeline:
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    parts = tiny_pipeline().components
    parts = {name: parts[name] for name in ("tokenizer", "text_encoder", "vae")}
    return diffusers.SkyReelsV2Pipeline(**parts, scheduler=scheduler, transformer=sky_reels_transformer())


def chrono_edit_transformer() -> diffusers.ChronoEditTransformer3DModel:
    image = {"in_channels": 36, "image_dim": IMAGE_DIM, "added_kv_proj_dim": HEADS * HEAD_DIM}
    return tiny_transformer(kind=diffusers.ChronoEditTransformer3DModel, **image)


def chrono_edit_pipeline() -> diffusers.ChronoEditPipeline:
    parts = tiny_image_pipeline().components
    kept = ("tokenizer", "text_encoder", "vae", "scheduler", "image_encoder", "image_processor")
    return diffusers.ChronoEditPipeline(**{name: parts[name] for name in kept}, transformer=chrono_edit_transformer())


def ltx_transformer() -> diffusers.LTXVideoTransformer3DModel:
    return seeded(
        lambda: diffusers.LTXVideoTransformer3DModel(
            in_channels=LTX_CHANNELS,
            out_channels=LTX_CHANNELS,
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=32,
            num_layers=3,
            caption_channels=TEXT_DIM,
        )
    )


def ltx_inputs() -> dict:
    """Return packed latents of 3 frames of 2 x 2; two tokens of the second sample's text are padding."""
    return {
        "hidden_states": randn(2, 12, LTX_CHANNELS, seed=1),
        "encoder_hidden_states": randn(2, 6, TEXT_DIM, seed=2),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]),
        "timestep": torch.tensor([900.0, 300.0]),
        "num_frames": 3,
        "height": 2,
        "width": 2,
        "return_dict": False,
    }


def t5_encoder() -> torch.nn.Module:
    from transformers import T5Config, T5EncoderModel

    config = {"vocab_size": 260, "d_model": TEXT_DIM, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4}
    return seeded(lambda: T5EncoderModel(T5Config(**config, pad_token_id=0, eos_token_id=1)))


def ltx_pipeline() -> diffusers.LTXPipeline:
    vae = seeded(
        lambda: diffusers.AutoencoderKLLTXVideo(
            latent_channels=LTX_CHANNELS,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False),
            patch_size=2,
        )
    )
    return diffusers.LTXPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=t5_encoder(),
        tokenizer=tiny_tokenizer(),
        transformer=ltx_transformer(),
    )


def hunyuan_video15_transformer() -> diffusers.HunyuanVideo15Transformer3DModel:
    return seeded(
        lambda: diffusers.HunyuanVideo15Transformer3DModel(
            in_channels=2 * HUNYUAN_CHANNELS + 1,  # latents, latents of the condition, its mask
            out_channels=HUNYUAN_CHANNELS,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=3,
            num_refiner_layers=1,
            mlp_ratio=2.0,
            text_embed_dim=TEXT_DIM,
            text_embed_2_dim=TEXT_DIM,
            image_embed_dim=12,
            rope_axes_dim=(4, 6, 6),
            target_size=32,
            task_type="t2v",
        )
    )


def hunyuan_video15_inputs() -> dict:
    """Return inputs with two texts per sample, each padded in one of the two samples or both, and image tokens."""
    return {
        "hidden_states": randn(2, 2 * HUNYUAN_CHANNELS + 1, 3, 2, 4, seed=1),
        "timestep": torch.tensor([900.0, 300.0]),
        "encoder_hidden_states": randn(2, 5, TEXT_DIM, seed=2),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
        "encoder_hidden_states_2": randn(2, 3, TEXT_DIM, seed=3),
        "encoder_attention_mask_2": torch.tensor([[1, 0, 0], [1, 1, 0]]),
        "image_embeds": randn(2, 4, 12, seed=4),
        "return_dict": False,
    }


def hunyuan_video15_pipeline() -> diffusers.HunyuanVideo15Pipeline:
    from diffusers.guiders import ClassifierFreeGuidance
    from transformers import ByT5Tokenizer, Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

    config = Qwen2_5_VLTextConfig(
        vocab_size=259,
        hidden_size=TEXT_DIM,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6},
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    vae = seeded(
        lambda: diffusers.AutoencoderKLHunyuanVideo15(
            latent_channels=HUNYUAN_CHANNELS,
            block_out_channels=(8, 8, 16, 16),
            layers_per_block=1,
            spatial_compression_ratio=8,
        )
    )
    return diffusers.HunyuanVideo15Pipeline(
        text_encoder=seeded(lambda: Qwen2_5_VLTextModel(config)),
        tokenizer=tokenizer,
        transformer=hunyuan_video15_transformer(),
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        text_encoder_2=t5_encoder(),
        tokenizer_2=ByT5Tokenizer(),
        guider=ClassifierFreeGuidance(guidance_scale=3.0),
    )


def cogvideox_transformer() -> diffusers.CogVideoXTransformer3DModel:
    return seeded(
        lambda: diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=COG_CHANNELS,
            out_channels=COG_CHANNELS,
            time_embed_dim=8,
            text_embed_dim=TEXT_DIM,
            num_layers=3,
            sample_width=4,
            sample_height=4,
            sample_frames=5,
            max_text_seq_length=16,
            use_rotary_positional_embeddings=True,
        )
    )


def cogvideox_inputs() -> dict:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    rope = get_3d_rotary_pos_embed(embed_dim=16, crops_coords=((0, 0), (2, 2)), grid_size=(2, 2), temporal_size=2)
    return {
        "hidden_states": randn(2, 2, COG_CHANNELS, 4, 4, seed=1),
        "encoder_hidden_states": randn(2, 5, TEXT_DIM, seed=2),
        "timestep": torch.tensor([900, 300]),
        "image_rotary_emb": rope,
        "return_dict": False,
    }


def cogvideox_pipeline() -> diffusers.CogVideoXPipeline:
    vae = seeded(
        lambda: diffusers.AutoencoderKLCogVideoX(
            block_out_channels=(8, 8, 8, 8), latent_channels=COG_CHANNELS, layers_per_block=1, norm_num_groups=2
        )
    )
    return diffusers.CogVideoXPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=t5_encoder(),
        vae=vae,
        transformer=cogvideox_transformer(),
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )


def vace_pipeline() -> diffusers.WanVACEPipeline:
    return diffusers.WanVACEPipeline(**{**tiny_pipeline().components, "transformer": vace_transformer()})


def with_image() -> dict:
    return guided() | {"image": tiny_image()}


def tokens_with_timesteps() -> dict:
    """Return inputs as Wan 2.2 TI2V-5B takes them: one timestep per token, 0 for the given first frame."""
    timestep = torch.linspace(900, 300, 2)[:, None].repeat(1, 48)
    timestep[:, :16] = 0
    return tiny_inputs() | {"timestep": timestep}


FAMILIES = {
    "Wan 2.1 T2V": Family(tiny_transformer, tiny_inputs, tiny_pipeline, arguments=guided),
    "Wan 2.1 I2V": Family(tiny_image_transformer, image_to_video_inputs, tiny_image_pipeline, arguments=with_image),
    "Wan 2.2 A14B": Family(
        tiny_transformer,
        tiny_inputs,
        lambda: tiny_pipeline(transformer_2=tiny_transformer(seed=1), boundary_ratio=0.9),
        arguments=guided,
    ),
    "Wan 2.2 TI2V-5B": Family(
        tiny_transformer, tokens_with_timesteps, lambda: tiny_pipeline(expand_timesteps=True), arguments=guided
    ),
    "Wan VACE": Family(vace_transformer, vace_inputs, vace_pipeline, num_layers=5, arguments=guided),
    "SkyReels-V2": Family(sky_reels_transformer, tiny_inputs, sky_reels_pipeline, arguments=guided),
    "ChronoEdit": Family(chrono_edit_transformer, image_to_video_inputs, chrono_edit_pipeline, arguments=with_image),
    "LTX-Video": Family(ltx_transformer, ltx_inputs, ltx_pipeline, arguments=guided),
    "HunyuanVideo 1.5": Family(
        hunyuan_video15_transformer,
        hunyuan_video15_inputs,
        hunyuan_video15_pipeline,
        settings={
            "system_message": "",
            "prompt_template_encode_start_idx": 0,
            "tokenizer_max_length": 16,
            "tokenizer_2_max_length": 8,
            "vision_num_semantic_tokens": 4,
        },
    ),
    "CogVideoX": Family(cogvideox_transformer, cogvideox_inputs, cogvideox_pipeline, arguments=guided),
}
