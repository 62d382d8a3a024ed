"""What every run that learns from a teacher pipeline shares: prompts, the teacher's trajectories, validation, and which
parts of the pipeline leave the GPU meanwhile. Trainer and Distiller have the models and the stages."""

import copy
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel

from linvideo.models import (
    FewStepScheduler,
    Training,
    choose_backend,
    save_pipeline,
    video_transformers,
    wan_transformer,
)
from linvideo.run import run_folder
from linvideo.run.checkpoint import remove_newer
from linvideo.run.metrics_log import read_metrics
from linvideo.run.optimizer import StudentOptimizer
from linvideo.run.parallel import Ranks, check_divisible, connect
from linvideo.run.run_config import RunConfig
from linvideo.run.session import ResumableRun, TrainingDiverged
from linvideo.run.sharding import gather
from linvideo.run.validation import Validator
from linvideo.trajectories.collect import (
    collect,
    kept_steps,
    latent_shape,
    store_request,
    with_flow_shift,
)
from linvideo.trajectories.experts import Expert
from linvideo.trajectories.flow import sampler_grid
from linvideo.trajectories.images import add_images, check_images
from linvideo.trajectories.prompts import PromptEmbeddings, choose_prompts, encode_prompts
from linvideo.trajectories.store import TrajectoryStore
from linvideo.workspace import locked, remove_dead

MOST_SKIPPED = 0.5  # share of steps without a finite loss and gradient, above which a run is not exported
ENCODERS = ("text_encoder", "image_encoder", "vae")


class PipelineRun(ResumableRun):
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

    student_scheduler: FewStepScheduler | None = None  # of a student that has another sampler than its teacher

    def __init__(
        self,
        config: RunConfig,
        teacher_pipeline: Any = None,
        prompts: list[str] | None = None,
        images: Sequence[Any] | None = None,
    ):
        teacher = None if teacher_pipeline is None else wan_transformer(teacher_pipeline)
        device = connect(config.device if teacher is None else str(teacher.device))
        ranks = Ranks.connected(config.parallel, device)
        super().__init__(config, ranks, checkpoints=ranks.on_first(lambda: run_folder.check(config)))
        self.captions, self.images = choose_prompts(config.prompts.prompts_file, prompts, images)
        pipeline = run_folder.load_teacher(config) if teacher is None else teacher_pipeline
        self.pipeline = with_flow_shift(pipeline, config.trajectories.flow_shift)
        self.expert = self._choose_expert()
        self.teacher = wan_transformer(self.pipeline, self.expert.component)
        if type(self.teacher) is not WanTransformer3DModel:
            raise ValueError(f"expected a stock WanTransformer3DModel for a teacher, got {type(self.teacher).__name__}")
        check_images(self.pipeline, self.images)
        if config.attention_backend is not None:
            dtype = torch.bfloat16 if config.mixed_precision == "bf16" else None
            choose_backend(self.teacher, config.attention_backend, device, dtype)
        self.latent_shape = latent_shape(self.pipeline, config.trajectories)
        check_divisible(self.teacher.config, self.latent_shape, config.parallel)
        self.grid = sampler_grid(self.pipeline.scheduler, config.trajectories.num_inference_steps)
        kept_steps(self.grid[0], config.trajectories, self.expert)

    # What subclasses have beside their stages.

    def _choose_expert(self) -> Expert:
        raise NotImplementedError

    def _needs_trajectories(self) -> bool:
        return True

    def _check_continues(self, saved: Any, free: tuple[str, ...] = ()) -> None:
        """Raise ValueError when the run of the checkpoint `saved` cannot be continued; free: see check_continues."""
        self.config.check_continues(saved["config"], self.ranks.size, saved["processes"], free)
        earlier, stage = saved["config"]["max_train_steps"], saved["stage"]
        if stage == self.main_stage:
            self.config.check_length(earlier, saved["stage_step"])
        elif stage == self.stages[-1]:
            self.config.check_length(earlier, earlier)
            if self.config.max_train_steps != earlier:
                raise ValueError(
                    f"{saved.path} was made after the last step and cannot be extended: it has no optimizer state;"
                    " continue from an earlier checkpoint, --resume_from_checkpoint FOLDER"
                )

    def _make_models(self) -> None:
        """Set `student`, and whatever trains beside it; the teacher may be changed now."""
        raise NotImplementedError

    # The run.

    def collect(self, worker: int = 0, workers: int = 1) -> TrajectoryStore:
        """Only make trajectories: of several workers that share the store, on whatever machines, this one's part, also
        next to a run that trains in the folder.

        Raises:
            ValueError: as `train`.
        """
        with self._stoppable():
            self._open_data()
            shards = range(worker, self.store.num_shards, workers)
            self._bring_transformers()
            collect(self.store, self.pipeline, self.prompts, self.config.progress, shards)
        return self.store

    @contextmanager
    def _only_writer(self) -> Iterator[None]:
        """Hold the folder's lock, on the first rank, and stop at a signal.

        Raises:
            ValueError: another run writes there, or has done so since this one was made.
        """
        with ExitStack() as stack:

            def enter() -> list[Path]:
                stack.enter_context(locked(self.output_dir))
                remove_dead(self.output_dir)
                return run_folder.check(self.config)

            self.checkpoints = self.ranks.on_first(enter)
            with self._stoppable():
                yield

    def _run(self) -> None:
        """All stages, or what is left of them."""
        config, ranks = self.config, self.ranks
        torch.manual_seed(config.seed)  # nothing here draws from it; a model with dropout would
        saved = self._load_newest()
        if saved is not None:
            self._check_continues(saved)
        if config.overwrite_output_dir:
            ranks.on_first(lambda: run_folder.clear(self.output_dir))
        with self._timed("trajectories"):
            self._open_data()
            ranks.on_first(lambda: config.save(self.output_dir / "config.yaml"))
            self.validator = Validator(config, self.pipeline, self.prompts, self.request, ranks, self.student_scheduler)
            encoders = [part for name in ENCODERS if (part := getattr(self.pipeline, name, None)) is not None]
            for part in encoders:
                # the first rank's text encoder is exported
                part.to("meta" if part is self.pipeline.text_encoder and not ranks.first else "cpu")
            if self.store is not None:
                self._collect_together()
        others = [part for part in video_transformers(self.pipeline).values() if part is not self.teacher]
        for part in others:
            part.to("cpu")
        self.teacher.to(self.device)
        self._make_models()
        if saved is not None:
            self._restore(saved)
            ranks.on_first(lambda: remove_newer(self.output_dir, self.global_step))
        ranks.on_first(lambda: self.validator.take_back(self.global_step))
        self._run_stages()
        for part in (*encoders, *others) if ranks.size == 1 else ():
            part.to(self.device)

    def _open_data(self) -> None:
        """Embeddings and, where trajectories are needed, their store, complete or not."""
        config, ranks = self.config, self.ranks
        path = config.trajectories.path or self.output_dir / "trajectories"

        def read() -> None:
            self.prompts = self._encode()
            self.request = store_request(self.pipeline, self.prompts, config.trajectories, config.seed, self.expert)
            self.store = TrajectoryStore(path, self.request) if self._needs_trajectories() else None

        ranks.on_first(read)
        if not ranks.first:  # what the first has computed is read back
            read()
        damage = ranks.gather_objects(self._damage_in_store())
        if found := next(filter(None, damage), None):
            raise ValueError(found)

    def _collect_together(self) -> None:
        """Every process is a worker of its own, with a whole teacher."""
        config, ranks = self.config, self.ranks
        missing = ranks.on_first(self.store.missing_shards)
        if missing:
            self._bring_transformers()
        shards = missing[ranks.rank :: ranks.size]
        collect(self.store, self.pipeline, self.prompts, config.progress and ranks.first, shards)
        while not self.store.complete:  # others may take hours longer, which no collective would wait for
            time.sleep(1)

    def _encode(self) -> PromptEmbeddings:
        config, folder = self.config, self.output_dir
        caches, device = (folder / run_folder.PROMPT_CACHE, folder / run_folder.IMAGE_CACHE), self.device
        prompts = encode_prompts(self.pipeline, self.captions, config.prompts, caches[0], device)
        add_images(prompts, self.pipeline, self.images, config.trajectories, caches[1], device)
        return prompts

    def _bring_transformers(self) -> None:
        """After the encoders' work: Wan's text encoder is 11 GB, its two experts are 57, and a VAE needs room."""
        for part in video_transformers(self.pipeline).values():
            part.to(self.device)

    def _damage_in_store(self) -> str | None:
        try:
            if self.store is not None:
                self.store.verify(self.ranks.rank, self.ranks.size)
        except ValueError as error:
            return str(error)

    # What the stages share.

    def _optimize(self, optimizer: StudentOptimizer, loss: float) -> float | None:
        """Returns the gradient norm, None when the step was skipped."""
        norm = optimizer.step() if math.isfinite(loss) else optimizer.skip()
        self._finite(math.nan if norm is None else norm)
        return norm

    def _export(self) -> None:
        """Write the pipeline.

        Raises:
            TrainingDiverged: more than MOST_SKIPPED of the steps were skipped; the checkpoints stay.
        """
        if self.nonfinite:
            skipped = f"{self.nonfinite} of {self.global_step} steps had a non-finite loss or gradient"
            if self.nonfinite > MOST_SKIPPED * self.global_step:
                raise TrainingDiverged(f"{skipped}: no pipeline is written; lower the learning rate")
            self.ranks.on_first(lambda: warnings.warn(f"{skipped} and were skipped", stacklevel=2))
        self.student.eval().requires_grad_(False)
        self.exported = gather(self.student, self.ranks)
        path = self.output_dir / "pipeline"

        video = self.config.trajectories
        names = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale")
        settings = {name: getattr(video, name) for name in names} | {"fps": self.validator.fps}

        def save() -> None:
            saved = self._with_student(self.exported)
            save_pipeline(saved, path, overwrite=True, training=self._training(), settings=settings)

        self.ranks.on_first(save)

    def _training(self) -> Training:
        """For the model card: what all runs have; subclasses add theirs."""
        config, rows = self.config, self.validator.rows
        video = config.trajectories
        settings = {
            "videos": f"{video.height}x{video.width}, {video.num_frames} frames",
            "prompts": len(self.captions),
            "trajectories": None if self.store is None else video.num_trajectories,
            "sampler steps": video.num_inference_steps,
            "guidance scale": video.guidance_scale,
            "global batch": config.global_batch(self.ranks.size),
            "learning rate": config.optimizer.learning_rate,
            "seed": config.seed,
        }
        found = read_metrics(rows) if rows.is_file() else []
        return Training("training", settings=settings, validation=found[-1] if found else None)

    def _with_student(self, student: torch.nn.Module) -> Any:
        pipeline = copy.copy(self.pipeline)
        setattr(pipeline, self.expert.component, student)
        if self.student_scheduler is not None:
            pipeline.scheduler = self.student_scheduler
        return pipeline

    def _validate(self) -> None:
        """The student, in a stage with use_ema its averaged weights, unless that was done before a kill."""
        if self.validator.done(self.global_step):
            return
        where = {"step": self.global_step, "stage": self.stage, "stage_step": self.stage_step}
        models, stop = (self.student, self.teacher), lambda: self.ranks.any(self.stop)
        self.validator(*models, where, self.trackers, self.components.get("ema"), stop)
