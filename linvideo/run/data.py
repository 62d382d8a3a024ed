"""The data of a run: the teacher's pipeline, prompts and images, and trajectories."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.training_utils import EMAModel

from linvideo.models import FewStepScheduler, choose_backend, video_transformers, wan_transformer
from linvideo.models.attention import check_window_backend, self_attentions, stored_window
from linvideo.run import run_folder
from linvideo.run.parallel import check_divisible, check_window_heads
from linvideo.run.run_config import RunConfig
from linvideo.run.session import Run
from linvideo.run.validation import Validator
from linvideo.trajectories.collect import collect, kept_steps, latent_shape, store_request, with_flow_shift
from linvideo.trajectories.experts import Expert
from linvideo.trajectories.flow import sampler_grid
from linvideo.trajectories.images import add_images, check_images
from linvideo.trajectories.prompts import PromptEmbeddings, choose_prompts, encode_prompts
from linvideo.trajectories.store import TrajectoryStore

ENCODERS = ("text_encoder", "image_encoder", "vae")


@dataclass(frozen=True)
class Source:
    """The inputs of a run, before anything is computed from them.

    Args:
        pipeline: The teacher's pipeline.
        expert: The transformer of the pipeline that is the teacher.
        captions: The prompts as text.
        images: One image per prompt for an image-to-video pipeline, otherwise None.
        latent_shape: Shape (C, F, H, W) of a video's latents.
        grid: Timesteps [n] and sigmas [n + 1] of the sampler.
    """

    pipeline: Any
    expert: Expert
    captions: list[str]
    images: list[Any] | None
    latent_shape: tuple[int, ...]
    grid: tuple[torch.Tensor, torch.Tensor]

    @property
    def transformer(self) -> WanTransformer3DModel:
        """The teacher."""
        return wan_transformer(self.pipeline, self.expert.component)


def open_run(
    config: RunConfig,
    stages: Mapping[str, Any],
    choose_expert: Callable[[Any], Expert],
    teacher_pipeline: Any = None,
    prompts: list[str] | None = None,
    images: Sequence[Any] | None = None,
) -> tuple[Run, Source]:
    """Join the other processes, load the teacher and check that everything fits together. Nothing is written.

    Args:
        config: The options of the run.
        stages: The stages of the run; see Run.
        choose_expert: Function that picks the teacher among a pipeline's transformers. It raises ValueError when the
            pipeline has no suitable one.
        teacher_pipeline: A WanPipeline in memory, used instead of config.pretrained_model_name_or_path.
        prompts: Captions, used instead of config.prompts.prompts_file.
        images: One PIL image or image file per entry of `prompts`, for an image-to-video pipeline.

    Raises:
        ValueError: The reasons of Run, or there is no teacher, it is converted already, or settings do not fit it.
    """
    run = Run(config, stages, None if teacher_pipeline is None else wan_transformer(teacher_pipeline).device)
    captions, images = choose_prompts(config.prompts.prompts_file, prompts, images)
    pipeline = run_folder.load_teacher(config) if teacher_pipeline is None else teacher_pipeline
    pipeline = with_flow_shift(pipeline, config.trajectories.flow_shift)
    expert = choose_expert(pipeline)
    teacher = wan_transformer(pipeline, expert.component)
    if type(teacher) is not WanTransformer3DModel:
        raise ValueError(f"expected a stock WanTransformer3DModel as the teacher, got {type(teacher).__name__}")
    check_images(pipeline, images)
    if config.attention_backend is not None:
        dtype = torch.bfloat16 if config.mixed_precision == "bf16" else None
        choose_backend(teacher, config.attention_backend, run.device, dtype)
    shape = latent_shape(pipeline, config.trajectories)
    check_divisible(teacher.config, shape, config.parallel)
    grid = sampler_grid(pipeline.scheduler, config.trajectories.num_inference_steps)
    kept_steps(grid[0], config.trajectories, expert)
    return run, Source(pipeline, expert, captions, images, shape, grid)


def check_windows(run: Run, student: torch.nn.Module) -> None:
    """Raise ValueError, before hours are spent on sampling, if the student's window layers cannot run as configured."""
    config = run.config
    if stored_window(self_attentions(student)) is not None:
        check_window_heads(student.config.num_attention_heads, config.parallel)
        dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
        tokens = torch.empty(0, dtype=dtype, device=run.device)
        check_window_backend(student, config.attention_backend, tokens, training=True)


@dataclass(frozen=True)
class Data:
    """The data that the stages of a run draw from.

    Args:
        source: The inputs of the run.
        prompts: Embeddings of the source's prompts and images.
        store: The trajectories. None for a run that needs none.
        validator: The run's validator.
        away: Parts of the pipeline that are kept in CPU memory until the run is over.
    """

    source: Source
    prompts: PromptEmbeddings
    store: TrajectoryStore | None
    validator: Validator
    away: list[torch.nn.Module]

    def validation(
        self, run: Run, student: torch.nn.Module, teacher: Callable, ema: EMAModel | None = None
    ) -> Callable[[], None]:
        """Return the validation of a stage, for `Run.steps`; see Validator."""
        return lambda: self.validator(student, teacher, run.where(), run.log.trackers, ema, run.signals.came)

    def bring_back(self, run: Run) -> None:
        """Move the parts that are away back to the device. With several processes they are not needed any more."""
        for part in self.away if run.ranks.size == 1 else ():
            part.to(run.device)


def open_data(
    run: Run, source: Source, needs_store: bool = True, student_scheduler: FewStepScheduler | None = None
) -> Data:
    """Encode the prompts, collect the missing trajectories, and leave only the teacher on the device.

    Args:
        run: The run, opened.
        source: The inputs of the run.
        needs_store: Whether the run needs trajectories.
        student_scheduler: The sampler of a distilled student in validations; see Validator.

    Raises:
        ValueError: The trajectories in the folder belong to another request or are damaged.
    """
    config, ranks, pipeline, teacher = run.config, run.ranks, source.pipeline, source.transformer
    with run.timed("trajectories"):
        prompts, request, store = _read(run, source, needs_store)
        ranks.on_first(lambda: config.save(run.output_dir / "config.yaml"))
        validator = Validator(config, pipeline, prompts, request, ranks, student_scheduler)
        encoders = [part for name in ENCODERS if (part := getattr(pipeline, name, None)) is not None]
        for part in encoders:
            # only the first rank keeps its text encoder, to export it
            part.to("meta" if part is pipeline.text_encoder and not ranks.first else "cpu")
        if store is not None:
            _collect_together(run, source, prompts, store)
    others = [part for part in video_transformers(pipeline).values() if part is not teacher]
    for part in others:
        part.to("cpu")
    teacher.to(run.device)
    return Data(source, prompts, store, validator, [*encoders, *others])


def collect_part(run: Run, source: Source, worker: int, workers: int) -> TrajectoryStore:
    """Collect this worker's part of the trajectories and do nothing else.

    Several workers, on any machines, may share the store, also while a run trains in the folder.
    """
    with run.signals:
        prompts, _, store = _read(run, source)
        _bring_transformers(run, source)
        shards = range(worker, store.num_shards, workers)
        collect(store, source.pipeline, prompts, run.config.progress, shards)
    return store


def _read(
    run: Run, source: Source, needs_store: bool = True
) -> tuple[PromptEmbeddings, dict[str, Any], TrajectoryStore | None]:
    """Return the prompt embeddings, the request and the trajectory store, which may be incomplete.

    The request identifies the trajectories.
    """
    config, ranks = run.config, run.ranks
    path = config.trajectories.path or run.output_dir / "trajectories"

    def read() -> tuple[PromptEmbeddings, dict[str, Any], TrajectoryStore | None]:
        prompts = _encode(run, source)
        request = store_request(source.pipeline, prompts, config.trajectories, config.seed, source.expert)
        return prompts, request, TrajectoryStore(path, request) if needs_store else None

    found = []
    ranks.on_first(lambda: found.append(read()))
    if not ranks.first:  # reads what the first rank has computed
        found.append(read())
    damage = ranks.gather_objects(_damage(found[0][2], ranks.rank, ranks.size))
    if said := next(filter(None, damage), None):
        raise ValueError(said)
    return found[0]


def _collect_together(run: Run, source: Source, prompts: PromptEmbeddings, store: TrajectoryStore) -> None:
    """Collect the missing shards. Every process is a worker of its own and holds the whole teacher."""
    ranks = run.ranks
    missing = ranks.on_first(store.missing_shards)
    if missing:
        _bring_transformers(run, source)
    shards = missing[ranks.rank :: ranks.size]
    collect(store, source.pipeline, prompts, run.config.progress and ranks.first, shards)
    while not store.complete:  # others may take hours longer, and collectives time out
        time.sleep(1)


def _encode(run: Run, source: Source) -> PromptEmbeddings:
    config, folder = run.config, run.output_dir
    caches = folder / run_folder.PROMPT_CACHE, folder / run_folder.IMAGE_CACHE
    prompts = encode_prompts(source.pipeline, source.captions, config.prompts, caches[0], run.device)
    add_images(prompts, source.pipeline, source.images, config.trajectories, caches[1], run.device)
    return prompts


def _bring_transformers(run: Run, source: Source) -> None:
    """Move the transformers to the device.

    Only after the encoders have done their work: Wan's text encoder takes 11 GB, its two experts take 57 GB, and the
    VAE needs memory, too.
    """
    for part in video_transformers(source.pipeline).values():
        part.to(run.device)


def _damage(store: TrajectoryStore | None, part: int, parts: int) -> str | None:
    """Return a description of the damage in one part of the store's shards, None when they are intact."""
    try:
        if store is not None:
            store.verify(part, parts)
    except ValueError as error:
        return str(error)
