"""The models that are compared in few steps, each of which gives one row of figures."""

import gc
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.ablations.bench import Bench
from benchmarks.ablations.settings import DEFAULT, SUITES, Suite
from linvideo.demo.judge import psnr
from linvideo.distillation import DistillConfig, distiller
from linvideo.models import FewStepScheduler, convert, load_pipeline, wan_transformer
from linvideo.run.data import open_data
from linvideo.run.read_config import from_dict
from linvideo.run.session import TrainingDiverged
from linvideo.trajectories.atomic_files import read_json, write_json, write_safetensors
from linvideo.transfer import TrainConfig, train

STEPS = (1, 2, 4)
FULL = "full"  # stands for the teacher's own number of steps
# name of a distillation -> numbers of steps
DISTILLED = {
    "distilled": STEPS,
    "distilled, no regression": (2,),
    "joint": (2,),
}
NOTES = {
    "teacher": "softmax attention, with its own sampler and guidance",
    "converted": "the teacher with half of the layers linear, fine-tuned, and sampled like the teacher",
    "teacher, student's timesteps": "the teacher with guided Euler steps at the timesteps of the distilled students",
    "converted, student's timesteps": "the converted model, sampled in the same way",
    "regression": "the distilled model after its first stage",
    "distilled": "the converted model after regression and distribution matching",
    "distilled, no regression": "the converted model after distribution matching alone",
    "joint": "a single stage: the teacher with the same layers made linear, without warm-up or training, after"
    " distribution matching alone",
}


@dataclass(frozen=True)
class Scale:
    """The scale of a benchmark.

    Args:
        transfer: Suite of the ablations whose default run gives the converted model.
        regression_steps: Number of training steps of the regression.
        dmd_steps: Number of training steps of distribution matching.
        regression_learning_rate: Learning rate of the regression.
        learning_rate: Learning rate of the student in distribution matching.
        critic_learning_rate: Learning rate of the critic.
    """

    transfer: Suite
    regression_steps: int
    dmd_steps: int
    regression_learning_rate: float
    learning_rate: float
    critic_learning_rate: float

    @property
    def numbers(self) -> dict[str, Any]:
        """All values that the results depend on, for files."""
        return asdict(self) | {"transfer": self.transfer.scale}


SCALES = {
    "small": Scale(SUITES["small"], 400, 1000, 5e-4, 2e-4, 4e-4),
    "middle": Scale(SUITES["middle"], 2000, 4000, 3e-4, 5e-5, 1e-4),
    "large": Scale(SUITES["large"], 2000, 4000, 2e-4, 2e-5, 4e-5),
}


class FewStepBench(Bench):
    """A Bench with students of few steps. The arguments are those of Bench, with a Scale in place of the suite."""

    def __init__(self, scale: Scale, teacher_folder: str | Path, folder: Path, device: str):
        super().__init__(scale.transfer, teacher_folder, folder, device)
        self.scale = scale

    def base_rows(self, seed: int) -> list[dict[str, Any]]:
        """Judge the teacher and the converted model in every number of steps; the converted pipeline is kept."""
        teacher = self.pipeline.transformer
        full = self.videos(teacher, None, None, seed)
        write_safetensors(self.teacher_videos(seed), {"videos": full})
        rows = [self.figured("teacher", FULL, full, full, seed)]
        config = self.transfer_config(seed)
        shutil.rmtree(config.output_dir, ignore_errors=True)  # left by an interrupted benchmark
        result = train(config, self.pipeline, self.prompts)
        write_json(self.layers_file(seed), result.layers_linear)
        converted = wan_transformer(result.pipeline)
        for steps in STEPS:
            euler = EulerSteps([1000 * (steps - k) / steps for k in range(steps)])
            for name, model in (("teacher", teacher), ("converted", converted)):
                rows.append(self.figured(name, steps, self.videos(model, None, steps, seed), full, seed))
                videos = self.videos(model, euler, steps, seed)
                rows.append(self.figured(f"{name}, student's timesteps", steps, videos, full, seed))
        last = self.figured("converted", FULL, self.videos(converted, None, None, seed), full, seed)
        return [*rows, last | {"layers_linear": result.layers_linear}]

    def distilled_rows(self, name: str, steps: int, seed: int) -> list[dict[str, Any]]:
        """Run one distillation; it gives two rows if it begins with regression. The seed's base rows must be done."""
        full = load_file(self.teacher_videos(seed))["videos"]

        def judge(student: torch.nn.Module, model: str) -> dict[str, Any]:
            return self.figured(model, steps, self.videos(student, config.scheduler(), steps, seed, 1.0), full, seed)

        config = self.distill_config(name, steps, seed)
        run, source, converted = distiller.prepare(config, self.pipeline, self.student(name, seed), self.prompts)
        rows, outcome = [], {}
        with run:
            run.check_continues()
            data = open_data(run, source, config.needs_trajectories, config.scheduler())
            models = distiller.make_models(run, source, converted)
            run.restore(models.student, models.of_stages)
            try:
                for stage in run.remaining():
                    stage(run, data, models)
                    if stage is distiller.regress and name == "distilled":
                        rows.append(judge(models.student.eval(), "regression"))
                        models.student.train()
            except TrainingDiverged as error:
                outcome["diverged"] = str(error)
            data.bring_back(run)
        rows.append(judge(models.student.eval(), name) | outcome)
        shutil.rmtree(config.output_dir)
        del run, data, models
        gc.collect()
        return rows

    def transfer_config(self, seed: int) -> TrainConfig:
        return self.config(DEFAULT, seed)

    def distill_config(self, name: str, steps: int, seed: int) -> DistillConfig:
        scale, transfer = self.scale, self.transfer_config(seed)
        values = DistillConfig(
            output_dir=str(self.folder / "runs" / f"{name.replace(', ', '-').replace(' ', '-')}-{steps}-{seed}"),
            seed=seed,
            num_steps=steps,
            max_train_steps=scale.dmd_steps,
            train_batch_size=transfer.train_batch_size,
            mixed_precision=transfer.mixed_precision,
            trajectories=transfer.trajectories,
            checkpointing_steps=10**9,
            overwrite_output_dir=True,
            progress=False,
        ).to_dict()
        values["regression"] = {
            "max_train_steps": scale.regression_steps if name == "distilled" else 0,
            "learning_rate": scale.regression_learning_rate,
        }
        values["optimizer"]["learning_rate"] = scale.learning_rate
        values["critic_optimizer"]["learning_rate"] = scale.critic_learning_rate
        return from_dict(values, DistillConfig)

    def student(self, name: str, seed: int) -> torch.nn.Module:
        """Return the model that distillation starts from."""
        if name == "joint":
            return convert(self.pipeline.transformer, read_json(self.layers_file(seed)), mode="linear")
        path = Path(self.transfer_config(seed).output_dir) / "pipeline"
        return load_pipeline(path, text_encoder=None, vae=None).transformer.to(self.device)

    def videos(self, model, scheduler, steps: int | None, seed: int, guidance: float | None = None) -> torch.Tensor:
        """Sample the videos of the seed, see `sample_videos`."""
        noise, embeds, negative, _ = self.start(seed)
        return self.sample_videos(model, noise, embeds, negative, scheduler, steps, guidance)

    def figured(self, name: str, steps: int | str, videos: torch.Tensor, full: torch.Tensor, seed: int) -> dict:
        """Return the row of a model; `full` are the teacher's videos in its full number of steps."""
        row = {"model": name, "steps": steps, "seed": seed}
        if not videos.isfinite().all():
            return row | {"good": 0.0}
        figures = self.figures(videos, seed)
        return row | figures | {"psnr_to_teacher": psnr(videos, full) if videos is not full else None}

    def layers_file(self, seed: int) -> Path:
        return self.folder / f"layers-{seed}.json"


class EulerSteps(FewStepScheduler):
    """Euler steps, x + (t' - t) u, at the timesteps of FewStepScheduler, without its noise."""

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        if self.step_index is None:
            self._init_step_index(timestep)
        sigma, sigma_next = self.sigmas[self.step_index], self.sigmas[self.step_index + 1]
        self._step_index += 1
        return (sample + (sigma_next - sigma) * model_output,)
