"""Logging of a run's steps: a row of metrics.jsonl, points in the trackers, a progress bar."""

import math
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from linvideo.progress import bar
from linvideo.run.metrics_log import MetricsLog
from linvideo.run.pace import Pace
from linvideo.run.parallel import Ranks
from linvideo.run.run_config import RunConfig
from linvideo.run.trackers import Trackers


class StepLog:
    """The log of a run. Only the first rank logs.

    Args:
        config: The options of the run.
        ranks: The ranks of the run.
        last_step: Step (of the whole run) after which the run continues. Later rows of an interrupted run are dropped.
    """

    def __init__(self, config: RunConfig, ranks: Ranks, last_step: int):
        self.device, self.progress = ranks.device, config.progress and ranks.first
        self.trackers: Trackers | None = None
        self._metrics: MetricsLog | None = None
        self._bar: tqdm | None = None  # bar and pace of the current stage
        self._pace: Pace | None = None
        if ranks.first:
            folder, project = Path(config.output_dir), config.tracker_project_name
            self.trackers = Trackers(config.report_to, folder, project, config.to_dict(), last_step)
            self._metrics = MetricsLog(folder / "metrics.jsonl", last_step)

    def steps(self, stage: str, first: int, count: int, samples: int) -> tqdm:
        """The steps `first` to `count` - 1 of a stage, with a bar; `samples`: the number of samples of a step."""
        self._pace = Pace(samples)
        self._bar = bar(range(first, count), self.progress, desc=stage, initial=first, total=count)
        return self._bar

    def step_begins(self) -> None:
        self._pace.start()

    def write(self, where: dict[str, Any], values: dict[str, Any]) -> None:
        """Report a step. Pace and memory stay out of the row, which is the same in a run that was interrupted.

        Args:
            where: step, stage and stage_step.
            values: "loss" and others, numbers or a dict of numbers; those that are None or not finite are left out of
                row and trackers.
        """
        if self._metrics is None:
            return
        kept = {name: value for name, value in values.items() if not isinstance(value, float) or math.isfinite(value)}
        kept = {name: value for name, value in kept.items() if value is not None}
        self._metrics.write(where | kept)
        watched = {"samples_per_second": self._pace.stop()}
        if self.device.type == "cuda":
            watched["peak_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        self.trackers.log(where["stage"], kept | watched, where["step"])
        self._bar.set_postfix(_shown(values | watched), refresh=False)

    def close(self) -> None:
        for log in (self._metrics, self.trackers):
            if log is not None:
                log.close()


def _shown(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a step that fit into the progress bar."""
    shown = {"loss": f"{values['loss']:.4f}"}
    if "num_linear" in values:
        shown["linear"] = values["num_linear"]
    if "r" in values:
        shown["r"] = f"{min(values['r'].values()):.2f}-{max(values['r'].values()):.2f}"
    shown["samples/s"] = f"{values['samples_per_second']:.3g}"
    if "peak_memory_gib" in values:
        shown["GiB"] = f"{values['peak_memory_gib']:.1f}"
    return shown
