"""Distillation to few steps: regression on trajectories -> distribution matching -> export.

`distill` is the whole run, which can be continued from any step. Its stages follow in order.
"""

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
from linvideo.models import FewStepScheduler, Training, load_pipeline, wan_transformer
from linvideo.models.attention import attach_attention, self_attentions, stored_attention_type
from linvideo.models.convert import copy_module
from linvideo.models.wan import LinVideoWanAttnProcessor
from linvideo.reports.run_report import report
from linvideo.run.data import Data, Source, check_windows, open_data, open_run
from linvideo.run.export import FOLDER, export
from linvideo.run.gradient import accumulate
from linvideo.run.optimizer import StudentOptimizer
from linvideo.run.session import Run
from linvideo.run.trainable import frozen, trainable, trained_parameters
from linvideo.trajectories.collect import stored_flow_shift
from linvideo.trajectories.experts import Expert

SHARED = ("in_channels", "out_channels", "patch_size", "text_dim", "image_dim")  # the same in student and teacher


@dataclass
class DistillResult:
    """The result of a distillation.

    Args:
        pipeline: The teacher's pipeline with the student and its few-step scheduler. With several processes only the
            first one has it, the others have None.
        pipeline_path: Folder in which the pipeline is saved.
        timesteps: Timesteps (1000 t) of its sampler.
        seconds: stage -> time spent in it.
    """

    pipeline: Any
    pipeline_path: Path
    timesteps: list[float]
    seconds: dict[str, float]


@dataclass
class Models:
    """The models of a run.

    Args:
        student: The model that is distilled.
        teacher: The frozen teacher.
        critic: The network that learns the score of the student's samples. None for a run without distribution
            matching.
        features: The critic's features, in a run with a discriminator.
    """

    student: torch.nn.Module
    teacher: torch.nn.Module
    critic: torch.nn.Module | None = None
    features: Features | None = None

    @property
    def of_stages(self) -> dict[str, dict[str, torch.nn.Module]]:
        """Stage -> name -> model that the stage trains in addition to the student, for `Run.restore`."""
        return {} if self.critic is None else {"dmd": {"critic": self.critic}}


def distill(
    config: DistillConfig,
    teacher_pipeline: Any = None,
    student: WanTransformer3DModel | None = None,
    prompts: list[str] | None = None,
    images: Sequence[Any] | None = None,
) -> DistillResult:
    """Run or continue a distillation according to `config`.

    Args:
        config: The options of the run.
        teacher_pipeline: See linvideo.transfer.train.
        student: A converted transformer in memory, used instead of config.student_model_name_or_path. It is not
            changed.
        prompts: See linvideo.transfer.train.
        images: See linvideo.transfer.train.

    Raises:
        ValueError: The reasons of `train`, or: there is no student, it does not fit the teacher or has mixed layers;
            the discriminator's layer does not exist; the pipeline has two experts (Wan 2.2).
        TrainingDiverged: See `train`.
        TrainingStopped: See `train`.
        OSError: See `train`.
    """
    run, source, converted = prepare(config, teacher_pipeline, student, prompts, images)
    scheduler = config.scheduler()
    with run:
        check_critic_continues(run, run.check_continues())
        data = open_data(run, source, needs_store=config.needs_trajectories, student_scheduler=scheduler)
        models = make_models(run, source, converted)
        run.restore(models.student, models.of_stages)
        for stage in run.remaining():
            stage(run, data, models)
        pipeline = export(run, data, models.student, how_trained(config, scheduler), scheduler)
        report(run, data)
    return DistillResult(
        pipeline=pipeline,
        pipeline_path=run.output_dir / FOLDER,
        timesteps=scheduler.config.timesteps,
        seconds=run.results["seconds"],
    )


def prepare(
    config: DistillConfig,
    teacher_pipeline: Any = None,
    student: WanTransformer3DModel | None = None,
    prompts: list[str] | None = None,
    images: Sequence[Any] | None = None,
) -> tuple[Run, Source, WanTransformer3DModel]:
    """Return the run, its inputs and the converted model. The arguments are those of `distill`.

    Raises:
        ValueError: The reasons of `distill`, before hours are spent on sampling.
    """
    run, source = open_run(config, STAGES, only_transformer, teacher_pipeline, prompts, images)
    converted = load_student(config) if student is None else student
    check_student(converted, source.transformer)
    check_windows(run, converted)
    if config.dmd.adversarial_weight:
        feature_layer(source.transformer, config.dmd.adversarial_layer)
    return run, source, converted


def make_models(run: Run, source: Source, converted: WanTransformer3DModel) -> Models:
    """Return student, teacher and critic with their initial weights, ready to train."""
    config, ranks, teacher = run.config, run.ranks, source.transformer
    student = trainable(own_copy(converted, config), config, ranks)
    critic = features = None
    if config.max_train_steps:
        critic = own_copy(teacher, config)
        if config.dmd.adversarial_weight:
            torch.manual_seed(config.seed)  # the discriminator's initial weights, the same on all ranks
            features = attach_discriminator(critic, config.dmd.adversarial_layer)
            critic.discriminator.to(run.device)
        critic = trainable(critic, config, ranks)
    return Models(student, frozen(teacher, config, ranks), critic, features)


def own_copy(model: WanTransformer3DModel, config: DistillConfig) -> WanTransformer3DModel:
    """Return a copy of `model` to be trained, which still shares its tensors."""
    result = copy_module(model, share_tensors=True)
    for attn in self_attentions(result):
        if stored_attention_type(attn) == "softmax":  # diffusers' own processor doesn't support autocast everywhere
            attach_attention(attn, "softmax", LinVideoWanAttnProcessor)
    if config.attention_backend is not None:
        result.set_attention_backend(config.attention_backend)
    return result


# The stages.


def regress(run: Run, data: Data, models: Models) -> None:
    """Train the student to jump from stored states to the ends of their trajectories."""
    config, student = run.config, models.student
    count = config.regression.max_train_steps
    if not count:
        return
    rate = config.regression.learning_rate
    settings = replace(config.optimizer, learning_rate=rate, lr_scheduler="cosine", adam_beta1=0.9)
    optimizer = StudentOptimizer(student, settings, count)
    run.register(optimizer=optimizer)
    jumps = TrajectoryJumps(data.store, data.prompts, config.scheduler().config.timesteps)
    validate = data.validation(run, student, models.teacher)
    for step in run.steps(count, config.global_batch(run.ranks.size), validate):

        def loss_of(micro: int, step: int = step) -> torch.Tensor:
            positions = run.ranks.micro_batch(micro, config.train_batch_size)
            return jumps.loss(student, positions, config.seed, run.stage, step)

        loss = accumulate(loss_of, student, config, run.ranks)
        norm = run.optimize(optimizer, loss)
        run.report(loss=loss, grad_norm=norm, learning_rate=optimizer.learning_rate)


def match_distributions(run: Run, data: Data, models: Models) -> None:
    """Train the critic in every step, and the student every few steps."""
    config, every, student = run.config, run.config.dmd.student_every, models.student
    if models.critic is None:
        return
    optimizer = StudentOptimizer(student, config.optimizer, max(1, config.max_train_steps // every))
    critic_optimizer = StudentOptimizer(models.critic, config.critic_optimizer, config.max_train_steps)
    trained = trained_parameters(student)
    ema = EMAModel(trained, decay=config.ema_decay) if config.use_ema else None
    run.register(optimizer=optimizer, critic_optimizer=critic_optimizer, ema=ema)
    shift = config.dmd.flow_shift or stored_flow_shift(data.source.pipeline.scheduler)
    gradient = DmdStep(
        student,
        models.teacher,
        models.critic,
        data.prompts,
        shape=data.source.latent_shape,
        flow_shift=shift,
        config=config,
        features=models.features,
        store=data.store,
        ranks=run.ranks,
    )
    validate = data.validation(run, student, models.teacher, ema)
    for step in run.steps(config.max_train_steps, config.global_batch(run.ranks.size), validate):
        row = {}
        if (step + 1) % every == 0:
            loss = gradient.student_gradient(step)
            norm = run.optimize(optimizer, loss)
            critic_optimizer.clear()
            if ema is not None and norm is not None:
                ema.step(trained)
            row = {"loss_student": loss, "grad_norm_student": norm, "learning_rate": optimizer.learning_rate}
        loss = gradient.critic_gradient(step)
        norm = run.optimize(critic_optimizer, loss)
        run.report(loss=loss, grad_norm=norm, **row)
    if ema is not None:
        ema.copy_to(trained)


STAGES = {"regression": regress, "dmd": match_distributions}


# Inputs and end of a run.


def only_transformer(pipeline: Any) -> Expert:
    """Raise ValueError for a pipeline with two transformers."""
    if getattr(pipeline, "transformer_2", None) is not None:
        raise ValueError("expected a pipeline with one transformer, got one with two experts (Wan 2.2)")
    return Expert()


def load_student(config: DistillConfig) -> WanTransformer3DModel:
    """Load the converted model that the config names."""
    path = config.student_model_name_or_path
    if path is None:
        raise ValueError("student_model_name_or_path must name the converted model, got None")
    # The teacher's pipeline has the other parts. The model's shards go to the GPU block by block.
    return wan_transformer(load_pipeline(path, text_encoder=None, vae=None, dtype=torch.float32))


def check_critic_continues(run: Run, earlier: dict[str, Any] | None) -> None:
    """Raise ValueError when the checkpoint has a critic and the config needs none, or the other way round.

    Args:
        run: The run.
        earlier: The config of the checkpoint. None without a checkpoint.
    """
    if earlier is None or run.stage == "regression":
        return
    before, now = earlier["max_train_steps"], run.config.max_train_steps
    if (before == 0) != (now == 0):
        raise ValueError(f"max_train_steps cannot change from {before} to {now} after the regression")


def how_trained(config: DistillConfig, scheduler: FewStepScheduler) -> Training:
    """Return the entries of the model card."""
    steps = {"regression": config.regression.max_train_steps, "DMD": config.max_train_steps}
    settings = {"timesteps": scheduler.config.timesteps, "student every": config.dmd.student_every}
    earlier = config.student_model_name_or_path
    return Training("distillation to few steps", steps=steps, settings=settings, earlier=earlier)


def check_student(student: WanTransformer3DModel, teacher: WanTransformer3DModel) -> None:
    """Raise ValueError when `student` is no Wan transformer, has mixed layers or takes other inputs than `teacher`."""
    if not isinstance(student, WanTransformer3DModel):
        raise ValueError(f"expected a Wan transformer as the student, got {type(student).__name__}")
    mixed = [i for i, kind in enumerate(student.config.get("attention_types") or ()) if kind == "mixed"]
    if mixed:
        raise ValueError(f"expected a student of softmax, linear and window layers, got mixed layers {mixed}")
    for name in SHARED:
        of_student, of_teacher = getattr(student.config, name), getattr(teacher.config, name)
        if of_student != of_teacher:
            raise ValueError(f"expected a student with the teacher's {name} {of_teacher}, got {of_student}")
