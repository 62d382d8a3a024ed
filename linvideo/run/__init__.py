from linvideo.run.metrics_log import read_metrics
from linvideo.run.read_config import load_config
from linvideo.run.session import TrainingDiverged, TrainingStopped

__all__ = ["TrainingDiverged", "TrainingStopped", "load_config", "read_metrics"]
