"""The configuration of a distillation. Read like that of selective transfer:

    linvideo distill run/pipeline --config run.yaml --num_steps 4

Defaults are what worked in runs of about 1,000 steps of the embedded model. For Wan, FastVideo's published runs are a
start: learning rates 2e-6 (student) and 8e-6 (critic), 4,000 steps of batch 64.
"""

from dataclasses import dataclass, field

from linvideo.models import FewStepScheduler
from linvideo.run.optimizer import OptimizerConfig
from linvideo.run.run_config import RunConfig
from linvideo.trajectories.flow import NUM_TRAIN_TIMESTEPS


@dataclass
class RegressionConfig:
    """The first stage: the student learns to jump from states of stored trajectories to their ends.

    Args:
        max_train_steps: 0 leaves the stage out; without an adversarial term no trajectory is needed then.
        learning_rate: of this stage, with a cosine schedule; the rest is as in `optimizer`.
    """

    max_train_steps: int = 200
    learning_rate: float = 5e-4

    def __post_init__(self):
        if self.max_train_steps < 0:
            raise ValueError(f"regression.max_train_steps must not be negative, got {self.max_train_steps}")
        if not self.learning_rate > 0:
            raise ValueError(f"regression.learning_rate must be positive, got {self.learning_rate}")


@dataclass
class DmdConfig:
    """Distribution matching distillation (DMD2, Yin et al., arXiv 2405.14867).

    Args:
        student_every: the critic is trained in every step, the student in every so manieth.
        flow_shift: of the t that samples are noised to; None is that of the teacher's sampler.
        t_min: the least t they are noised to.
        t_max: the largest.
        adversarial_weight: of a discriminator on the critic's features, trained to tell the student's samples from the
            stored ones of the teacher; 0 is none. DMD2 uses about 5e-3.
        adversarial_layer: the block (0-based) whose output it reads; None is the middle one.
    """

    student_every: int = 5
    flow_shift: float | None = None
    t_min: float = 0.02
    t_max: float = 0.98
    adversarial_weight: float = 0.0
    adversarial_layer: int | None = None

    def __post_init__(self):
        if self.student_every < 1:
            raise ValueError(f"dmd.student_every must be at least 1, got {self.student_every}")
        if self.flow_shift is not None and not self.flow_shift > 0:
            raise ValueError(f"dmd.flow_shift must be positive, got {self.flow_shift}")
        if not 0 < self.t_min < self.t_max < 1:
            raise ValueError(f"expected 0 < dmd.t_min < dmd.t_max < 1, got {self.t_min} and {self.t_max}")
        if not self.adversarial_weight >= 0:
            raise ValueError(f"dmd.adversarial_weight must not be negative, got {self.adversarial_weight}")


def _optimizer(learning_rate: float) -> OptimizerConfig:
    # without momentum, as DMD2: the gradient's direction changes with the critic
    return OptimizerConfig(learning_rate=learning_rate, lr_scheduler="constant_with_warmup", adam_beta1=0.0)


@dataclass
class DistillConfig(RunConfig):
    """Distillation of a converted model to few steps, to the exported pipeline folder.

    Of the options that every run has: pretrained_model_name_or_path is the dense teacher, whose guidance
    (trajectories.guidance_scale) ends up in the student's weights; train_batch_size counts the student's roll-outs;
    max_train_steps is of the DMD stage, 0 leaves it out; use_ema is of that stage; trajectories are those of a
    transfer's run where trajectories.path and all their other settings are, with the same seed. optimizer is the
    student's, and by default without momentum.

    Args:
        student_model_name_or_path: pipeline folder or Hub id of the converted model; a stock one is distilled just the
            same. Not needed when the student is given in memory.
        num_steps: that it will sample with, at evenly spaced timesteps from 1000 down.
        timesteps: these (1000 t) in place of num_steps.
        critic_optimizer: of the critic, the network that learns the score of the student's samples.
    """

    command = "distill"

    max_train_steps: int = 1000
    use_ema: bool = True
    ema_decay: float = 0.98
    optimizer: OptimizerConfig = field(default_factory=lambda: _optimizer(2e-4))
    student_model_name_or_path: str | None = None
    num_steps: int = 4
    timesteps: list[float] | None = None
    critic_optimizer: OptimizerConfig = field(default_factory=lambda: _optimizer(4e-4))
    regression: RegressionConfig = field(default_factory=RegressionConfig)
    dmd: DmdConfig = field(default_factory=DmdConfig)

    def __post_init__(self):
        super().__post_init__()
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {self.num_steps}")
        if not self.max_train_steps and not self.regression.max_train_steps:
            raise ValueError("expected max_train_steps or regression.max_train_steps of at least 1, got 0 for both")
        if 0 < self.max_train_steps < self.dmd.student_every:
            raise ValueError(
                f"max_train_steps must be 0 or at least dmd.student_every {self.dmd.student_every}, else the student"
                f" never trains, got {self.max_train_steps}"
            )
        self.scheduler()

    def scheduler(self) -> FewStepScheduler:
        """What the student samples with; ValueError for impossible timesteps."""
        steps = [NUM_TRAIN_TIMESTEPS * (self.num_steps - k) / self.num_steps for k in range(self.num_steps)]
        return FewStepScheduler(steps if self.timesteps is None else self.timesteps)

    def schedules(self) -> dict[str, str]:
        return super().schedules() | {"critic_optimizer.lr_scheduler": self.critic_optimizer.lr_scheduler}

    @property
    def needs_trajectories(self) -> bool:
        return self.regression.max_train_steps > 0 or (self.max_train_steps > 0 and self.dmd.adversarial_weight > 0)
