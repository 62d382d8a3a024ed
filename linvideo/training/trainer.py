"""The run: trajectories -> warm-up -> sensitivity -> selection -> fine-tuning -> export, resumable at every step.

A run is a folder. Stages that train count their optimizer steps in one global step; a checkpoint names the stage and
the step in it, and everything drawn at random is drawn by (seed, stage, step), so a continued run does what an
uninterrupted one would have done.
"""

import copy
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from linvideo.models import convert, finalize, save_pipeline, wan_transformer
from linvideo.training import run_folder
from linvideo.training.branches import feature_weights, gates
from linvideo.training.checkpoint import load_checkpoint, remove_newer, save_checkpoint
from linvideo.training.config import TrainConfig
from linvideo.training.files import write_json, write_safetensors
from linvideo.training.flow import sampler_grid
from linvideo.training.metrics import MetricsLog
from linvideo.training.objectives import ObjectiveConfig
from linvideo.training.optimizer import StudentOptimizer
from linvideo.training.prompts import encode_prompts, read_prompts
from linvideo.training.seeding import random_state, set_random_state
from linvideo.training.selection import add_penalties, initial_r, lowest, round_r
from linvideo.training.sensitivity import layer_sensitivity, velocity_error
from linvideo.training.step import GradientStep, autocast
from linvideo.training.store import StateBatch
from linvideo.training.trajectories import collect, latent_shape, open_store
from linvideo.training.warmup import attention_output_errors, load_feature_maps

STAGES = ("warmup", "sensitivity", "selection", "finetune", "export")


class TrainingDiverged(RuntimeError):
    """Too many steps had a non-finite loss or gradient."""


class TrainingStopped(RuntimeError):
    """SIGTERM came, as schedulers send it before they take a machine away."""

    def __init__(self, when: str):
        super().__init__(f"stopped by SIGTERM {when}; continue with --resume_from_checkpoint latest")


@dataclass
class TrainResult:
    """What a run made.

    Args:
        pipeline: the teacher's with the student as transformer, as saved in pipeline_path.
        layers_linear: 0-based.
        r: layer -> value before rounding; empty unless it was learned.
        sensitivity: layer -> velocity error with it alone linear, after warm-up; sensitivity_floor: with none linear.
        seconds: stage -> time spent.
    """

    pipeline: Any
    pipeline_path: Path
    layers_linear: list[int]
    r: dict[int, float]
    sensitivity: dict[int, float]
    sensitivity_floor: float | None
    seconds: dict[str, float]


class Trainer:
    """One run of `config`.

    Args:
        teacher_pipeline: a WanPipeline in memory, in place of config.pretrained_model_name_or_path. Its transformer is
            copied, not changed; training runs on that transformer's device.
        prompts: captions, in place of config.prompts.prompts_file.

    Raises:
        ValueError: before anything is written: no teacher, a pipeline or settings that do not fit it, a folder in use.
    """

    def __init__(self, config: TrainConfig, teacher_pipeline: Any = None, prompts: list[str] | None = None):
        self.config, self.output_dir = config, Path(config.output_dir)
        self.checkpoints = run_folder.check(config)
        self.captions = read_prompts(config.prompts.prompts_file) if prompts is None else list(prompts)
        if not self.captions:
            raise ValueError("expected at least one prompt, got none")
        self.pipeline = run_folder.load_teacher(config) if teacher_pipeline is None else teacher_pipeline
        self.teacher = wan_transformer(self.pipeline)
        if getattr(self.pipeline, "transformer_2", None) is not None:
            raise ValueError("expected a pipeline with one transformer, got one with two experts (transformer_2)")
        if type(self.teacher) is not WanTransformer3DModel:
            raise ValueError(f"expected a stock WanTransformer3DModel, got {type(self.teacher).__name__}")
        if self.teacher.config.in_channels != self.teacher.config.out_channels:
            raise ValueError("expected a text-to-video model, got one that takes image conditions beside the latents")
        self.device = self.teacher.device
        self.target = config.selection.target(len(self.teacher.blocks))
        self._convert(copy=False)  # raises now what it would raise after hours of sampling
        latent_shape(self.pipeline, config.trajectories)
        self.grid = sampler_grid(self.pipeline.scheduler, config.trajectories.num_inference_steps)

        self.stage, self.stage_step, self.global_step, self.nonfinite = STAGES[0], 0, 0, 0
        self.in_step = self.stop = False
        self.results: dict[str, Any] = {"seconds": {}}  # of finished stages; plain values
        self.components: dict[str, Any] = {}  # what the current stage adds to a checkpoint
        self.restored: dict[str, Any] = {}  # their state in the checkpoint we continue from

    def train(self) -> TrainResult:
        """Run, or finish, all stages.

        Raises:
            ValueError: the trajectories there belong to another request, or the checkpoint to another config; or no
            learned r fell below 0.5 with selection.rounding "threshold".
            TrainingDiverged: see config.max_nonfinite_steps.
            TrainingStopped: SIGTERM came; between two optimizer steps a checkpoint was saved first.
            OSError: a checkpoint could not be written, say on a full disk; the earlier ones are untouched.
        """
        with self._stoppable():
            return self._train()

    def _train(self) -> TrainResult:
        config = self.config
        torch.manual_seed(config.seed)  # nothing here draws from it; a model with dropout would
        saved = self._load_newest()
        if saved is not None:
            config.check_continues(saved[1]["config"], "linear_layers" in saved[1]["results"])
        if config.overwrite_output_dir:
            run_folder.clear(self.output_dir)
        with self._timed("trajectories"):
            cache = self.output_dir / run_folder.PROMPT_CACHE
            self.prompts = encode_prompts(self.pipeline, self.captions, config.prompts, cache)
            path = config.trajectories.path or self.output_dir / "trajectories"
            self.store = open_store(path, self.pipeline, self.prompts, config.trajectories, config.seed)
            self.store.verify()
            config.save(self.output_dir / "config.yaml")
            collect(self.store, self.pipeline, self.prompts, config.progress)
        self._make_student()
        if saved is not None:
            self._restore(*saved)
            remove_newer(self.output_dir, self.global_step)
        self.log = MetricsLog(self.output_dir, config.report_to, self.global_step)
        try:
            for stage in STAGES[STAGES.index(self.stage) :]:
                self.stage = stage
                with self._timed(stage):
                    getattr(self, f"_{stage}")()
                self._end_stage()
        finally:
            self.log.close()
        return TrainResult(
            pipeline=self._student_pipeline(),
            pipeline_path=self.output_dir / "pipeline",
            layers_linear=self.results["linear_layers"],
            r=self.results.get("r", {}),
            sensitivity=self.results.get("sensitivity", {}),
            sensitivity_floor=self.results.get("sensitivity_floor"),
            seconds=self.results["seconds"],
        )

    def warmed_up(self, layers: list[int]) -> torch.nn.Module:
        """A copy of the teacher's transformer with `layers` linear after warm-up only: what fine-tuning starts from.

        Raises:
            ValueError: this folder's warm-up has not run, or not with these layers.
        """
        model = convert(self.teacher, layers=layers, mode="linear", feature_map=self.config.feature_map)
        return load_feature_maps(model, self.output_dir / run_folder.FEATURE_MAPS)

    # The stages, in order.

    def _warmup(self) -> None:
        config, weights = self.config.warmup, feature_weights(self.student)
        if weights:
            optimizer = torch.optim.Adam(weights.values(), lr=config.learning_rate)
            self._register(optimizer=optimizer)
            for step in self._steps(config.max_train_steps):
                batch = self._draw(config.batch_size, self.stage, step)
                with autocast(self.config, self.device):
                    errors = attention_output_errors(self.student, batch, backward=True)
                error = float(torch.stack(list(errors.values())).mean())
                if self._finite(error):
                    optimizer.step()
                optimizer.zero_grad()
                self._report(loss=error)
        write_safetensors(self.output_dir / run_folder.FEATURE_MAPS, weights)

    def _sensitivity(self) -> None:
        if self.config.sensitivity.num_states:
            with autocast(self.config, self.device):
                errors, floor = layer_sensitivity(self.student, self._held_states, self.config.progress)
            self.results |= {"sensitivity": errors, "sensitivity_floor": floor}

    def _selection(self) -> None:
        config, summary = self.config.selection, {}
        if config.method == "layers":
            layers = sorted(config.layers)
        elif config.method == "sensitivity":
            layers = lowest(self.results["sensitivity"], self.target)
        else:
            self._learn_r()
            self.results["r"] = {layer: r.item() for layer, r in gates(self.student).items()}
            layers = round_r(self.results["r"], self.target, config.rounding)
            summary["error_mixed"] = self._held_error()
        finalize(self.student, layers)
        summary["error_rounded"] = self._held_error()
        self.results["linear_layers"] = layers
        summary |= {name: value for name, value in self.results.items() if name != "seconds"}
        write_json(self.output_dir / "selection.json", {"method": config.method, **summary})

    def _learn_r(self) -> None:
        config, named_r = self.config.selection, gates(self.student)
        if config.r_from_sensitivity and not self.stage_step:
            with torch.no_grad():
                for layer, value in initial_r(self.results["sensitivity"]).items():
                    named_r[layer].fill_(value)
        optimizer = StudentOptimizer(
            self.student, self.config.optimizer, config.max_train_steps, config.r_learning_rate
        )
        gradient = self._gradient_step(replace(self.config.objective, name=config.objective))
        self._register(optimizer=optimizer, gradient=gradient)
        for step in self._steps(config.max_train_steps):
            name, task = gradient(step)
            penalties = add_penalties(list(named_r.values()), self.target, config, step)
            loss = task + penalties["loss_con"] + penalties["loss_reg"]
            norm = self._optimize(optimizer, loss)
            values = dict(zip(map(str, named_r), torch.cat(optimizer.r).tolist(), strict=True))
            self._report(
                loss=loss,
                **{f"loss_{name}": task},
                **penalties,
                grad_norm=norm,
                learning_rate=optimizer.learning_rate,
                num_linear=sum(value < 0.5 for value in values.values()),
                r=values,
            )

    def _finetune(self) -> None:
        config = self.config
        optimizer = StudentOptimizer(self.student, config.optimizer, max(1, config.max_train_steps))
        gradient = self._gradient_step(config.objective)
        ema = EMAModel(self.student.parameters(), decay=config.ema_decay) if config.use_ema else None
        self._register(optimizer=optimizer, gradient=gradient, **({} if ema is None else {"ema": ema}))
        if ema is not None:
            ema.to(self.device)  # a restored one is on the CPU
        for step in self._steps(config.max_train_steps):
            name, loss = gradient(step)
            norm = self._optimize(optimizer, loss)
            if ema is not None and norm is not None:
                ema.step(self.student.parameters())
            self._report(
                loss=loss,
                **{f"loss_{name}": loss},
                grad_norm=norm,
                learning_rate=optimizer.learning_rate,
                num_linear=len(self.results["linear_layers"]),
            )
        if ema is not None:
            ema.copy_to(self.student.parameters())

    def _export(self) -> None:
        self.student.eval().requires_grad_(False)
        save_pipeline(self._student_pipeline(), self.output_dir / "pipeline", overwrite=True)

    # What the stages share.

    def _make_student(self) -> None:
        self.student = self._convert(copy=True)
        self.student.float().requires_grad_(True).train()
        if self.config.gradient_checkpointing:
            self.student.enable_gradient_checkpointing()

    def _convert(self, copy: bool) -> torch.nn.Module:
        selection, feature_map = self.config.selection, self.config.feature_map
        layers = "all" if selection.layers is None else selection.layers
        return convert(self.teacher, layers, mode="mixed", feature_map=feature_map, r_init=selection.r_init, copy=copy)

    def _student_pipeline(self) -> Any:
        pipeline = copy.copy(self.pipeline)
        pipeline.transformer = self.student
        return pipeline

    def _gradient_step(self, objective: ObjectiveConfig) -> GradientStep:
        models_and_data = (self.student, self.teacher, self.store, self.prompts, self.grid)
        return GradientStep(*models_and_data, self.config, self.stage, objective)

    def _draw(self, batch_size: int, *name: int | str) -> StateBatch:
        return self.store.draw(batch_size, self.config.seed, *name, prompts=self.prompts, device=self.device)

    def _held_states(self) -> Iterator[StateBatch]:
        """The same teacher states on every call: for sensitivity and the cost of rounding."""
        count, size = self.config.sensitivity.num_states, self.config.sensitivity.batch_size
        for start in range(0, count, size):
            yield self._draw(min(size, count - start), "held", start)

    def _held_error(self) -> float | None:
        if not self.config.sensitivity.num_states:
            return None
        with autocast(self.config, self.device):
            return velocity_error(self.student, self._held_states())

    def _optimize(self, optimizer: StudentOptimizer, loss: float) -> float | None:
        """Returns the gradient norm, None when the step was skipped."""
        if math.isfinite(loss):
            norm = optimizer.step()
        else:
            norm = optimizer.skip()
        self._finite(math.nan if norm is None else norm)
        return norm

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

    # Progress and checkpoints.

    def _steps(self, count: int) -> Iterator[int]:
        """The stage's remaining steps, with counting, a progress bar, and checkpoints when they are due."""
        first, show = self.stage_step, self.config.progress
        self.bar = tqdm(range(first, count), desc=self.stage, initial=first, total=count, disable=not show)
        for step in self.bar:
            self.global_step += 1
            self.stage_step = step + 1
            self.in_step = True
            yield step
            stop = self.stop
            if stop or (self.global_step % self.config.checkpointing_steps == 0 and self.stage_step < count):
                self._save()
            self.in_step = False
            if stop:  # a signal since then waits for the next step
                raise TrainingStopped(f"after step {self.stage_step} of {self.stage}, which is saved")

    def _report(self, **values: Any) -> None:
        kept = {name: value for name, value in values.items() if not isinstance(value, float) or math.isfinite(value)}
        kept = {name: value for name, value in kept.items() if value is not None}
        self.log.write({"step": self.global_step, "stage": self.stage, "stage_step": self.stage_step, **kept})
        shown = {"loss": f"{values['loss']:.4f}"}
        if "num_linear" in values:
            shown["linear"] = values["num_linear"]
        if "r" in values:
            shown["r"] = f"{min(values['r'].values()):.2f}-{max(values['r'].values()):.2f}"
        self.bar.set_postfix(shown, refresh=False)

    def _register(self, **components: Any) -> None:
        """Name what this stage's checkpoints hold beside the model; loads it when the run was restored into the
        stage."""
        self.components = components
        for name, component in components.items():
            if name in self.restored:
                component.load_state_dict(self.restored[name])
        self.restored = {}

    def _end_stage(self) -> None:
        self.components, self.stage_step = {}, 0
        if self.stage != STAGES[-1]:
            self.stage = STAGES[STAGES.index(self.stage) + 1]
            self._save()
        if self.stop:
            raise TrainingStopped("at the end of a stage, which is saved")

    def _save(self) -> None:
        state = {
            "config": self.config.to_dict(),
            "stage": self.stage,
            "stage_step": self.stage_step,
            "global_step": self.global_step,
            "nonfinite": self.nonfinite,
            "results": self.results,
            "components": {name: component.state_dict() for name, component in self.components.items()},
            "random": random_state(self.device),
        }
        limit = self.config.checkpoints_total_limit
        save_checkpoint(self.output_dir, self.global_step, self.student.state_dict(), state, limit)

    def _load_newest(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """The newest checkpoint that is whole; those passed over are named."""
        for number, path in enumerate(self.checkpoints, 1):
            try:
                return load_checkpoint(path)
            except ValueError as error:
                if number == len(self.checkpoints):
                    raise
                print(f"{error}; continuing from the one before it", file=sys.stderr)
        return None

    def _restore(self, model: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        self.stage, self.stage_step = state["stage"], state["stage_step"]
        self.global_step, self.nonfinite = state["global_step"], state["nonfinite"]
        self.results, self.restored = state["results"], state["components"]
        if "linear_layers" in self.results:
            finalize(self.student, self.results["linear_layers"])
        self.student.load_state_dict(model)
        set_random_state(state["random"], self.device)

    @contextmanager
    def _stoppable(self) -> Iterator[None]:
        """SIGTERM waits for the end of an optimizer step; elsewhere everything worth keeping is on disk already."""

        def terminate(*_):
            self.stop = True
            if not self.in_step:
                raise TrainingStopped("between the steps")

        if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
            yield
            return
        before = signal.signal(signal.SIGTERM, terminate)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds = self.results["seconds"]
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
