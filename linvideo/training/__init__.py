"""Selective transfer: data-free trajectories, layer selection and distribution matching, as one resumable run.

`Trainer(TrainConfig(...)).train()` does all of it; the parts are plain functions in files of their own.
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
