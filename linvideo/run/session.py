"""What makes a run of several stages resumable: counting steps, checkpoints, signals, the log. Trainer has the stages.

Stages that train count their optimizer steps in one global step; a checkpoint names the stage and the step in it, and
everything drawn at random is drawn by (seed, stage, step, position in the global batch), so a continued run does what
an uninterrupted one would have done, on any number of processes.
"""

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from linvideo.models import finalize
from linvideo.run.checkpoint import Checkpoint, save_checkpoint
from linvideo.run.metrics_log import MetricsLog
from linvideo.run.pace import Pace
from linvideo.run.parallel import Ranks
from linvideo.run.run_config import RunConfig
from linvideo.run.trackers import Trackers
from linvideo.trajectories.seeding import random_state, set_random_state

# of a checkpoint's state
ENTRIES = ("config", "processes", "stage", "stage_step", "global_step", "nonfinite", "results", "components", "random")


class TrainingDiverged(RuntimeError):
    """Too many steps had a non-finite loss or gradient."""


class TrainingStopped(RuntimeError):
    """SIGTERM came, as schedulers send it before they take a machine away, or Ctrl-C (SIGINT).

    Attributes:
        exit_status: of the command.
    """

    def __init__(self, when: str, number: int = signal.SIGTERM):
        name, self.exit_status = ("Ctrl-C", 130) if number == signal.SIGINT else ("SIGTERM", 1)
        super().__init__(f"stopped by {name} {when}; continue with --resume_from_checkpoint latest")


class ResumableRun:
    """A run in config.output_dir; subclasses set `student`, and have a method `_<stage>` for each of `stages`, and
    `_validate` for those that are `validated`.

    checkpoints: to continue from, the first that is whole.
    """

    stages: tuple[str, ...]
    validated: tuple[str, ...] = ()

    def __init__(self, config: RunConfig, ranks: Ranks, checkpoints: list[Path]):
        self.config, self.ranks, self.checkpoints = config, ranks, checkpoints
        self.output_dir, self.device = Path(config.output_dir), ranks.device
        self.student: torch.nn.Module
        self.log: MetricsLog | None = None  # on the first rank, as are the trackers
        self.trackers: Trackers | None = None
        self.stage, self.stage_step, self.global_step, self.nonfinite = self.stages[0], 0, 0, 0
        self.unsaved = self.stop = False
        self.signal = signal.SIGTERM  # the one that has set `stop`
        self.results: dict[str, Any] = {"seconds": {}}  # of finished stages; plain values
        self.components: dict[str, Any] = {}  # what the current stage adds to a checkpoint
        self.restored: Checkpoint | None = None  # has the state of the components of the stage it was made in

    @property
    def main_stage(self) -> str:
        """The last that trains; its steps are config.max_train_steps."""
        return self.stages[-2]

    def _keeps_end(self) -> bool:
        """Whether the stage's last step gets a checkpoint with its components, from which it can be extended."""
        return self.stage == self.main_stage and self.config.can_be_extended

    def _run_stages(self) -> None:
        try:
            if self.ranks.first:
                self._open_logs()
            for stage in self.stages[self.stages.index(self.stage) :]:
                self.stage = stage
                with self._timed(stage):
                    getattr(self, f"_{stage}")()
                self._end_stage()
        finally:
            for log in (self.log, self.trackers):
                if log is not None:
                    log.close()

    def _open_logs(self) -> None:
        config = self.config
        self.log = MetricsLog(self.output_dir / "metrics.jsonl", self.global_step)
        watched = (config.tracker_project_name, config.to_dict(), self.global_step)
        self.trackers = Trackers(config.report_to, self.output_dir, *watched)

    # Steps.

    def _steps(self, count: int, samples: int) -> Iterator[int]:
        """The stage's remaining steps of so many samples, with counting, a progress bar, and checkpoints when they are
        due, and validation; that of a step whose checkpoint we continue from may be due still."""
        self.pace = Pace(samples)
        first, show = self.stage_step, self.config.progress and self.ranks.first
        self.bar = tqdm(range(first, count), desc=self.stage, initial=first, total=count, disable=not show)
        self._validate_if_due(count)
        self.unsaved = True
        for step in self.bar:
            self.global_step += 1
            self.stage_step = step + 1
            self.pace.start()
            yield step
            last = self.stage_step == count
            due = self._keeps_end() if last else self.global_step % self.config.checkpointing_steps == 0
            if due:
                self._save()
            self._validate_if_due(count)
            stop = self.ranks.any(self.stop)
            if stop and not due:
                self._save()
            if stop:
                self.unsaved = False
                raise TrainingStopped(f"after step {self.stage_step} of {self.stage}, which is saved", self.signal)

    def _validate_if_due(self, count: int) -> None:
        every = self.config.validation.steps
        due = every and (self.global_step % every == 0 or self.stage_step == count)
        if due and self.stage_step and self.stage in self.validated:
            self._validate()

    def _finite(self, value: float) -> bool:
        """False, and counted, when `value` is not finite."""
        if math.isfinite(value):
            return True
        self.nonfinite += 1
        if self.nonfinite > self.config.max_nonfinite_steps:
            raise TrainingDiverged(
                f"{self.nonfinite} steps had a non-finite loss or gradient, the last was step {self.stage_step} of"
                f" {self.stage} (max_nonfinite_steps is {self.config.max_nonfinite_steps}): lower the learning rate"
            )
        return False

    def _report(self, **values: Any) -> None:
        """Write a step's row, plot it, and show it in the bar. Pace and memory stay out of the row, which is the same
        in a run that was interrupted."""
        if self.log is None:
            return
        kept = {name: value for name, value in values.items() if not isinstance(value, float) or math.isfinite(value)}
        kept = {name: value for name, value in kept.items() if value is not None}
        self.log.write({"step": self.global_step, "stage": self.stage, "stage_step": self.stage_step, **kept})
        watched = {"samples_per_second": self.pace.stop()}
        if self.device.type == "cuda":
            watched["peak_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        self.trackers.log(self.stage, kept | watched, self.global_step)
        self.bar.set_postfix(_shown(values | watched), refresh=False)

    # Checkpoints.

    def _register(self, **components: Any) -> None:
        """Name what this stage's checkpoints hold beside the model; loads it when the run was restored into the
        stage."""
        self.components = components
        if self.restored is not None:
            for name in self.restored.components:
                self.restored.load_component(name, components[name])
        self.restored = None

    def _end_stage(self) -> None:
        self.components, self.restored = {}, None
        if self.stage != self.stages[-1] and not self._keeps_end():
            self.stage_step, self.stage = 0, self.stages[self.stages.index(self.stage) + 1]
            self._save()
        self.unsaved = False
        if self.ranks.any(self.stop):
            raise TrainingStopped("at the end of a stage, which is saved", self.signal)

    def _save(self) -> None:
        state = {
            "config": self.config.record(),
            "processes": self.ranks.size,
            "stage": self.stage,
            "stage_step": self.stage_step,
            "global_step": self.global_step,
            "nonfinite": self.nonfinite,
            "results": self.results,
            "components": {name: component.state_dict() for name, component in self.components.items()},
            "random": random_state(self.device),
        }
        limit, before = self.config.checkpoints_total_limit, self.unsaved
        self.unsaved = True  # a signal waits for the end of the checkpoint
        save_checkpoint(self.output_dir, self.global_step, self._trained(), state, limit, self.ranks)
        self.unsaved = before

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        """What training changes of the model."""
        return {name: p for name, p in self.student.named_parameters() if p.requires_grad}

    def _load_newest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; those passed over are named."""
        for number, path in enumerate(self.checkpoints, 1):
            try:
                return Checkpoint(path, self.ranks, ENTRIES)
            except ValueError as error:
                if number == len(self.checkpoints):
                    raise
                if self.ranks.first:
                    print(f"{error}; continuing from the one before it", file=sys.stderr)
        return None

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.stage, self.stage_step = checkpoint["stage"], checkpoint["stage_step"]
        self.global_step, self.nonfinite = checkpoint["global_step"], checkpoint["nonfinite"]
        self.results, self.restored = checkpoint["results"], checkpoint
        if "linear_layers" in self.results:
            finalize(self.student, self.results["linear_layers"])
        checkpoint.load_model(self._trained())
        set_random_state(checkpoint["random"], self.device)

    # Signals and time.

    @contextmanager
    def _stoppable(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C wait for the end of an optimizer step, and in the rest of a stage with steps for its end;
        elsewhere everything worth keeping is on disk already. A second Ctrl-C does not wait."""

        def terminate(number: int, _: Any) -> None:
            # under torchrun one Ctrl-C comes twice, from the terminal and from torchrun
            if number == signal.SIGINT and self.stop and self.ranks.size == 1:
                raise KeyboardInterrupt
            self.stop, self.signal = True, number
            if not self.unsaved:
                raise TrainingStopped("between the steps", number)
            if number == signal.SIGINT and self.ranks.first:  # print may be interrupted in itself
                os.write(2, b"\nstopping once this step is saved; Ctrl-C again stops at once and loses it\n")

        if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        heard = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
        for number in heard:
            signal.signal(number, terminate)
        try:
            yield
        finally:
            for number in heard:
                signal.signal(number, before[number])

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds = self.results["seconds"]
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start


def _shown(values: dict[str, Any]) -> dict[str, Any]:
    """What of a step's values the progress bar has room for."""
    shown = {"loss": f"{values['loss']:.4f}"}
    if "num_linear" in values:
        shown["linear"] = values["num_linear"]
    if "r" in values:
        shown["r"] = f"{min(values['r'].values()):.2f}-{max(values['r'].values()):.2f}"
    shown["samples/s"] = f"{values['samples_per_second']:.3g}"
    if "peak_memory_gib" in values:
        shown["GiB"] = f"{values['peak_memory_gib']:.1f}"
    return shown
