"""The validation of a run: videos of the student and the teacher with metrics, in the folder of the run.

    validation/teacher/<i>.mp4       the teacher's videos, made once
    validation/teacher.safetensors   their frames, uint8 [F, H, W, 3] each
    validation/step-<n>/<i>.mp4      the student's videos after step n of the run
    validation.jsonl                 one row per validation: means over its videos

Every rank makes the same forwards, because each may hold a part of the weights. The first one decodes and writes.
"""

import hashlib
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers.training_utils import EMAModel

from linvideo.models import FewStepScheduler, default_fps
from linvideo.models.video_file import check_output, save_video
from linvideo.run import run_folder
from linvideo.run.gradient import autocast
from linvideo.run.metrics_log import MetricsLog, read_metrics
from linvideo.run.parallel import Ranks
from linvideo.run.run_config import RunConfig
from linvideo.run.sample import decode, sample
from linvideo.run.trackers import Trackers
from linvideo.run.trainable import trained_parameters
from linvideo.run.video_metrics import compare
from linvideo.trajectories.atomic_files import read_cached, write_cached
from linvideo.trajectories.devices import on_device
from linvideo.trajectories.experts import stored_expert
from linvideo.trajectories.fingerprint import fingerprint
from linvideo.trajectories.prompts import PromptEmbeddings, encode_prompts, spread
from linvideo.trajectories.seeding import draw_noise


class Validator:
    """Validate a student at each call.

    Args:
        config: The options of the run.
        pipeline: The teacher's pipeline. Its text encoder is used in the constructor only. With two experts, the one
            that is not trained is moved to the ranks' device while it samples, and away before videos are decoded.
        prompts: Prompts of the run, used unless config.validation has its own.
        request: Request of the run's trajectory store.
        ranks: The ranks of the run.
        student_scheduler: Sampler of a distilled student, used without guidance. None samples the student the way the
            trajectories are sampled.
    """

    def __init__(
        self,
        config: RunConfig,
        pipeline: Any,
        prompts: PromptEmbeddings,
        request: dict[str, Any],
        ranks: Ranks,
        student_scheduler: FewStepScheduler | None = None,
    ):
        self.config, self.pipeline, self.prompts, self.ranks = config, pipeline, prompts, ranks
        self.request, self.student_scheduler = request, student_scheduler
        self.fps = default_fps(pipeline) if config.validation.fps is None else config.validation.fps
        self.folder = Path(config.output_dir) / run_folder.VALIDATION
        self.rows = Path(config.output_dir) / run_folder.VALIDATION_ROWS
        self.teacher_ready = False
        self.teacher: list[np.ndarray] = []  # its videos, on the first rank
        if config.validation.steps:
            ranks.on_first(lambda: check_output(self.folder / "0.mp4", self.fps))
        own = config.validation.prompts
        if config.validation.steps and own is not None:
            if prompts.latents is not None:
                raise ValueError("validation.prompts must be None for an image-to-video model: its prompts need images")
            cache = self.folder / "prompt_embeds.safetensors"
            self.prompts = ranks.on_first(lambda: encode_prompts(pipeline, own, config.prompts, cache, ranks.device))

    def done(self, step: int) -> bool:
        """Return whether there is a validation of `step`."""
        return self.ranks.on_first(
            lambda: self.rows.is_file() and any(row["step"] == step for row in read_metrics(self.rows))
        )

    def __call__(
        self,
        student: torch.nn.Module,
        teacher: Callable,
        where: dict[str, Any],
        trackers: Trackers | None = None,
        ema: EMAModel | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Make the videos and the row of a validation, unless it exists already or `stop` returns True meanwhile.

        Args:
            student: The model to validate.
            teacher: The teacher, called like the student.
            where: Values of step, stage and stage_step.
            trackers: Trackers to log to, on the first rank.
            ema: Averaged weights to validate in place of the student's own.
            stop: Function that says whether to stop, alike on all ranks.
        """
        if self.done(where["step"]) or not self._prepare_teacher(teacher, stop):
            return
        was_training = student.training
        student.eval()
        with averaged(student, ema), autocast(self.config, self.ranks.device):
            latents = self._sample(student, stop, self.student_scheduler)
        student.train(was_training)
        if latents is not None:
            self.ranks.on_first(lambda: self._compare(latents, where, trackers))

    def _sample(
        self, model: Callable, stop: Callable[[], bool], few_steps: FewStepScheduler | None = None
    ) -> list[torch.Tensor] | None:
        """Sample the latents of all videos with `model` in place of the transformer that is trained."""
        config, device = self.config.validation, self.ranks.device
        component = stored_expert(self.request).component
        other = "transformer" if component == "transformer_2" else "transformer_2"
        idle = getattr(self.pipeline, other, None)
        models = SimpleNamespace(**{component: model, other: idle})
        steps = config.num_inference_steps or self.config.trajectories.num_inference_steps
        scheduler, request = self.pipeline.scheduler, self.request
        if few_steps is not None:
            scheduler, request, steps = few_steps, request | {"guidance_scale": 1.0}, few_steps.num_steps
        videos = []
        with on_device(device, idle):  # moved away before decoding, which takes as much memory
            for number, index in enumerate(spread(len(self.prompts), config.num_videos)):
                prompt = torch.tensor([index])
                noise = draw_noise((1, *self.request["latent_shape"]), config.seed, "validation", number).to(device)
                conditions = [
                    self.prompts.conditions(prompt, torch.tensor([negative]), device) for negative in (False, True)
                ]
                video = sample(models, scheduler, request, steps, noise, *conditions, stop)
                if video is None:
                    return None
                videos.append(video)
        return videos

    def _prepare_teacher(self, teacher: Callable, stop: Callable[[], bool]) -> bool:
        """Read the teacher's videos, or make them if none exist for these settings. Return False if stopped."""
        if not self.teacher_ready and not self.ranks.on_first(self._read_teacher):
            latents = self._sample(teacher, stop)
            if latents is None:
                return False
            self.ranks.on_first(lambda: self._write_teacher(latents))
        self.teacher_ready = True
        return True

    def _key(self) -> str:
        config = {**vars(self.config.validation), "steps": None, "fps": None, "prompts": self.prompts.digest()}
        config["captions"] = spread(len(self.prompts), self.config.validation.num_videos)
        request = repr((config, self.request, fingerprint(self.pipeline.vae)))
        return hashlib.blake2b(request.encode(), digest_size=16).hexdigest()

    def _read_teacher(self) -> bool:
        found = read_cached(self.folder / "teacher.safetensors", self._key())
        if found is not None:
            self.teacher = [found[str(i)].numpy() for i in range(self.config.validation.num_videos)]
        return bool(self.teacher)

    def _write_teacher(self, latents: list[torch.Tensor]) -> None:
        for number, video in enumerate(latents):
            self.teacher.append(self._write(video, self.folder / "teacher" / f"{number}.mp4"))
        tensors = {str(number): torch.from_numpy(frames) for number, frames in enumerate(self.teacher)}
        write_cached(self.folder / "teacher.safetensors", tensors, self._key())

    def _write(self, latents: torch.Tensor, path: Path) -> np.ndarray:
        """Decode a video, write it and return its frames, uint8 [F, H, W, 3]."""
        frames = decode(self.pipeline, latents)
        save_video(frames, path, fps=self.fps)
        return np.stack([np.asarray(frame) for frame in frames])

    def _compare(self, latents: list[torch.Tensor], where: dict[str, Any], trackers: Trackers | None) -> None:
        step, found = where["step"], []
        for number, video in enumerate(latents):
            path = self.folder / f"step-{step}" / f"{number}.mp4"
            frames = self._write(video, path)
            pair = (
                torch.from_numpy(x).to(video.device).permute(0, 3, 1, 2) / 255 for x in (frames, self.teacher[number])
            )
            found.append(compare(*pair))
            if trackers is not None:
                trackers.video(f"validation/{number}", path, frames, step)
        values = {name: mean(row[name] for row in found) for name in found[0]}
        log = MetricsLog(self.rows, step)
        log.write(where | values)
        log.close()
        if trackers is not None:
            trackers.log("validation", values, step)


@contextmanager
def averaged(model: torch.nn.Module, ema: EMAModel | None):
    """Give `model` the averaged weights, if there are any, inside a `with` block."""
    if ema is None:
        yield
        return
    trained = trained_parameters(model)
    ema.store(trained)
    ema.copy_to(trained)
    try:
        yield
    finally:
        ema.restore(trained)
