"""A run: its folder and lock, its place among the stages, its steps, checkpoints and logs.

Stages that train count their optimizer steps in one global step; a checkpoint names the stage and the step in it, and
everything drawn at random is drawn by (seed, stage, step, position in the global batch), so a continued run does what
an uninterrupted one would have done, on any number of processes.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from linvideo.run import run_folder
from linvideo.run.checkpoint import Checkpoint, remove_newer, save_checkpoint
from linvideo.run.optimizer import StudentOptimizer
from linvideo.run.parallel import Ranks, connect
from linvideo.run.run_config import RunConfig
from linvideo.run.signals import StopSignals
from linvideo.run.step_log import StepLog
from linvideo.trajectories.seeding import random_state, set_random_state
from linvideo.workspace import locked, remove_dead

Stage = TypeVar("Stage")
EXPORT = "export"  # what comes after the last stage
# of a checkpoint's state
ENTRIES = ("config", "processes", "stage", "stage_step", "global_step", "nonfinite", "results", "components", "random")


class TrainingDiverged(RuntimeError):
    """Too many steps had a non-finite loss or gradient."""


class Run(Generic[Stage]):
    """One run in config.output_dir; under torchrun, this process's part of it. How it is used:

        run = Run(config, {"warmup": warm_up, "finetune": finetune})  # nothing is written yet
        with run:  # holds the folder's lock, hears signals, knows where an earlier call has stopped
            run.check_continues()
            config.save(run.output_dir / "config.yaml")  # a folder without it is not taken for a run's
            student = ...
            run.restore(student)
            for stage in run.remaining():
                stage(run, student)

    and in a stage, which has one loop of steps at most

        run.register(optimizer=optimizer)
        for step in run.steps(count, batch_size):
            loss = ...
            norm = run.optimize(optimizer, loss)
            run.report(loss, grad_norm=norm)

    Args:
        config: the options of the run.
        stages: the stages in their order: name in checkpoints and logs -> what `remaining` gives for it. The last one's
            steps are config.max_train_steps. The name "export" is taken.
        device: the device to train on; None is config.device.

    Attributes:
        stage, stage_step, global_step: where the run is; steps count from 1 once they are made.
        nonfinite: the number of steps so far whose loss or gradient was not finite.
        results: what finished stages have found, plain values, kept in checkpoints; results["seconds"] has the stages'
            times.

    Raises:
        ValueError: the folder holds another run or nothing to continue, or the processes cannot be divided as
            configured.
    """

    def __init__(self, config: RunConfig, stages: Mapping[str, Stage], device: torch.device | None = None):
        self.config, self.stages = config, stages
        self.output_dir = Path(config.output_dir)
        self.ranks = Ranks.connected(config.parallel, connect(config.device if device is None else str(device)))
        self.device = self.ranks.device
        if not stages or EXPORT in stages:
            raise ValueError(f"stages must have names other than {EXPORT}, got {', '.join(stages) or 'none'}")
        self.stage, self.stage_step, self.global_step, self.nonfinite = next(iter(stages)), 0, 0, 0
        self.results: dict[str, Any] = {"seconds": {}}
        self.signals = StopSignals(self.ranks)
        self.log: StepLog | None = None
        self._saved: Checkpoint | None = None  # the checkpoint to continue from
        self._components: dict[str, Any] = {}  # what the current stage adds to a checkpoint
        self._checked = False  # whether check_continues was called
        self._student: torch.nn.Module | None = None
        self._others: Mapping[str, Mapping[str, torch.nn.Module]] = {}
        self._open = ExitStack()
        self.ranks.on_first(lambda: run_folder.check(config))

    def __enter__(self) -> "Run":
        """Lock the folder and see what an earlier call has left in it.

        Raises:
            ValueError: another run writes into the folder, or has done so since this one was made; or no checkpoint is
                whole.
        """
        config = self.config
        with ExitStack() as stack:

            def lock() -> list[Path]:
                stack.enter_context(locked(self.output_dir))
                remove_dead(self.output_dir)
                return run_folder.check(config)

            checkpoints = self.ranks.on_first(lock)
            stack.enter_context(self.signals)
            torch.manual_seed(config.seed)  # nothing here draws from it; a model with dropout would
            self._saved = newest(checkpoints, self.ranks)
            if self._saved is not None:
                self.stage, self.stage_step = self._saved["stage"], self._saved["stage_step"]
                self.global_step, self.nonfinite = self._saved["global_step"], self._saved["nonfinite"]
                self.results = self._saved["results"]
            if config.overwrite_output_dir:
                self.ranks.on_first(lambda: run_folder.clear(self.output_dir))
            self._open = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        with self._open:
            self._student, self._others, self._components, self._saved = None, {}, {}, None  # models may be freed now
            if self.log is not None:
                self.log.close()

    # An earlier call's work.

    def check_continues(self, free: tuple[str, ...] = ()) -> dict[str, Any] | None:
        """Refuse a checkpoint that cannot be continued with this config, before anything is done. Returns the config
        that the checkpoint was made with, None where there is no checkpoint.

        free: names of options that may differ, see RunConfig.check_continues.

        Raises:
            ValueError: the options differ, or the checkpoint is of another kind of run, or cannot be extended.
        """
        self._checked = True
        saved, config = self._saved, self.config
        if saved is None:
            return None
        earlier = saved["config"]
        config.check_continues(earlier, self.ranks.size, saved["processes"], free)
        if self.stage not in (*self.stages, EXPORT):
            raise ValueError(f"{saved.path} is of another kind of run, with a stage {self.stage}")
        if self.stage == self._main_stage:
            config.check_length(earlier["max_train_steps"], self.stage_step)
        elif self.stage == EXPORT:
            config.check_length(earlier["max_train_steps"], earlier["max_train_steps"])
            if config.max_train_steps != earlier["max_train_steps"]:
                raise ValueError(
                    f"{saved.path} was made after the last step and cannot be extended: it has no optimizer state;"
                    " continue from an earlier checkpoint, --resume_from_checkpoint FOLDER"
                )
        return earlier

    def restore(
        self, student: torch.nn.Module, others: Mapping[str, Mapping[str, torch.nn.Module]] | None = None
    ) -> None:
        """Name the models that train, to be kept in checkpoints, and fill them from the one that is continued. What an
        earlier call has written into the folder after it is deleted.

        Args:
            student: the model whose parameters that require gradients are kept in all stages.
            others: stage -> prefix -> a model of which all parameters are kept in that stage, under that prefix.

        Raises:
            ValueError: the checkpoint is of another model.
            RuntimeError: check_continues was not called.
        """
        if not self._checked:
            raise RuntimeError("expected check_continues() to be called before restore()")
        self._student, self._others = student, others or {}
        if self._saved is not None:
            self._saved.load_model(self.trained())
            set_random_state(self._saved["random"], self.device)
            self.ranks.on_first(lambda: remove_newer(self.output_dir, self.global_step))
        self.ranks.on_first(lambda: run_folder.take_back_validations(self.output_dir, self.global_step))

    def trained(self) -> dict[str, torch.Tensor]:
        """What checkpoints keep of the models in this stage, by name."""
        found = {name: p for name, p in self._student.named_parameters() if p.requires_grad}
        for prefix, model in self._others.get(self.stage, {}).items():
            found |= {f"{prefix}.{name}": p for name, p in model.named_parameters()}
        return found

    # Stages.

    def remaining(self) -> Iterator[Stage]:
        """The stages that are left, each to be done before the next is asked for. At the end of each, a checkpoint is
        saved; a loop that is left with `break` leaves its stage unfinished.

        Raises:
            TrainingStopped: a signal came during the rest of a stage with steps; its end is saved.
            OSError: the checkpoint could not be written.
            RuntimeError: restore was not called.
        """
        if self._student is None:
            raise RuntimeError("expected restore() to be called before remaining()")
        self.log = StepLog(self.config, self.ranks, self.global_step)
        names = [*self.stages, EXPORT]
        for name, after in pairwise(names[names.index(self.stage) :]):
            self.stage = name
            with self.timed(name):
                yield self.stages[name]
            self._components, self._saved = {}, None
            if not self._keeps_end():
                self.stage_step, self.stage = 0, after
                self.save()
            self.signals.unsaved = False
            if self.signals.came():
                raise self.signals.stopped("at the end of a stage, which is saved")

    def register(self, **components: Any) -> None:
        """Name what this stage's checkpoints hold next to the models: objects with state_dict and load_state_dict; None
        is left out. They are loaded when the run continues in the middle of the stage: their state must have its
        tensors already, as `fill_state` of run/optimizer.py makes them for PyTorch's Adam.

        Raises:
            ValueError: the checkpoint was made with other ones.
        """
        self._components = {name: part for name, part in components.items() if part is not None}
        if self._saved is not None:
            if self._saved.components and set(self._saved.components) != self._components.keys():
                names = ", ".join(self._saved.components), ", ".join(self._components)
                raise ValueError(f"{self._saved.path} was made with {names[0]}; expected {names[1]}")
            for name in self._saved.components:
                self._saved.load_component(name, self._components[name])
        self._saved = None

    def steps(self, count: int, samples: int, validate: Callable[[], None] | None = None) -> Iterator[int]:
        """The steps, from 0, that are left of the stage's `count`. Between them checkpoints and validations are made
        when they are due; that of a step whose checkpoint is continued may be due still.

        Args:
            samples: the number of samples of a step, over all ranks.
            validate: a validation of this stage; None for a stage without.

        Raises:
            TrainingStopped: a signal came; the step is saved.
            OSError: a checkpoint could not be written.
            RuntimeError: the stage is continued, and `register` was not called.
        """
        if self._saved is not None and self._saved.components:
            raise RuntimeError(f"expected register() before steps() in the stage {self.stage}, which is continued")
        bar = self.log.steps(self.stage, self.stage_step, count, samples)
        self._validate_if_due(count, validate)
        self.signals.unsaved = True  # from the first step to the end of the stage
        for step in bar:
            self.global_step += 1
            self.stage_step = step + 1
            self.log.step_begins()
            yield step
            last = self.stage_step == count
            due = self._keeps_end() if last else self.global_step % self.config.checkpointing_steps == 0
            if due:
                self.save()
            self._validate_if_due(count, validate)
            stop = self.signals.came()
            if stop and not due:
                self.save()
            if stop:
                self.signals.unsaved = False
                raise self.signals.stopped(f"after step {self.stage_step} of {self.stage}, which is saved")

    def optimize(self, optimizer: StudentOptimizer, loss: float) -> float | None:
        """Make the optimizer's step, unless loss or gradient are not finite; returns the gradient's norm, None when the
        step was skipped.

        Raises:
            TrainingDiverged: see `finite`.
        """
        norm = optimizer.step() if math.isfinite(loss) else optimizer.skip()
        self.finite(math.nan if norm is None else norm)
        return norm

    def finite(self, value: float) -> bool:
        """Whether `value` is finite; a step with one that is not is counted.

        Raises:
            TrainingDiverged: there were more of them than config.max_nonfinite_steps.
        """
        if math.isfinite(value):
            return True
        self.nonfinite += 1
        if self.nonfinite > self.config.max_nonfinite_steps:
            raise TrainingDiverged(
                f"{self.nonfinite} steps had a non-finite loss or gradient, the last was step {self.stage_step} of"
                f" {self.stage} (max_nonfinite_steps is {self.config.max_nonfinite_steps}): lower the learning rate"
            )
        return False

    def report(self, loss: float, **values: Any) -> None:
        """Log a step; see StepLog.write."""
        self.log.write(self.where(), {"loss": loss, **values})

    def where(self) -> dict[str, Any]:
        """step, stage and stage_step, as the rows of logs have them."""
        return {"step": self.global_step, "stage": self.stage, "stage_step": self.stage_step}

    def save(self) -> None:
        """Write a checkpoint.

        Raises:
            OSError: it could not be written; the earlier ones are untouched.
        """
        state = {
            "config": self.config.record(),
            "processes": self.ranks.size,
            "stage": self.stage,
            "stage_step": self.stage_step,
            "global_step": self.global_step,
            "nonfinite": self.nonfinite,
            "results": self.results,
            "components": {name: component.state_dict() for name, component in self._components.items()},
            "random": random_state(self.device),
        }
        limit, before = self.config.checkpoints_total_limit, self.signals.unsaved
        self.signals.unsaved = True  # a signal waits for the end of the checkpoint
        save_checkpoint(self.output_dir, self.global_step, self.trained(), state, limit, self.ranks)
        self.signals.unsaved = before

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time that passes inside to results["seconds"][name]."""
        start = time.perf_counter()
        yield
        seconds = self.results["seconds"]
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start

    @property
    def _main_stage(self) -> str:
        return list(self.stages)[-1]

    def _keeps_end(self) -> bool:
        """Whether the stage's last step gets a checkpoint with its components, from which it can be extended."""
        return self.stage == self._main_stage and self.config.can_be_extended

    def _validate_if_due(self, count: int, validate: Callable[[], None] | None) -> None:
        every = self.config.validation.steps
        due = every and (self.global_step % every == 0 or self.stage_step == count)
        if due and self.stage_step and validate is not None:
            validate()


def newest(checkpoints: list[Path], ranks: Ranks) -> Checkpoint | None:
    """The first of the checkpoints that is whole; those passed over are named on standard error.

    Raises:
        ValueError: there are some, and none is whole.
    """
    for number, path in enumerate(checkpoints, 1):
        try:
            return Checkpoint(path, ranks, ENTRIES)
        except ValueError as error:
            if number == len(checkpoints):
                raise
            if ranks.first:
                print(f"{error}; continuing from the one before it", file=sys.stderr)
    return None
