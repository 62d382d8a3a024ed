"""The options of a distillation, read in the same way as those of selective transfer:

    linvideo distill run/pipeline --config run.yaml --num_steps 4

The defaults worked in runs of about 1,000 steps with the embedded model. For Wan, FastVideo's published runs are a
starting point: learning rates 2e-6 (student) and 8e-6 (critic), 4,000 steps with batch size 64.
"""

from dataclasses import dataclass, field

from linvideo.models import FewStepScheduler
from linvideo.run.optimizer import OptimizerConfig
from linvideo.run.run_config import RunConfig
from linvideo.trajectories.flow import NUM_TRAIN_TIMESTEPS


@dataclass
class RegressionConfig:
    """The first stage, in which the student learns to jump from states of stored trajectories to their ends.

    Args:
        max_train_steps: Number of steps of the stage. 0 skips it; without an adversarial term no trajectories are
            needed then.
        learning_rate: Learning rate of the stage, with a cosine schedule. The other settings are those of `optimizer`.
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
        student_every: Number of steps per update of the student. The critic is updated in every step, because it has to
            keep up with the student's samples.
        flow_shift: Shift of the distribution of t, the noise level of the samples that teacher and critic see. None
            means the shift of the teacher's sampler.
        t_min: Smallest such t.
        t_max: Largest such t.
        adversarial_weight: Weight of the adversarial loss, from a discriminator on the critic's features that learns to
            tell the student's samples from the teacher's stored ones. 0 turns it off. DMD2 uses about 5e-3.
        adversarial_layer: Block of the critic (0-based) whose output the discriminator reads. None means the middle
            one.
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
    # without momentum, as in DMD2, because the direction of the gradient changes with the critic
    return OptimizerConfig(learning_rate=learning_rate, lr_scheduler="constant_with_warmup", adam_beta1=0.0)


@dataclass
class DistillConfig(RunConfig):
    """Distillation of a converted model to few steps, up to the exported pipeline folder.

    Notes on the options that every run has: pretrained_model_name_or_path is the dense teacher, whose guidance
    (trajectories.guidance_scale) is distilled into the student's weights. train_batch_size counts rollouts of the
    student. max_train_steps and use_ema apply to the DMD stage; max_train_steps 0 skips it. To reuse the trajectories
    of a transfer run, set trajectories.path to its folder and keep the seed and all other settings of the trajectories.
    optimizer is that of the student, by default without momentum.

    Args:
        student_model_name_or_path: Pipeline folder or Hub id of the converted model. A stock model works, too. Not
            needed when the student is given in memory.
        num_steps: Number of sampler steps of the student, at evenly spaced timesteps from 1000 down.
        timesteps: Timesteps of the student's sampler (1000 t), used instead of num_steps.
        critic_optimizer: Optimizer of the critic, the network that learns the score of the student's samples.
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
        """Return the student's sampler. Raise ValueError for impossible timesteps."""
        steps = [NUM_TRAIN_TIMESTEPS * (self.num_steps - k) / self.num_steps for k in range(self.num_steps)]
        return FewStepScheduler(steps if self.timesteps is None else self.timesteps)

    def schedules(self) -> dict[str, str]:
        return super().schedules() | {"critic_optimizer.lr_scheduler": self.critic_optimizer.lr_scheduler}

    @property
    def needs_trajectories(self) -> bool:
        return self.regression.max_train_steps > 0 or (self.max_train_steps > 0 and self.dmd.adversarial_weight > 0)
