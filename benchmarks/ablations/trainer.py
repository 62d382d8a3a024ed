"""A Trainer for ablations: it starts from stages another run has done, changes model and objective, keeps score."""

import shutil
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.ablations.objectives import AblationStep
from benchmarks.ablations.settings import Setting
from benchmarks.ablations.variants import lora, rope_after
from linvideo.run.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from linvideo.trajectories.flow import sampler_grid
from linvideo.transfer import TrainConfig, Trainer
from linvideo.transfer.gradient_step import GradientStep
from linvideo.transfer.objectives import ObjectiveConfig

PROBES = 4  # times in fine-tuning at which the curve has a point


class AblationTrainer(Trainer):
    """Trainer whose fine-tuning follows `setting`.

    Args:
        probe: called with the student at PROBES + 1 points of fine-tuning, the first before it; its values become
            `curve`, pairs (share of the budget, value).

    After `train`, `cost` holds fine-tuning's device-seconds without the probes (processor time on a CPU, time on a GPU)
    and peak memory in MiB (of the process on a CPU, of tensors on a GPU; None where the system does not tell).
    """

    def __init__(self, config: TrainConfig, pipeline, prompts: list[str], setting: Setting, probe):
        super().__init__(config, pipeline, prompts)
        self.setting, self.probe = setting, probe
        self.curve, self.cost = [], {}

    def _make_models(self) -> None:
        super()._make_models()
        if self.setting.variant == "rope_after":
            rope_after(self.student)

    def _finetune(self) -> None:
        if self.setting.variant == "lora":
            lora(self.student)
        self._measure(0)
        _reset_peak(self.device)
        self.probing = 0.0
        started = _device_time(self.device)
        super()._finetune()
        self.cost = {
            "device_seconds": _device_time(self.device) - started - self.probing,
            "peak_mib": _peak_mib(self.device),
        }

    def _export(self) -> None:
        self.exported = self.student.eval().requires_grad_(False)

    def _gradient_step(self, objective: ObjectiveConfig) -> GradientStep:
        if self.stage != "finetune":
            return super()._gradient_step(objective)
        grid = self.grid
        if self.setting.sampler_steps is not None:
            grid = sampler_grid(self.pipeline.scheduler, self.setting.sampler_steps)
        models_and_data = (self.student, self.teacher, self.store, self.prompts, grid)
        return AblationStep(self.setting.objective, *models_and_data, self.config, self.stage, objective)

    def _steps(self, count: int, samples: int):
        due = {round(count * point / PROBES): point for point in range(1, PROBES + 1)}
        for step in super()._steps(count, samples):
            yield step
            if self.stage == "finetune" and step + 1 in due:
                started = _device_time(self.device)
                self._measure(due[step + 1])
                self.probing += _device_time(self.device) - started

    def _measure(self, point: int) -> None:
        self.student.eval()
        self.curve.append([point / PROBES, self.probe(self.student)])
        self.student.train()


def start_after(stage: str, source: Path, config: TrainConfig) -> TrainConfig:
    """Make config.output_dir a run that stands at the end of `stage` of the run in `source`; returns the config that
    continues it.

    Only what happens later may differ: `config` is taken at its word.

    Raises:
        ValueError: the run in `source` has no checkpoint there.
    """
    later = Trainer.stages[Trainer.stages.index(stage) + 1]
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
    folder = Path(config.output_dir)
    shutil.rmtree(folder, ignore_errors=True)
    save_checkpoint(folder, state["global_step"], model, state | {"config": config.to_dict()})
    config.save(folder / "config.yaml")
    return config


def _device_time(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()  # another process beside this one does not count
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
