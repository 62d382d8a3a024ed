"""Selective transfer: data-free trajectories, layer selection and distribution matching, as one resumable run.

`Trainer(TrainConfig(...)).train()` does all of it; the parts are plain functions in files of their own:

    the run         trainer (the stages); pipeline_run, resumable (what any run has: data and validation; steps,
                    checkpoints, signals); run_config, config, run_folder, student
    its data        prompts, images, conditions; trajectories, store; experts (Wan 2.2); flow, seeding
    what it learns  warmup, sensitivity, selection; step, objectives, lanes; optimizer, eight_bit, adapters, branches
    many ranks      parallel (who does what), sharding (what happens to the models), checkpoint
    watching it     metrics, trackers, pace; validation, validator, video_metrics
    small things    files, fingerprint, devices
"""

from linvideo.training.config import TrainConfig, load_config
from linvideo.training.metrics import read_metrics
from linvideo.training.prompts import PromptEmbeddings, encode_prompts, read_prompts
from linvideo.training.resumable import TrainingDiverged, TrainingStopped
from linvideo.training.store import StateBatch, TrajectoryStore
from linvideo.training.trainer import Trainer, TrainResult

__all__ = [
    "PromptEmbeddings",
    "StateBatch",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "TrainingDiverged",
    "TrainingStopped",
    "TrajectoryStore",
    "encode_prompts",
    "load_config",
    "read_metrics",
    "read_prompts",
]
