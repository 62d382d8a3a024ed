"""The run: trajectories -> warm-up -> sensitivity -> selection -> fine-tuning -> export, resumable at every step."""

import copy
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.training_utils import EMAModel

from linvideo.models import convert, finalize, save_pipeline, wan_transformer
from linvideo.training import run_folder
from linvideo.training.branches import feature_weights, gates
from linvideo.training.checkpoint import remove_newer
from linvideo.training.config import TrainConfig
from linvideo.training.experts import choose_expert
from linvideo.training.files import write_json, write_safetensors
from linvideo.training.flow import sampler_grid
from linvideo.training.images import check_images, encode_images, takes_images
from linvideo.training.objectives import ObjectiveConfig
from linvideo.training.optimizer import StudentOptimizer, clip_gradients, fill_state
from linvideo.training.parallel import Ranks, check_divisible, connect
from linvideo.training.prompts import PromptEmbeddings, choose_prompts, encode_prompts
from linvideo.training.resumable import ResumableRun
from linvideo.training.selection import add_penalties, initial_r, lowest, round_r
from linvideo.training.sensitivity import layer_sensitivity, velocity_error
from linvideo.training.sharding import gather
from linvideo.training.step import GradientStep, autocast
from linvideo.training.store import StateBatch, TrajectoryStore
from linvideo.training.student import make_student, mixed, training_teacher
from linvideo.training.trajectories import collect, kept_steps, latent_shape, open_store, with_flow_shift
from linvideo.training.validator import Validator
from linvideo.training.warmup import attention_output_errors, load_feature_maps

PARTS = ("text_encoder", "image_encoder", "vae", "transformer", "transformer_2")


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


class Trainer(ResumableRun):
    """One run of `config`; under torchrun, this process's part of it.

    Args:
        teacher_pipeline: a WanPipeline in memory, in place of config.pretrained_model_name_or_path. Its transformer is
            copied, not changed; training runs on that transformer's device. Under torchrun, with offload_teacher or
            with attention_backend it is changed: sharded, or given hooks or that backend. Of two experts the one to be
            trained must be stock, the other may be converted already.
        prompts: captions, in place of config.prompts.prompts_file.
        images: with `prompts`, of an image-to-video pipeline: a PIL image or an image file for each.

    Raises:
        ValueError: before anything is written: no teacher, a pipeline or settings that do not fit it, a folder in use.
    """

    stages = ("warmup", "sensitivity", "selection", "finetune", "export")
    validated = ("selection", "finetune")

    def __init__(
        self,
        config: TrainConfig,
        teacher_pipeline: Any = None,
        prompts: list[str] | None = None,
        images: Sequence[Any] | None = None,
    ):
        teacher = None if teacher_pipeline is None else wan_transformer(teacher_pipeline)
        device = connect(config.device if teacher is None else str(teacher.device))
        ranks = Ranks.connected(config.parallel, device)
        super().__init__(config, ranks, checkpoints=ranks.on_first(lambda: run_folder.check(config)))
        self.captions, self.images = choose_prompts(config.prompts.prompts_file, prompts, images)
        pipeline = run_folder.load_teacher(config, device) if teacher is None else teacher_pipeline
        self.pipeline = with_flow_shift(pipeline, config.trajectories.flow_shift)
        self.expert = choose_expert(self.pipeline, config.expert, config.trajectories.guidance_scale_2)
        self.teacher = wan_transformer(self.pipeline, self.expert.component)
        if type(self.teacher) is not WanTransformer3DModel:
            raise ValueError(f"expected a stock WanTransformer3DModel, got {type(self.teacher).__name__}")
        check_images(self.pipeline, self.images)
        if config.attention_backend is not None:
            self.teacher.set_attention_backend(config.attention_backend)
        self.target = config.selection.target(len(self.teacher.blocks))
        mixed(self.teacher, config)  # raises now what it would raise after hours of sampling
        config.lora.check(self.teacher)
        check_divisible(self.teacher.config, latent_shape(self.pipeline, config.trajectories), config.parallel)
        self.grid = sampler_grid(self.pipeline.scheduler, config.trajectories.num_inference_steps)
        kept_steps(self.grid[0], config.trajectories, self.expert)

    def collect(self, worker: int = 0, workers: int = 1) -> TrajectoryStore:
        """Only make trajectories: of several workers that share the store, on whatever machines, this one's part.

        Raises:
            ValueError: as `train`.
        """
        with self._stoppable():
            self._open_store()
            shards = range(worker, self.store.num_shards, workers)
            collect(self.store, self.pipeline, self.prompts, self.config.progress, shards)
        return self.store

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
        config, ranks = self.config, self.ranks
        torch.manual_seed(config.seed)  # nothing here draws from it; a model with dropout would
        saved = self._load_newest()
        if saved is not None:
            selected = "linear_layers" in saved["results"]
            config.check_continues(saved["config"], selected, ranks.size, saved["processes"])
        if config.overwrite_output_dir:
            ranks.on_first(lambda: run_folder.clear(self.output_dir))
        with self._timed("trajectories"):
            self._open_store()
            self.validator = Validator(config, self.pipeline, self.prompts, self.store, ranks)
            # every process is a worker of its own, with a whole teacher
            shards = ranks.on_first(self.store.missing_shards)[ranks.rank :: ranks.size]
            collect(self.store, self.pipeline, self.prompts, config.progress and ranks.first, shards)
            while not self.store.complete:  # others may take hours longer, which no collective would wait for
                time.sleep(1)
        idle = self._idle_parts()
        for part in idle:
            # the first rank's text encoder is exported
            part.to("meta" if part is self.pipeline.text_encoder and not ranks.first else "cpu")
        self._make_student()
        if saved is not None:
            self._restore(saved)
            ranks.on_first(lambda: remove_newer(self.output_dir, self.global_step))
        ranks.on_first(lambda: self.validator.take_back(self.global_step))
        self._run_stages()
        for part in idle if ranks.size == 1 else ():
            part.to(self.device)
        return TrainResult(
            pipeline=self._with_student(self.exported) if ranks.first else None,
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
        base = wan_transformer(self.pipeline, self.expert.component)
        model = convert(base, layers=layers, mode="linear", feature_map=self.config.feature_map)
        return load_feature_maps(model, self.output_dir / run_folder.FEATURE_MAPS)

    # The stages, in order.

    def _open_store(self) -> None:
        """Embeddings and the store of the trajectories, complete or not."""
        config, ranks = self.config, self.ranks
        path = config.trajectories.path or self.output_dir / "trajectories"
        settings = (config.trajectories, config.seed, self.expert)

        def prepare() -> None:
            self.prompts = self._encode()
            self.store = open_store(path, self.pipeline, self.prompts, *settings)
            config.save(self.output_dir / "config.yaml")

        ranks.on_first(prepare)
        if not ranks.first:  # what the first has computed is read back
            self.prompts = self._encode()
            self.store = open_store(path, self.pipeline, self.prompts, *settings)
        damage = ranks.gather_objects(self._damage_in_store())
        if found := next(filter(None, damage), None):
            raise ValueError(found)

    def _encode(self) -> PromptEmbeddings:
        config, folder = self.config, self.output_dir
        prompts = encode_prompts(self.pipeline, self.captions, config.prompts, folder / run_folder.PROMPT_CACHE)
        if takes_images(self.pipeline):
            size_and_cache = (config.trajectories, folder / run_folder.IMAGE_CACHE)
            prompts.latents, prompts.image_embeds = encode_images(self.pipeline, self.images, *size_and_cache)
        return prompts

    def _idle_parts(self) -> list[torch.nn.Module]:
        """What training does not need; Wan's text encoder alone is 11 GB."""
        parts = [getattr(self.pipeline, name, None) for name in PARTS]
        return [part for part in parts if part is not None and part is not self.teacher]

    def _damage_in_store(self) -> str | None:
        try:
            self.store.verify(self.ranks.rank, self.ranks.size)
        except ValueError as error:
            return str(error)

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
        self.ranks.on_first(lambda: write_safetensors(path, weights))

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

    def _export(self) -> None:
        self.student.eval().requires_grad_(False)
        self.exported = gather(self.student, self.ranks)
        path = self.output_dir / "pipeline"
        self.ranks.on_first(lambda: save_pipeline(self._with_student(self.exported), path, overwrite=True))

    # What the stages share.

    def _make_student(self) -> None:
        self.student = make_student(self.teacher, self.config, self.ranks)
        self.teacher = training_teacher(self.teacher, self.student, self.config, self.ranks)

    def _with_student(self, student: torch.nn.Module) -> Any:
        pipeline = copy.copy(self.pipeline)
        setattr(pipeline, self.expert.component, student)
        return pipeline

    def _validate(self) -> None:
        """The student, in fine-tuning with use_ema its averaged weights, unless that was done before a kill."""
        if self.validator.done(self.global_step):
            return
        where = {"step": self.global_step, "stage": self.stage, "stage_step": self.stage_step}
        other = "transformer" if self.expert.component == "transformer_2" else "transformer_2"
        idle = getattr(self.pipeline, other, None)  # the other expert samples its part
        if idle is not None:
            idle.to(self.device)
        try:
            models, stop = (self.student, self.teacher), lambda: self.ranks.any(self.stop)
            self.validator(*models, where, self.trackers, self.components.get("ema"), stop)
        finally:
            if idle is not None:
                idle.to("cpu")

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

    def _optimize(self, optimizer: StudentOptimizer, loss: float) -> float | None:
        """Returns the gradient norm, None when the step was skipped."""
        norm = optimizer.step() if math.isfinite(loss) else optimizer.skip()
        self._finite(math.nan if norm is None else norm)
        return norm


def eager() -> Any:
    """No compilation for what runs a few times only, and with hooks that differ from call to call."""
    return torch.compiler.set_stance("force_eager")
