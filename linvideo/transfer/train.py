"""The run: trajectories -> warm-up -> sensitivity -> selection -> fine-tuning -> export, resumable at every step."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel

from linvideo.models import Training, convert, finalize, wan_transformer
from linvideo.models.branches import feature_weights, gates
from linvideo.run import run_folder
from linvideo.run.gradient import autocast
from linvideo.run.optimizer import StudentOptimizer, clip_gradients, fill_state
from linvideo.run.pipeline_run import PipelineRun
from linvideo.trajectories.experts import Expert, choose_expert
from linvideo.trajectories.files import write_cached, write_json
from linvideo.trajectories.store import StateBatch
from linvideo.transfer.gradient_step import GradientStep
from linvideo.transfer.objectives import ObjectiveConfig
from linvideo.transfer.selection import add_penalties, initial_r, lowest, round_r
from linvideo.transfer.sensitivity import layer_sensitivity, velocity_error
from linvideo.transfer.student import make_student, mixed, training_teacher
from linvideo.transfer.train_config import TrainConfig
from linvideo.transfer.warmup import attention_output_errors, load_feature_maps


@dataclass
class TrainResult:
    """What a run made.

    Args:
        pipeline: the teacher's with the student in its transformer's place, as saved in pipeline_path; of several
            processes the first has it, the others None.
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


class Trainer(PipelineRun):
    """Selective transfer as `config` says; arguments and errors are PipelineRun's."""

    config: TrainConfig
    stages = ("warmup", "sensitivity", "selection", "finetune", "export")
    validated = ("selection", "finetune")

    def __init__(
        self,
        config: TrainConfig,
        teacher_pipeline: Any = None,
        prompts: list[str] | None = None,
        images: Sequence[Any] | None = None,
    ):
        super().__init__(config, teacher_pipeline, prompts, images)
        self.target = config.selection.target(len(self.teacher.blocks))
        mixed(self.teacher, config)  # raises now what it would raise after hours of sampling
        config.lora.check(self.teacher)

    def _choose_expert(self) -> Expert:
        return choose_expert(self.pipeline, self.config.expert, self.config.trajectories.guidance_scale_2)

    def train(self) -> TrainResult:
        """Run, or finish, all stages.

        Raises:
            ValueError: another run writes into the folder, the trajectories there belong to another request, or the
                checkpoint to another config; or no
                learned r fell below 0.5 with selection.rounding "threshold".
            TrainingDiverged: see config.max_nonfinite_steps.
            TrainingStopped: SIGTERM or Ctrl-C came; between two optimizer steps a checkpoint was saved first.
            OSError: a checkpoint could not be written, say on a full disk; the earlier ones are untouched.
        """
        with self._only_writer():
            self._run()
        return TrainResult(
            pipeline=self._with_student(self.exported) if self.ranks.first else None,
            pipeline_path=self.output_dir / "pipeline",
            layers_linear=self.results["linear_layers"],
            r=self.results.get("r", {}),
            sensitivity=self.results.get("sensitivity", {}),
            sensitivity_floor=self.results.get("sensitivity_floor"),
            seconds=self.results["seconds"],
        )

    def _check_continues(self, saved: Any, free: tuple[str, ...] = ()) -> None:
        # until layers are selected nothing has depended on how that is done
        free += () if "linear_layers" in saved["results"] else ("selection.rounding",)
        super()._check_continues(saved, free)

    def warmed_up(self, layers: list[int]) -> torch.nn.Module:
        """A copy of the teacher's transformer with `layers` linear after warm-up only: what fine-tuning starts from.

        Raises:
            ValueError: this folder's warm-up has not run, or not with these layers.
        """
        base = wan_transformer(self.pipeline, self.expert.component)
        model = convert(base, layers=layers, mode="linear", feature_map=self.config.feature_map)
        return load_feature_maps(model, self.output_dir / run_folder.FEATURE_MAPS)

    # The stages, in order.

    def _warmup(self) -> None:
        config, weights = self.config.warmup, feature_weights(self.student)
        if weights:
            optimizer = torch.optim.Adam(weights.values(), lr=config.learning_rate)
            fill_state(optimizer)
            self._register(optimizer=optimizer)
            positions, counts = self.ranks.part(config.batch_size)
            for step in self._steps(config.max_train_steps, config.batch_size):
                batch = self._draw(positions, counts, self.stage, step)
                with eager(), autocast(self.config, self.device):
                    errors = attention_output_errors(self.student, batch, backward=True, ranks=self.ranks)
                error = float(torch.stack(list(errors.values())).mean())
                norm = clip_gradients(list(weights.values()), math.inf)
                if self._finite(error + norm):
                    optimizer.step()
                optimizer.zero_grad()
                self._report(loss=error)
        path = self.output_dir / run_folder.FEATURE_MAPS
        self.ranks.on_first(lambda: write_cached(path, weights, "maps"))

    def _sensitivity(self) -> None:
        if self.config.sensitivity.num_states:
            show = self.config.progress and self.ranks.first
            with eager(), autocast(self.config, self.device):
                errors, floor = layer_sensitivity(self.student, self._held_states, show, self.ranks)
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
        content = {"method": config.method, **summary}
        self.ranks.on_first(lambda: write_json(self.output_dir / "selection.json", content))

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
        for step in self._steps(config.max_train_steps, gradient.global_batch):
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
        trained = list(self._trained().values())
        ema = EMAModel(trained, decay=config.ema_decay) if config.use_ema else None
        self._register(optimizer=optimizer, gradient=gradient, **({} if ema is None else {"ema": ema}))
        for step in self._steps(config.max_train_steps, gradient.global_batch):
            name, loss = gradient(step)
            norm = self._optimize(optimizer, loss)
            if ema is not None and norm is not None:
                ema.step(trained)
            self._report(
                loss=loss,
                **{f"loss_{name}": loss},
                grad_norm=norm,
                learning_rate=optimizer.learning_rate,
                num_linear=len(self.results["linear_layers"]),
            )
        if ema is not None:
            ema.copy_to(trained)

    def _training(self) -> Training:
        config, general = self.config, super()._training()
        steps = {
            "warm-up": config.warmup.max_train_steps if feature_weights(self.student) else 0,
            "selection": config.selection.max_train_steps if config.selection.method == "learned" else 0,
            "fine-tuning": config.max_train_steps,
        }
        own = {"layers": config.selection.method, "objective": config.objective.name}
        own |= {"expert": config.expert, "LoRA rank": config.lora.rank}
        return replace(general, method="selective transfer", steps=steps, settings=own | general.settings)

    # What the stages share.

    def _make_models(self) -> None:
        self.student = make_student(self.teacher, self.config, self.ranks)
        self.teacher = training_teacher(self.teacher, self.student, self.config, self.ranks)

    def _gradient_step(self, objective: ObjectiveConfig) -> GradientStep:
        models_and_data = (self.student, self.teacher, self.store, self.prompts, self.grid)
        return GradientStep(*models_and_data, self.config, self.stage, objective, self.ranks)

    def _draw(self, positions: list[int], counts: bool, *name: int | str) -> StateBatch:
        batch = self.store.draw(positions, self.config.seed, *name, prompts=self.prompts, device=self.device)
        return replace(batch, counts=counts)

    def _held_states(self) -> Iterator[StateBatch]:
        """This rank's part of the same teacher states on every call: for sensitivity and the cost of rounding."""
        count, size = self.config.sensitivity.num_states, self.config.sensitivity.batch_size
        mine, counts = self.ranks.part(count)
        most = -(-count // self.ranks.data_size)  # of a rank: all make as many forwards
        for start in range(0, most, size):
            chosen = mine[start : start + size]
            yield self._draw(chosen or mine[:1], counts and bool(chosen), "held")

    def _held_error(self) -> float | None:
        if not self.config.sensitivity.num_states:
            return None
        with eager(), autocast(self.config, self.device):
            return velocity_error(self.student, self._held_states(), self.ranks)


def eager() -> Any:
    """No compilation for what runs a few times only, and with hooks that differ from call to call."""
    return torch.compiler.set_stance("force_eager")
