"""linvideo: linear attention for video diffusion transformers (LinVideo, arXiv 2510.08318)."""

from linvideo import _diffusers_hook

_LAZY = {
    name: "linvideo.models"
    for name in (
        "FewStepScheduler",
        "LinVideoChronoEditTransformer3DModel",
        "LinVideoCogVideoXTransformer3DModel",
        "LinVideoHunyuanVideo15Transformer3DModel",
        "LinVideoLTXVideoTransformer3DModel",
        "LinVideoSkyReelsV2Transformer3DModel",
        "LinVideoWanTransformer3DModel",
        "LinVideoWanVACETransformer3DModel",
        "ModelMixin",
        "SchedulerMixin",
        "attention_types",
        "convert",
        "describe",
        "finalize",
        "load_pipeline",
        "push_to_hub",
        "save_pipeline",
    )
}
__version__ = "0.1.0"
__all__ = sorted(_LAZY)


def __getattr__(name: str):
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_diffusers_hook.install()
