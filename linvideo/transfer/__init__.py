"""Selective transfer (LinVideo, arXiv 2510.08318): which layers become linear, and how the model keeps its quality.

`train(TrainConfig(...))` does all of it; the parts are plain functions in files of their own:

    trainer        the run and its stages; train_config, its options; student, the two models
    warmup         fits feature maps to softmax attention
    sensitivity    what each layer costs
    selection      the paper's learned choice of layers
    objectives     the paper's losses, ADM among them; lanes, the student's own states; gradient_step, a step's gradient
"""

from linvideo.transfer.train_config import TrainConfig
from linvideo.transfer.trainer import TrainResult, collect, train

__all__ = ["TrainConfig", "TrainResult", "collect", "train"]
