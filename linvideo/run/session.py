"""A run: its folder and lock, its current stage and step, its checkpoints and logs.

All training stages share one global step counter. A checkpoint names the stage and the step in the stage, and every
random draw depends only on (seed, stage, step, position in the global batch). A continued run therefore does exactly
what an uninterrupted one would have done, on any number of processes.
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
EXPORT = "export"  # comes after the last stage
# entries that the state of every checkpoint has
ENTRIES = ("config", "processes", "stage", "stage_step", "global_step", "nonfinite", "results", "components", "random")


class TrainingDiverged(RuntimeError):
    """Too many steps had a non-finite loss or gradient."""


class Run(Generic[Stage]):
    """A run in config.output_dir; under torchrun, this process's part of it. It is used like this:

        run = Run(config, {"warmup": warm_up, "finetune": finetune})  # nothing is written yet
        with run:  # locks the folder, handles signals, finds the checkpoint to continue from
            run.check_continues()
            config.save(run.output_dir / "config.yaml")  # without it a folder doesn't count as that of a run
            student = ...
            run.restore(student)
            for stage in run.remaining():
                stage(run, student)

    A stage has at most one loop of steps:

        run.register(optimizer=optimizer)
        for step in run.steps(count, batch_size):
            loss = ...
            norm = run.optimize(optimizer, loss)
            run.report(loss, grad_norm=norm)

    Args:
        config: The options of the run.
        stages: The stages in their order: name in checkpoints and logs -> value that `remaining` yields. The last stage
            has config.max_train_steps steps. The name "export" is reserved.
        device: Device to train on. None means config.device.

    Attributes:
        stage: Name of the current stage.
        stage_step: Number of steps made in the current stage.
        global_step: Number of steps made in the whole run.
        nonfinite: Number of steps so far whose loss or gradient was not finite.
        results: Results of finished stages as plain values, kept in checkpoints. results["seconds"] has the time spent
            in each stage.

    Raises:
        ValueError: The folder holds another run or nothing to continue, or the processes cannot be divided as
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
        self._components: dict[str, Any] = {}  # what the current stage adds to checkpoints
        self._checked = False  # whether check_continues was called
        self._student: torch.nn.Module | None = None
        self._others: Mapping[str, Mapping[str, torch.nn.Module]] = {}
        self._open = ExitStack()
        self.ranks.on_first(lambda: run_folder.check(config))

    def __enter__(self) -> "Run":
        """Lock the folder and look for a checkpoint to continue from.

        Raises:
            ValueError: Another run writes into the folder, or has done so since this object was created, or all
                checkpoints are damaged.
        """
        config = self.config
        with ExitStack() as stack:

            def lock() -> list[Path]:
                stack.enter_context(locked(self.output_dir))
                remove_dead(self.output_dir)
                return run_folder.check(config)

            checkpoints = self.ranks.on_first(lock)
            stack.enter_context(self.signals)
            torch.manual_seed(config.seed)  # only a model with dropout would draw from it
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
            self._student, self._others, self._components, self._saved = None, {}, {}, None  # frees the models
            if self.log is not None:
                self.log.close()

    # Continuing an earlier call.

    def check_continues(self, free: tuple[str, ...] = ()) -> dict[str, Any] | None:
        """Check that the checkpoint can be continued with this config, before anything else is done.

        Args:
            free: Names of options that may differ; see RunConfig.check_continues.

        Returns the config that the checkpoint was made with, or None if there is no checkpoint.

        Raises:
            ValueError: Options differ, the checkpoint belongs to another kind of run, or it cannot be extended.
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
        """Register the models to be kept in checkpoints, and load them from the checkpoint that is continued.

        Deletes everything that an earlier call wrote into the folder after that checkpoint.

        Args:
            student: Model whose trainable parameters are kept in every stage.
            others: stage -> prefix -> model. All parameters of such a model are kept in that stage, under the prefix.

        Raises:
            ValueError: The checkpoint belongs to another model.
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
        """Return the tensors of the models that checkpoints keep in this stage, by name."""
        found = {name: p for name, p in self._student.named_parameters() if p.requires_grad}
        for prefix, model in self._others.get(self.stage, {}).items():
            found |= {f"{prefix}.{name}": p for name, p in model.named_parameters()}
        return found

    # Stages.

    def remaining(self) -> Iterator[Stage]:
        """Iterate over the remaining stages. The caller runs each stage before it asks for the next.

        A checkpoint is saved at the end of each stage. Leaving the loop with `break` leaves the stage unfinished.

        Raises:
            TrainingStopped: A signal came after the steps of a stage. The end of the stage has been saved.
            OSError: The checkpoint could not be written.
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
        """Register the objects that this stage's checkpoints hold in addition to the models, and load their states.

        States are loaded when the run continues in the middle of the stage. The state must have all its tensors
        already; for PyTorch's Adam, `fill_state` of run/optimizer.py creates them.

        Args:
            components: Objects with state_dict and load_state_dict, by name. None is left out.

        Raises:
            ValueError: The checkpoint was made with other components.
        """
        self._components = {name: part for name, part in components.items() if part is not None}
        if self._saved is not None:
            if self._saved.components and set(self._saved.components) != self._components.keys():
                names = ", ".join(self._saved.components), ", ".join(self._components)
                raise ValueError(f"{self._saved.path} was made with the components {names[0]}; expected {names[1]}")
            for name in self._saved.components:
                self._saved.load_component(name, self._components[name])
        self._saved = None

    def steps(self, count: int, samples: int, validate: Callable[[], None] | None = None) -> Iterator[int]:
        """Iterate over the remaining steps of the stage, numbered from 0.

        Checkpoints and validations that are due are made between the steps. The validation of the step that a run
        continues from may still be due and is then made first.

        Args:
            count: Number of steps of the stage.
            samples: Number of samples per step, over all ranks.
            validate: Validation of this stage. None for a stage without validation.

        Raises:
            TrainingStopped: A signal came. The step has been saved.
            OSError: A checkpoint could not be written.
            RuntimeError: The run continues in the middle of this stage, and `register` was not called.
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
        """Step the optimizer, or skip the step if the loss or a gradient is not finite.

        Returns the norm of the gradient, or None if the step was skipped.

        Raises:
            TrainingDiverged: See `finite`.
        """
        norm = optimizer.step() if math.isfinite(loss) else optimizer.skip()
        self.finite(math.nan if norm is None else norm)
        return norm

    def finite(self, value: float) -> bool:
        """Return whether `value` is finite, and count the step if it is not.

        Raises:
            TrainingDiverged: There were more than config.max_nonfinite_steps such steps.
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
        """Return step, stage and stage_step as in the rows of logs."""
        return {"step": self.global_step, "stage": self.stage, "stage_step": self.stage_step}

    def save(self) -> None:
        """Write a checkpoint.

        Raises:
            OSError: It could not be written. The earlier ones are untouched.
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
        self.signals.unsaved = True  # a signal waits until the checkpoint is written
        save_checkpoint(self.output_dir, self.global_step, self.trained(), state, limit, self.ranks)
        self.signals.unsaved = before

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time spent in the `with` block to results["seconds"][name]."""
        start = time.perf_counter()
        yield
        seconds = self.results["seconds"]
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start

    @property
    def _main_stage(self) -> str:
        return list(self.stages)[-1]

    def _keeps_end(self) -> bool:
        """Return whether the checkpoint after the stage's last step keeps the components, for an extension."""
        return self.stage == self._main_stage and self.config.can_be_extended

    def _validate_if_due(self, count: int, validate: Callable[[], None] | None) -> None:
        every = self.config.validation.steps
        due = every and (self.global_step % every == 0 or self.stage_step == count)
        if due and self.stage_step and validate is not None:
            validate()


def newest(checkpoints: list[Path], ranks: Ranks) -> Checkpoint | None:
    """Return the first undamaged checkpoint, None if the list is empty. Skipped ones are reported on standard error.

    Raises:
        ValueError: All checkpoints are damaged.
    """
    for number, path in enumerate(checkpoints, 1):
        try:
            return Checkpoint(path, ranks, ENTRIES)
        except ValueError as error:
            if number == len(checkpoints):
                raise
            if ranks.first:
                print(f"{error}; continuing from the checkpoint before it", file=sys.stderr)
    return None
