"""linvideo: linear attention for video diffusion transformers (LinVideo, arXiv 2510.08318).

Each folder imports only from the folders above it, and from kernels/, which holds the Triton kernels:

    trajectories/  the teacher's data: prompts, sampling, the store of states and velocities
    ops/           the attention operators: checks, torch.library, the CPU path, the reference
    nn/            layers with weights
    models/        one file per model family of diffusers; conversion, saving and loading, model cards
    run/           what every training run needs: folder, checkpoints, steps, optimizer, ranks, validation
    reports/       HTML pages of one file: their pieces, and the report of a run
    transfer/      the paper's method: warm-up, sensitivity, selection of layers, objectives, fine-tuning
    distillation/  distillation to few steps
    evaluation/    measuring a model
    planning/      estimating what a run will need
    demo/          the embedded world, its metrics and its small teacher
    commands/      the command line, one file per command
"""

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
        "default_fps",
        "describe",
        "finalize",
        "generate_video",
        "load_pipeline",
        "push_to_hub",
        "sampling_settings",
        "save_pipeline",
        "save_video",
    )
}
__version__ = "0.2.0"
__all__ = sorted(_LAZY)


def __getattr__(name: str):
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_diffusers_hook.install()
