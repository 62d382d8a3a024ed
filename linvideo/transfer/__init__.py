from linvideo.transfer.train import Trainer, TrainResult
from linvideo.transfer.train_config import TrainConfig

__all__ = ["TrainConfig", "TrainResult", "Trainer"]
