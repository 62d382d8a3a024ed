"""The end of a run: write the teacher's pipeline, with the student as its transformer, to output_dir/pipeline."""

import copy
import warnings
from dataclasses import replace
from typing import Any

import torch
from diffusers import SchedulerMixin

from linvideo.models import Training, save_pipeline
from linvideo.run.data import Data
from linvideo.run.metrics_log import read_metrics
from linvideo.run.session import EXPORT, Run, TrainingDiverged
from linvideo.run.sharding import gather

MOST_SKIPPED = 0.5  # a run that skipped a larger share of its steps (non-finite loss or gradient) is not exported
FOLDER = "pipeline"


def export(
    run: Run, data: Data, student: torch.nn.Module, training: Training, scheduler: SchedulerMixin | None = None
) -> Any:
    """Write the pipeline, move its parts back to the device, and return it on the first rank (None on the others).

    Args:
        run: The run that has finished its stages.
        data: The data of the run.
        student: The trained model.
        training: Model-card entries of this kind of run. Entries that all runs share are added to them.
        scheduler: The student's sampler. None means the teacher's.

    Raises:
        TrainingDiverged: More than MOST_SKIPPED of the steps were skipped. The checkpoints stay.
    """
    with run.timed(EXPORT):
        if run.nonfinite:
            skipped = f"{run.nonfinite} of {run.global_step} steps had a non-finite loss or gradient"
            if run.nonfinite > MOST_SKIPPED * run.global_step:
                raise TrainingDiverged(f"{skipped}: no pipeline is written; lower the learning rate")
            run.ranks.on_first(lambda: warnings.warn(f"{skipped} and were skipped", stacklevel=2))
        student.eval().requires_grad_(False)
        whole = gather(student, run.ranks)
        pipeline = None
        if run.ranks.first:
            pipeline = copy.copy(data.source.pipeline)
            setattr(pipeline, data.source.expert.component, whole)
            pipeline.scheduler = pipeline.scheduler if scheduler is None else scheduler
        run.ranks.on_first(lambda: _save(pipeline, run, data, training))
    data.bring_back(run)
    return pipeline


def _save(pipeline: Any, run: Run, data: Data, training: Training) -> None:
    video = run.config.trajectories
    names = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale")
    settings = {name: getattr(video, name) for name in names} | {"fps": data.validator.fps}
    card = common_to_runs(run, data, training)
    save_pipeline(pipeline, run.output_dir / FOLDER, overwrite=True, training=card, settings=settings)


def common_to_runs(run: Run, data: Data, training: Training) -> Training:
    """Return `training` with the settings that all runs share and the last validation added."""
    config, rows = run.config, data.validator.rows
    video = config.trajectories
    settings = {
        "videos": f"{video.height}x{video.width}, {video.num_frames} frames",
        "prompts": len(data.source.captions),
        "trajectories": None if data.store is None else video.num_trajectories,
        "sampler steps": video.num_inference_steps,
        "guidance scale": video.guidance_scale,
        "global batch": config.global_batch(run.ranks.size),
        "learning rate": config.optimizer.learning_rate,
        "seed": config.seed,
    }
    found = read_metrics(rows) if rows.is_file() else []
    validation = found[-1] if found else None
    return replace(training, settings=training.settings | settings, validation=validation)
