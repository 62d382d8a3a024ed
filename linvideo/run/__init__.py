"""What any run of training needs, whatever it learns. A run is an object that is used; see `Run`.

the run        session (stages, steps, checkpoints), signals, run_folder, checkpoint
its options    run_config, read_config (YAML and the command line), bounded_yaml
its data       data (the teacher, its prompts and trajectories), validation, sample, export
a step         gradient, optimizer, eight_bit; trainable (models as they are trained), adapters
many ranks     parallel (who does what), sharding (what happens to the models)
watching it    step_log, metrics_log, trackers, pace; video_metrics; forward_times
"""

from linvideo.run.metrics_log import read_metrics
from linvideo.run.read_config import load_config
from linvideo.run.run_config import RunConfig
from linvideo.run.session import Run, TrainingDiverged
from linvideo.run.signals import TrainingStopped

__all__ = ["Run", "RunConfig", "TrainingDiverged", "TrainingStopped", "load_config", "read_metrics"]
