"""The run: regression on trajectories -> distribution matching -> export, resumable at every step."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.training_utils import EMAModel

from linvideo.distillation.adversarial import Features, attach_discriminator, feature_layer
from linvideo.distillation.distill_config import DistillConfig
from linvideo.distillation.dmd_step import DmdStep
from linvideo.distillation.regression import TrajectoryJumps
from linvideo.models import Training, load_pipeline, wan_transformer
from linvideo.models.attention import attach_attention, self_attentions, stored_attention_type
from linvideo.models.convert import copy_module
from linvideo.models.wan import LinVideoWanAttnProcessor
from linvideo.run.gradient import accumulate
from linvideo.run.optimizer import StudentOptimizer
from linvideo.run.pipeline_run import PipelineRun
from linvideo.run.trainable import frozen, trainable
from linvideo.trajectories.collect import stored_flow_shift
from linvideo.trajectories.experts import Expert

SHARED = ("in_channels", "out_channels", "patch_size", "text_dim", "image_dim")  # of a student and its teacher


@dataclass
class DistillResult:
    """What a run made.

    Args:
        pipeline: the teacher's with student and few-step scheduler in their places, as saved in pipeline_path; of
            several processes the first has it, the others None.
        timesteps: that it samples with (1000 t).
        seconds: stage -> time spent.
    """

    pipeline: Any
    pipeline_path: Path
    timesteps: list[float]
    seconds: dict[str, float]


class Distiller(PipelineRun):
    """Distillation as `config` says.

    Args:
        teacher_pipeline, prompts, images: see PipelineRun.
        student: a converted transformer in memory, in place of config.student_model_name_or_path. It is not changed.

    Raises:
        ValueError: as PipelineRun; no student, or one that does not fit the teacher or has mixed layers; a
            discriminator's layer that is not there; a pipeline with two experts (Wan 2.2).
    """

    config: DistillConfig
    stages = ("regression", "dmd", "export")
    validated = ("regression", "dmd")

    def __init__(
        self,
        config: DistillConfig,
        teacher_pipeline: Any = None,
        student: WanTransformer3DModel | None = None,
        prompts: list[str] | None = None,
        images: Sequence[Any] | None = None,
    ):
        super().__init__(config, teacher_pipeline, prompts, images)
        self.student_scheduler = config.scheduler()
        self.source = self._load_student() if student is None else student
        check_student(self.source, self.teacher)
        if config.dmd.adversarial_weight:
            feature_layer(self.teacher, config.dmd.adversarial_layer)  # refused now, not after hours of trajectories
        self.critic: torch.nn.Module | None = None
        self.features: Features | None = None

    def train(self) -> DistillResult:
        """Run, or finish, all stages.

        Raises:
            ValueError: another run writes into the folder, the trajectories there belong to another request, or the
                checkpoint to another config.
            TrainingDiverged: see config.max_nonfinite_steps.
            TrainingStopped: SIGTERM or Ctrl-C came; between two optimizer steps a checkpoint was saved first.
            OSError: a checkpoint could not be written, say on a full disk; the earlier ones are untouched.
        """
        with self._only_writer():
            self._run()
        return DistillResult(
            pipeline=self._with_student(self.exported) if self.ranks.first else None,
            pipeline_path=self.output_dir / "pipeline",
            timesteps=self.student_scheduler.config.timesteps,
            seconds=self.results["seconds"],
        )

    # What PipelineRun asks.

    def _choose_expert(self) -> Expert:
        if getattr(self.pipeline, "transformer_2", None) is not None:
            raise ValueError("expected a pipeline with one transformer, got one with two experts (Wan 2.2)")
        return Expert()

    def _needs_trajectories(self) -> bool:
        return self.config.needs_trajectories

    def _check_continues(self, saved: Any, free: tuple[str, ...] = ()) -> None:
        super()._check_continues(saved, free)
        earlier, now = saved["config"]["max_train_steps"], self.config.max_train_steps
        if saved["stage"] != "regression" and (earlier == 0) != (now == 0):  # with one of them there is no critic
            raise ValueError(f"max_train_steps cannot change from {earlier} to {now} after the regression")

    def _make_models(self) -> None:
        config, ranks = self.config, self.ranks
        self.student = trainable(self._copy(self.source), config, ranks)
        if config.max_train_steps:
            self.critic = self._copy(self.teacher)
            if config.dmd.adversarial_weight:
                torch.manual_seed(config.seed)  # the discriminator starts from draws, the same on all ranks
                self.features = attach_discriminator(self.critic, config.dmd.adversarial_layer)
                self.critic.discriminator.to(self.device)
            self.critic = trainable(self.critic, config, ranks)
        self.teacher = frozen(self.teacher, config, ranks)

    def _copy(self, model: WanTransformer3DModel) -> WanTransformer3DModel:
        """To be trained; over the same tensors as yet."""
        result = copy_module(model, share_tensors=True)
        for attn in self_attentions(result):
            if stored_attention_type(attn) == "softmax":  # diffusers' own is not made for autocast everywhere
                attach_attention(attn, "softmax", LinVideoWanAttnProcessor)
        if self.config.attention_backend is not None:
            result.set_attention_backend(self.config.attention_backend)
        return result

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        trained = super()._trained()
        if self.stage == "dmd" and self.critic is not None:
            trained |= {f"critic.{name}": parameter for name, parameter in self.critic.named_parameters()}
        return trained

    # The stages, in order.

    def _regression(self) -> None:
        config = self.config
        count = config.regression.max_train_steps
        if not count:
            return
        rate = config.regression.learning_rate
        settings = replace(config.optimizer, learning_rate=rate, lr_scheduler="cosine", adam_beta1=0.9)
        optimizer = StudentOptimizer(self.student, settings, count)
        self._register(optimizer=optimizer)
        jumps = TrajectoryJumps(self.store, self.prompts, self.student_scheduler.config.timesteps)
        for step in self._steps(count, config.global_batch(self.ranks.size)):

            def loss_of(micro: int, step: int = step) -> torch.Tensor:
                positions = self.ranks.micro_batch(micro, config.train_batch_size)
                return jumps.loss(self.student, positions, config.seed, self.stage, step)

            loss = accumulate(loss_of, self.student, config, self.ranks)
            norm = self._optimize(optimizer, loss)
            self._report(loss=loss, grad_norm=norm, learning_rate=optimizer.learning_rate)

    def _dmd(self) -> None:
        config, every = self.config, self.config.dmd.student_every
        if self.critic is None:
            return
        optimizer = StudentOptimizer(self.student, config.optimizer, max(1, config.max_train_steps // every))
        critic_optimizer = StudentOptimizer(self.critic, config.critic_optimizer, config.max_train_steps)
        trained = list(super()._trained().values())
        ema = EMAModel(trained, decay=config.ema_decay) if config.use_ema else None
        parts = {"optimizer": optimizer, "critic_optimizer": critic_optimizer, "ema": ema}
        self._register(**{name: part for name, part in parts.items() if part is not None})
        models = (self.student, self.teacher, self.critic)
        shift = config.dmd.flow_shift or stored_flow_shift(self.pipeline.scheduler)
        gradient = DmdStep(
            *models, self.prompts, self.latent_shape, shift, config, self.features, self.store, self.ranks
        )
        for step in self._steps(config.max_train_steps, config.global_batch(self.ranks.size)):
            row = {}
            if (step + 1) % every == 0:
                loss = gradient.student_gradient(step)
                norm = self._optimize(optimizer, loss)
                critic_optimizer.clear()
                if ema is not None and norm is not None:
                    ema.step(trained)
                row = {"loss_student": loss, "grad_norm_student": norm, "learning_rate": optimizer.learning_rate}
            loss = gradient.critic_gradient(step)
            norm = self._optimize(critic_optimizer, loss)
            self._report(loss=loss, grad_norm=norm, **row)
        if ema is not None:
            ema.copy_to(trained)

    def _training(self) -> Training:
        config, general = self.config, super()._training()
        steps = {"regression": config.regression.max_train_steps, "DMD": config.max_train_steps}
        own = {"timesteps": self.student_scheduler.config.timesteps, "student every": config.dmd.student_every}
        settings, earlier = own | general.settings, config.student_model_name_or_path
        return replace(general, method="distillation to few steps", steps=steps, settings=settings, earlier=earlier)

    def _load_student(self) -> WanTransformer3DModel:
        path = self.config.student_model_name_or_path
        if path is None:
            raise ValueError("student_model_name_or_path must name the converted model, got None")
        # without the parts that the teacher's pipeline has; its shards go to the GPU block by block
        return wan_transformer(load_pipeline(path, text_encoder=None, vae=None, dtype=torch.float32))


def check_student(student: WanTransformer3DModel, teacher: WanTransformer3DModel) -> None:
    """Raise ValueError when `student` is no Wan transformer, has mixed layers, or takes other inputs than `teacher`."""
    if not isinstance(student, WanTransformer3DModel):
        raise ValueError(f"expected a Wan transformer for a student, got {type(student).__name__}")
    mixed = [i for i, kind in enumerate(student.config.get("attention_types") or ()) if kind == "mixed"]
    if mixed:
        raise ValueError(f"expected a student whose layers are softmax or linear, got mixed layers {mixed}")
    for name in SHARED:
        of_student, of_teacher = getattr(student.config, name), getattr(teacher.config, name)
        if of_student != of_teacher:
            raise ValueError(f"expected a student of the teacher's {name} {of_teacher}, got {of_student}")
