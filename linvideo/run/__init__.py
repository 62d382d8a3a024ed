"""The parts that every kind of training run shares. A training loop uses a `Run` object; see session.py.

the run          session (stages, steps, checkpoints), signals, run_folder, checkpoint
its options      run_config, read_config (YAML and the command line), bounded_yaml
its data         data (the teacher, its prompts and trajectories), validation, sample, export
one step         gradient, optimizer, eight_bit, trainable (models made ready to train), adapters
several ranks    parallel (division of the work), sharding (of the models)
monitoring       step_log, metrics_log, trackers, pace, video_metrics, forward_times
"""

from linvideo.run.metrics_log import read_metrics
from linvideo.run.read_config import load_config
from linvideo.run.run_config import RunConfig
from linvideo.run.session import Run, TrainingDiverged
from linvideo.run.signals import TrainingStopped

__all__ = ["Run", "RunConfig", "TrainingDiverged", "TrainingStopped", "load_config", "read_metrics"]
