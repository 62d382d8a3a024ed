"""Diffusers transformers with linear self-attention: converting, describing, loading and saving them."""

from diffusers import ModelMixin, SchedulerMixin

from linvideo.models.attention import (
    ATTENTION_TYPES,
    attend,
    attention_types,
    choose_backend,
    default_fps,
    set_attention_types,
    video_transformers,
)
from linvideo.models.card import Training
from linvideo.models.cogvideox import LinVideoCogVideoXTransformer3DModel
from linvideo.models.convert import convert, finalize
from linvideo.models.describe import Description, describe
from linvideo.models.few_step import FewStepScheduler, own_settings
from linvideo.models.generate import generate_video
from linvideo.models.hub import push_to_hub
from linvideo.models.hunyuan_video15 import LinVideoHunyuanVideo15Transformer3DModel
from linvideo.models.ltx import LinVideoLTXVideoTransformer3DModel
from linvideo.models.mixin import LinearAttentionMixin, tokens_of_grid
from linvideo.models.pipelines import load_pipeline, new_folder, save_pipeline, wan_transformer
from linvideo.models.sampling_settings import sampling_settings
from linvideo.models.video_file import save_video
from linvideo.models.wan import (
    LinVideoChronoEditTransformer3DModel,
    LinVideoSkyReelsV2Transformer3DModel,
    LinVideoWanAttnProcessor,
    LinVideoWanTransformer3DModel,
    LinVideoWanVACETransformer3DModel,
)

__all__ = [
    "ATTENTION_TYPES",
    "Description",
    "FewStepScheduler",
    "LinVideoChronoEditTransformer3DModel",
    "LinVideoCogVideoXTransformer3DModel",
    "LinVideoHunyuanVideo15Transformer3DModel",
    "LinVideoLTXVideoTransformer3DModel",
    "LinVideoSkyReelsV2Transformer3DModel",
    "LinVideoWanAttnProcessor",
    "LinVideoWanTransformer3DModel",
    "LinVideoWanVACETransformer3DModel",
    "LinearAttentionMixin",
    "ModelMixin",  # diffusers looks base classes up in the library that model_index.json names
    "SchedulerMixin",
    "Training",
    "attend",
    "attention_types",
    "choose_backend",
    "convert",
    "default_fps",
    "describe",
    "finalize",
    "generate_video",
    "load_pipeline",
    "own_settings",
    "new_folder",
    "push_to_hub",
    "sampling_settings",
    "save_pipeline",
    "save_video",
    "set_attention_types",
    "tokens_of_grid",
    "video_transformers",
    "wan_transformer",
]
