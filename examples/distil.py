"""Distil a model to 2 steps, with far too little training: python examples/distil.py [output folder]"""

import sys
import tempfile
from pathlib import Path

import linvideo
from linvideo.distillation import DistillConfig, distill
from linvideo.distillation.distill_config import RegressionConfig
from linvideo.trajectories.collect import TrajectoryConfig

output = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
teacher = linvideo.load_pipeline("linvideo/demo/teacher")
# The student should be a trained model, the result of `linvideo train`; this one is only converted
student = linvideo.convert(teacher.transformer, layers=[0, 1, 2, 3], mode="linear")
captions = ["a red disc moving left", "a blue square moving up"]

settings = linvideo.sampling_settings(teacher)  # the size, frames, steps and guidance that the teacher samples with
config = DistillConfig(
    output_dir=output / "run",  # an interrupted run continues there with resume_from_checkpoint="latest"
    num_steps=2,
    train_batch_size=2,
    # the student's targets are the ends of trajectories that the teacher samples with its guidance
    trajectories=TrajectoryConfig(num_trajectories=2, shard_size=2, batch_size=2, **settings),
    regression=RegressionConfig(max_train_steps=4),  # 400 in the recipe distill-demo
    max_train_steps=5,  # of distribution matching, 500 there; the student trains in every fifth step only
)
result = distill(config, teacher, student, prompts=captions)

# The folder's scheduler knows the timesteps, and the guidance is in the weights
pipe = linvideo.load_pipeline(result.pipeline_path)
video = linvideo.generate_video(pipe, captions[0], **linvideo.sampling_settings(pipe))
linvideo.save_video(video, output / "disc.mp4", fps=linvideo.default_fps(pipe))
print(f"timesteps {result.timesteps}; wrote {output / 'disc.mp4'} and the pipeline folder {result.pipeline_path}")
