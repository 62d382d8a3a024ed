"""Selective transfer: trajectories -> warm-up -> sensitivity -> selection -> fine-tuning -> export.

`train` is the whole run, which can be continued from any step. Its stages follow in order.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel

from linvideo.models import Training, convert, finalize
from linvideo.models.branches import feature_weights, gates
from linvideo.reports.run_report import report
from linvideo.run import run_folder
from linvideo.run.data import Data, Source, check_windows, collect_part, open_data, open_run
from linvideo.run.export import FOLDER, export
from linvideo.run.gradient import autocast
from linvideo.run.optimizer import StudentOptimizer, clip_gradients, fill_state
from linvideo.run.session import Run
from linvideo.run.trainable import trained_parameters
from linvideo.trajectories.atomic_files import write_cached, write_json
from linvideo.trajectories.experts import choose_expert
from linvideo.trajectories.store import StateBatch, TrajectoryStore
from linvideo.transfer.gradient_step import GradientStep
from linvideo.transfer.objectives import ObjectiveConfig
from linvideo.transfer.selection import add_penalties, initial_r, lowest, round_r
from linvideo.transfer.sensitivity import layer_sensitivity, velocity_error
from linvideo.transfer.student import candidate, make_student, training_teacher
from linvideo.transfer.train_config import TrainConfig
from linvideo.transfer.warmup import attention_output_errors, load_feature_maps, start_gains


@dataclass
class TrainResult:
    """The result of a run.

    Args:
        pipeline: The teacher's pipeline with the student as its transformer. With several processes only the first one
            has it, the others have None.
        pipeline_path: Folder in which the pipeline is saved.
        layers_linear: The linear layers (0-based).
        layers_window: The window layers (0-based).
        r: layer -> learned r before rounding. Empty unless r was learned.
        sensitivity: layer -> velocity error with that layer alone converted, after warm-up.
        sensitivity_floor: Velocity error with no layer converted.
        seconds: stage -> time spent in it, over all calls of the run.
    """

    pipeline: Any
    pipeline_path: Path
    layers_linear: list[int]
    layers_window: list[int]
    r: dict[int, float]
    sensitivity: dict[int, float]
    sensitivity_floor: float | None
    seconds: dict[str, float]


def train(
    config: TrainConfig,
    teacher_pipeline: Any = None,
    prompts: list[str] | None = None,
    images: Sequence[Any] | None = None,
) -> TrainResult:
    """Run or continue selective transfer according to `config`.

    Args:
        config: The options of the run.
        teacher_pipeline: A WanPipeline in memory, used instead of config.pretrained_model_name_or_path. Training runs
            on the device of its transformer, which is copied, not changed. The exceptions are runs under torchrun, with
            offload_teacher or with attention_backend, which shard it or set its hooks or its backend. Of two experts,
            the one to be trained must be stock; the other may be converted already.
        prompts: Captions, used instead of config.prompts.prompts_file.
        images: One PIL image or image file per entry of `prompts`, for an image-to-video pipeline.

    Raises:
        ValueError: Before anything is written: there is no teacher, the pipeline or settings don't fit, another run
            uses the folder, or its trajectories or checkpoint belong to another request or config. Later: with
            selection.rounding "threshold", no learned r is below 0.5.
        TrainingDiverged: See config.max_nonfinite_steps.
        TrainingStopped: SIGTERM or Ctrl-C came. If it came during a stage's steps, a checkpoint was saved first.
        OSError: A checkpoint could not be written, for example on a full disk. The earlier ones are untouched.
    """
    run, source = prepare(config, teacher_pipeline, prompts, images)
    with run:
        # until layers are selected, the rule of their selection may still change
        run.check_continues(free=() if "linear_layers" in run.results else ("selection.rounding",))
        data = open_data(run, source)
        student, teacher = make_models(run, source)
        run.restore(student)
        for stage in run.remaining():
            stage(run, data, student, teacher)
        pipeline = export(run, data, student, how_trained(config, student))
        report(run, data)
    return TrainResult(
        pipeline=pipeline,
        pipeline_path=run.output_dir / FOLDER,
        layers_linear=run.results["linear_layers"],
        layers_window=run.results.get("window_layers", []),
        r=run.results.get("r", {}),
        sensitivity=run.results.get("sensitivity", {}),
        sensitivity_floor=run.results.get("sensitivity_floor"),
        seconds=run.results["seconds"],
    )


def collect(
    config: TrainConfig,
    worker: int = 0,
    workers: int = 1,
    teacher_pipeline: Any = None,
    prompts: list[str] | None = None,
    images: Sequence[Any] | None = None,
) -> TrajectoryStore:
    """Collect this worker's part of a run's trajectories and do nothing else.

    Several workers, on any machines, may share the folder, also while a run trains in it. The errors are those of
    `train`.

    Args:
        config: The options of the run.
        worker: Number of this worker, from 0.
        workers: Total number of workers.
        teacher_pipeline: See `train`.
        prompts: See `train`.
        images: See `train`.
    """
    run, source = prepare(config, teacher_pipeline, prompts, images)
    return collect_part(run, source, worker, workers)


def prepare(
    config: TrainConfig,
    teacher_pipeline: Any = None,
    prompts: list[str] | None = None,
    images: Sequence[Any] | None = None,
) -> tuple[Run, Source]:
    """Return the run and its inputs. The arguments are those of `train`.

    Raises:
        ValueError: The reasons of `train`, before hours are spent on sampling.
    """
    choose = partial(choose_expert, name=config.expert, guidance_scale_2=config.trajectories.guidance_scale_2)
    run, source = open_run(config, STAGES, choose, teacher_pipeline, prompts, images)
    config.selection.target(len(source.transformer.blocks))
    check_windows(run, candidate(source.transformer, config))
    config.lora.check(source.transformer)
    return run, source


def make_models(run: Run, source: Source) -> tuple[torch.nn.Module, Callable]:
    """Return the student, with the run's present layers but initial weights, and the teacher that it learns from."""
    student = make_student(source.transformer, run.config, run.ranks)
    teacher = training_teacher(source.transformer, student, run.config, run.ranks)
    if "linear_layers" in run.results:
        finalize(student, run.results["linear_layers"])
    return student, teacher


# The stages.


def warm_up(run: Run, data: Data, student: torch.nn.Module, teacher: Callable) -> None:
    """Fit the feature maps, and the gains of window layers, to softmax attention."""
    config, weights = run.config.warmup, feature_weights(student)
    if weights:
        optimizer = torch.optim.Adam(weights.values(), lr=config.learning_rate)
        fill_state(optimizer)
        run.register(optimizer=optimizer)
        positions, counts = run.ranks.part(config.batch_size)
        if run.config.selection.window_layers and not run.stage_step:
            with eager(), autocast(run.config, run.device):
                start_gains(student, draw(run, data, positions, counts, run.stage, "gains"), run.ranks)
        for step in run.steps(config.max_train_steps, config.batch_size):
            batch = draw(run, data, positions, counts, run.stage, step)
            with eager(), autocast(run.config, run.device):
                errors = attention_output_errors(student, batch, backward=True, ranks=run.ranks)
            error = float(torch.stack(list(errors.values())).mean())
            norm = clip_gradients(list(weights.values()), math.inf)
            if run.finite(error + norm):
                optimizer.step()
            optimizer.zero_grad()
            run.report(loss=error)
    path = run.output_dir / run_folder.FEATURE_MAPS
    run.ranks.on_first(lambda: write_cached(path, weights, "maps"))


def measure_sensitivity(run: Run, data: Data, student: torch.nn.Module, teacher: Callable) -> None:
    """Measure the velocity error with each layer alone converted."""
    if run.config.sensitivity.num_states:
        show = run.config.progress and run.ranks.first
        with eager(), autocast(run.config, run.device):
            errors, floor = layer_sensitivity(student, lambda: held_states(run, data), show, run.ranks)
        run.results |= {"sensitivity": errors, "sensitivity_floor": floor}


def select_layers(run: Run, data: Data, student: torch.nn.Module, teacher: Callable) -> None:
    """Select the layers that become linear, and convert them."""
    config, results, summary = run.config.selection, run.results, {}
    target = config.target(len(student.blocks))
    if config.method == "layers":
        layers = sorted(config.layers)
    elif config.method == "sensitivity":
        layers = lowest(results["sensitivity"], target)
    else:
        learn_r(run, data, student, teacher)
        results["r"] = {layer: r.item() for layer, r in gates(student).items()}
        layers = round_r(results["r"], target, config.rounding)
        summary["error_mixed"] = held_error(run, data, student)
    finalize(student, layers)
    summary["error_rounded"] = held_error(run, data, student)
    results["linear_layers"] = layers
    if config.window_layers:
        results["window_layers"] = sorted(config.window_layers)
    summary |= {name: value for name, value in results.items() if name != "seconds"}
    content = {"method": config.method, **summary}
    run.ranks.on_first(lambda: write_json(run.output_dir / run_folder.SELECTION, content))


def learn_r(run: Run, data: Data, student: torch.nn.Module, teacher: Callable) -> None:
    """Train all weights and the r of each mixed layer."""
    config, named_r = run.config.selection, gates(student)
    if config.r_from_sensitivity and not run.stage_step:
        with torch.no_grad():
            for layer, value in initial_r(run.results["sensitivity"]).items():
                named_r[layer].fill_(value)
    optimizer = StudentOptimizer(student, run.config.optimizer, config.max_train_steps, config.r_learning_rate)
    gradient = make_gradient(run, data, student, teacher, replace(run.config.objective, name=config.objective))
    run.register(optimizer=optimizer, gradient=gradient)
    validate = data.validation(run, student, teacher)
    for step in run.steps(config.max_train_steps, gradient.global_batch, validate):
        name, task = gradient(step)
        penalties = add_penalties(list(named_r.values()), config.target(len(student.blocks)), config, step)
        loss = task + penalties["loss_con"] + penalties["loss_reg"]
        norm = run.optimize(optimizer, loss)
        values = dict(zip(map(str, named_r), torch.cat(optimizer.r).tolist(), strict=True))
        run.report(
            loss=loss,
            **{f"loss_{name}": task},
            **penalties,
            grad_norm=norm,
            learning_rate=optimizer.learning_rate,
            num_linear=sum(value < 0.5 for value in values.values()),
            r=values,
        )


def finetune(run: Run, data: Data, student: torch.nn.Module, teacher: Callable) -> None:
    """Train all weights of the converted model."""
    config = run.config
    optimizer = StudentOptimizer(student, config.optimizer, max(1, config.max_train_steps))
    gradient = make_gradient(run, data, student, teacher, config.objective)
    trained = trained_parameters(student)
    ema = EMAModel(trained, decay=config.ema_decay) if config.use_ema else None
    run.register(optimizer=optimizer, gradient=gradient, ema=ema)
    validate = data.validation(run, student, teacher, ema)
    for step in run.steps(config.max_train_steps, gradient.global_batch, validate):
        name, loss = gradient(step)
        norm = run.optimize(optimizer, loss)
        if ema is not None and norm is not None:
            ema.step(trained)
        run.report(
            loss=loss,
            **{f"loss_{name}": loss},
            grad_norm=norm,
            learning_rate=optimizer.learning_rate,
            num_linear=len(run.results["linear_layers"]),
        )
    if ema is not None:
        ema.copy_to(trained)


STAGES = {"warmup": warm_up, "sensitivity": measure_sensitivity, "selection": select_layers, "finetune": finetune}


# Shared by the stages.


def make_gradient(
    run: Run, data: Data, student: torch.nn.Module, teacher: Callable, objective: ObjectiveConfig
) -> GradientStep:
    """Return the object that computes the gradients of the run's current stage."""
    models_and_data = (student, teacher, data.store, data.prompts, data.source.grid)
    return GradientStep(*models_and_data, run.config, run.stage, objective, run.ranks)


def draw(run: Run, data: Data, positions: list[int], counts: bool, *name: int | str) -> StateBatch:
    """Draw teacher states by name. For `counts` see StateBatch."""
    batch = data.store.draw(positions, run.config.seed, *name, prompts=data.prompts, device=run.device)
    return replace(batch, counts=counts)


def held_states(run: Run, data: Data) -> Iterator[StateBatch]:
    """Yield this rank's part of the states for sensitivity and the cost of rounding, the same at every call."""
    count, size = run.config.sensitivity.num_states, run.config.sensitivity.batch_size
    mine, counts = run.ranks.part(count)
    most = -(-count // run.ranks.data_size)  # for any rank; all ranks make the same number of forwards
    for start in range(0, most, size):
        chosen = mine[start : start + size]
        yield draw(run, data, chosen or mine[:1], counts and bool(chosen), "held")


def held_error(run: Run, data: Data, student: torch.nn.Module) -> float | None:
    """Return the velocity error on the held states, None if there are none."""
    if not run.config.sensitivity.num_states:
        return None
    with eager(), autocast(run.config, run.device):
        return velocity_error(student, held_states(run, data), run.ranks)


def eager() -> Any:
    """Turn compilation off, for code that runs only a few times and whose hooks differ between calls."""
    return torch.compiler.set_stance("force_eager")


def how_trained(config: TrainConfig, student: torch.nn.Module) -> Training:
    """Return the entries of the model card."""
    steps = {
        "warm-up": config.warmup.max_train_steps if feature_weights(student) else 0,
        "selection": config.selection.max_train_steps if config.selection.method == "learned" else 0,
        "fine-tuning": config.max_train_steps,
    }
    chosen = {"learned": "learned", "sensitivity": "by sensitivity", "layers": "given"}[config.selection.method]
    settings = {"layers": chosen, "objective": config.objective.name}
    settings |= {"expert": config.expert, "LoRA rank": config.lora.rank}
    return Training("selective transfer", steps=steps, settings=settings)


def warmed_up(
    teacher: torch.nn.Module, config: TrainConfig, layers: list[int], window_layers: Sequence[int] = ()
) -> torch.nn.Module:
    """Return a copy of a run's teacher converted after warm-up only, the starting point of fine-tuning.

    Args:
        teacher: The stock transformer.
        config: The options of the run.
        layers: The linear layers.
        window_layers: The window layers.

    Raises:
        ValueError: There was no warm-up in config.output_dir, or not with these layers.
    """
    model = teacher
    if layers:
        model = convert(model, layers=layers, mode="linear", feature_map=config.feature_map)
    if window_layers:
        window = {"feature_map": config.feature_map, "window": config.window.settings()}
        model = convert(model, layers=window_layers, mode="window", **window)
    return load_feature_maps(model, Path(config.output_dir) / run_folder.FEATURE_MAPS)
