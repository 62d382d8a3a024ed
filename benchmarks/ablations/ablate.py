"""Training runs for ablations: they share stages with another run, change model or objective, and record a curve."""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.ablations.objectives import AblationStep
from benchmarks.ablations.settings import Setting
from benchmarks.ablations.variants import lora, rope_after
from linvideo.run.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from linvideo.run.data import Data, open_data
from linvideo.run.optimizer import StudentOptimizer
from linvideo.run.session import EXPORT, Run, TrainingDiverged
from linvideo.trajectories.flow import sampler_grid
from linvideo.transfer import TrainConfig, trainer

PROBES = 4  # points of the curve during fine-tuning


@dataclass
class Outcome:
    """The outcome of an ablation's run.

    Args:
        student: The student at the end of the run.
        results: Results of the stages, see linvideo.run.Run.
        curve: Pairs (share of fine-tuning done, result of the probe).
        cost: "device_seconds" of fine-tuning without the probes (processor time on a CPU, elapsed time on a GPU) and
            "peak_mib" (memory of the process on a CPU, of tensors on a GPU; None if the system doesn't provide it).
        diverged: Reason why the run was stopped early. None if it wasn't.
    """

    student: torch.nn.Module
    results: dict[str, Any]
    curve: list[list[float]] = field(default_factory=list)
    cost: dict[str, Any] = field(default_factory=dict)
    diverged: str | None = None


def ablate(
    config: TrainConfig, pipeline: Any, prompts: list[str], setting: Setting, probe: Callable[[torch.nn.Module], float]
) -> Outcome:
    """Run `linvideo.transfer.train` with the fine-tuning of `setting`, and without the export.

    Args:
        config: Configuration of the run.
        pipeline: Pipeline of the teacher.
        prompts: Captions to train with.
        setting: Setting that says how to fine-tune.
        probe: Measure of the student, taken before fine-tuning and at PROBES points of it.
    """
    run, source = trainer.prepare(config, pipeline, prompts)
    with run:
        run.check_continues()
        data = open_data(run, source)
        student, teacher = trainer.make_models(run, source)
        if setting.variant == "rope_after":
            rope_after(student)
        run.restore(student)
        outcome = Outcome(student, run.results)
        try:
            for stage in run.remaining():
                if stage is trainer.finetune:
                    finetune(run, data, student, teacher, setting, probe, outcome)
                else:
                    stage(run, data, student, teacher)
        except TrainingDiverged as error:
            outcome.diverged = str(error)
        data.bring_back(run)
    student.eval().requires_grad_(False)
    return outcome


def finetune(
    run: Run,
    data: Data,
    student: torch.nn.Module,
    teacher: Callable,
    setting: Setting,
    probe: Callable,
    outcome: Outcome,
) -> None:
    """Fine-tune as `setting` says, and fill in the curve and the cost of the outcome."""
    config, device, probing = run.config, run.device, 0.0
    if setting.variant == "lora":
        lora(student)

    def measure(point: int) -> None:
        student.eval()
        outcome.curve.append([point / PROBES, probe(student)])
        student.train()

    due = {round(config.max_train_steps * point / PROBES): point for point in range(1, PROBES + 1)}

    measure(0)
    _reset_peak(device)
    started = _device_time(device)
    grid = data.source.grid
    if setting.sampler_steps is not None:
        grid = sampler_grid(data.source.pipeline.scheduler, setting.sampler_steps)
    models_and_data = (student, teacher, data.store, data.prompts, grid)
    gradient = AblationStep(setting.objective, *models_and_data, config, run.stage, config.objective)
    optimizer = StudentOptimizer(student, config.optimizer, max(1, config.max_train_steps))
    run.register(optimizer=optimizer, gradient=gradient)
    for step in run.steps(config.max_train_steps, gradient.global_batch):
        name, loss = gradient(step)
        norm = run.optimize(optimizer, loss)
        run.report(loss, **{f"loss_{name}": loss}, grad_norm=norm, learning_rate=optimizer.learning_rate)
        if step + 1 in due:
            stopped = _device_time(device)
            measure(due[step + 1])
            probing += _device_time(device) - stopped
    outcome.cost = {"device_seconds": _device_time(device) - started - probing, "peak_mib": _peak_mib(device)}


def start_after(stage: str, source: Path, config: TrainConfig) -> TrainConfig:
    """Make config.output_dir a copy of the run in `source` at the end of `stage`; returns the config to continue it.

    `config` may differ from the source's only in what concerns later stages; this is not checked.

    Raises:
        ValueError: The run in `source` has no checkpoint at the end of the stage.
    """
    names = [*trainer.STAGES, EXPORT]
    later = names[names.index(stage) + 1]
    for path in list_checkpoints(source):
        model, state = load_checkpoint(path)
        if state["stage"] == later and not state["stage_step"]:
            break
    else:
        raise ValueError(f"expected a checkpoint at the end of {stage} in {source}, found none")
    config = replace(config, resume_from_checkpoint="latest")
    if config.selection.layers is not None:
        mark = ".attn1.linear_attn."
        kept = {f"blocks.{layer}" for layer in config.selection.layers}
        model = {name: value for name, value in model.items() if mark not in name or name.split(mark)[0] in kept}
    if stage == "sensitivity":  # r isn't learned yet, and the source may start it elsewhere
        for name, value in model.items():
            if name.endswith(".linear_attn.r"):
                model[name] = torch.full_like(value, config.selection.r_init)
    folder = Path(config.output_dir)
    shutil.rmtree(folder, ignore_errors=True)
    save_checkpoint(folder, state["global_step"], model, state | {"config": config.to_dict()})
    config.save(folder / "config.yaml")
    return config


def _device_time(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()  # the time of other processes doesn't count
    torch.cuda.synchronize(device)
    return time.perf_counter()


def _reset_peak(device: torch.device) -> None:
    if device.type == "cpu":
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass
    else:
        torch.cuda.reset_peak_memory_stats(device)


def _peak_mib(device: torch.device) -> float | None:
    if device.type != "cpu":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), None)
