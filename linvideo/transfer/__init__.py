"""Selective transfer (LinVideo, arXiv 2510.08318): which layers become linear, and how the model keeps its quality.

`train(TrainConfig(...))` runs all of it. Each part has a file of its own:

    trainer        a run and its stages
    train_config   the options of a run
    student        the two models, student and teacher
    warmup         fits feature maps to softmax attention
    sensitivity    measures what converting each layer costs
    selection      the paper's learned choice of layers
    objectives     the paper's losses, including ADM
    rollouts       states on the student's own trajectories
    gradient_step  the gradient of one training step
"""

from linvideo.transfer.train_config import TrainConfig
from linvideo.transfer.trainer import TrainResult, collect, train

__all__ = ["TrainConfig", "TrainResult", "collect", "train"]
