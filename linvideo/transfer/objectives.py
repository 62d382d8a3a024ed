"""Training objectives, which compare student S and teacher T under the same condition. Losses are fp32.

Anytime distribution matching (ADM; LinVideo, arXiv 2510.08318) minimises KL(q_t || p_t) between the student's and the
teacher's states at any t. Its gradient with respect to a student's state x_hat_t is -(s_T - s_S). With the score
identity of flow.py,

    s_T - s_S = -((1 - t) / t) (u_T - u_S),

with both velocities evaluated at x_hat_t and without gradient. The student provides its own score, so no fake-score
network is needed. How the paper draws x_hat_t is not known to us. Two readings are implemented here. A third one,
which re-noises the student's one-step x_0, is left out because it lost variety in our ablations (docs/results.md).
"""

from dataclasses import dataclass

import torch

from linvideo.run.gradient import descend, mean_square, teacher_velocity
from linvideo.trajectories.flow import NUM_TRAIN_TIMESTEPS, like, predict_velocity
from linvideo.trajectories.store import StateBatch
from linvideo.transfer.rollouts import StudentRollouts

OBJECTIVES = ("hybrid", "mse", "own_mse", "adm", "adm_step")
WEIGHTS = ("unit", "score")


@dataclass
class ObjectiveConfig:
    """The loss of fine-tuning.

    Args:
        name: Objective, one of:
            "mse" (default): velocity error on stored teacher states, the paper's baseline. At equal training time no
            other objective came out better in our ablations (docs/results.md).
            "hybrid" (ours): "mse" for `mse_steps` steps, then "mse" and "adm" alternating.
            "own_mse": velocity error on the student's own states.
            "adm": ADM with x_hat_t a small ODE step further on the student's own trajectory.
            "adm_step": ADM with x_hat_t one whole sampler step further and the weight (1 - t) / t, the paper's text as
            we read it. With samplers of a dozen steps the velocity error grows.
        mse_steps: Number of "mse" steps that "hybrid" begins with. The identity behind ADM holds near the teacher, so
            ADM should start from a student that is close to it.
        max_dt: Largest size in t of the small step of "adm", which is drawn uniformly from (0, max_dt].
        weight: Weight of "adm": "unit", or "score" for (1 - t) / t clipped at weight_clip. "adm_step" always uses
            "score".
        weight_clip: Upper limit of the "score" weight, which grows without bound towards t = 0.
    """

    name: str = "mse"
    mse_steps: int = 100
    max_dt: float = 0.03
    weight: str = "unit"
    weight_clip: float = 5.0

    def __post_init__(self):
        if self.name not in OBJECTIVES:
            raise ValueError(f"objective.name must be one of {', '.join(OBJECTIVES)}, got {self.name!r}")
        if self.weight not in WEIGHTS:
            raise ValueError(f"objective.weight must be one of {', '.join(WEIGHTS)}, got {self.weight!r}")
        if self.mse_steps < 0:
            raise ValueError(f"objective.mse_steps must not be negative, got {self.mse_steps}")
        if not 0 < self.max_dt <= 1:
            raise ValueError(f"objective.max_dt must lie in (0, 1], got {self.max_dt}")
        if self.weight_clip <= 0:
            raise ValueError(f"objective.weight_clip must be positive, got {self.weight_clip}")

    def at(self, step: int) -> str:
        """Return the objective at `step`, "mse" or "adm" for "hybrid"."""
        if self.name != "hybrid":
            return self.name
        return "adm" if step >= self.mse_steps and (step - self.mse_steps) % 2 else "mse"


def teacher_state_mse(student: torch.nn.Module, batch: StateBatch) -> torch.Tensor:
    """Return the mean over elements of |u_S(x_t, t, c) - u_T(x_t, t, c)|^2 on stored teacher states."""
    return mean_square(predict_velocity(student, batch.x, batch.timestep, batch.conditions), batch.u)


def own_state_mse(student: torch.nn.Module, teacher: torch.nn.Module, rollouts: StudentRollouts) -> torch.Tensor:
    """Return the velocity error on the student's own states, and advance the rollouts."""
    conditions = rollouts.conditions()
    u_student = predict_velocity(student, rollouts.x, rollouts.timestep, conditions)
    u_teacher = teacher_velocity(teacher, rollouts.x, rollouts.timestep, conditions)
    rollouts.advance(student, u_student)
    return mean_square(u_student, u_teacher)


def score_weight(t: torch.Tensor, clip: float) -> torch.Tensor:
    """Return (1 - t) / t for t in [0, 1], clipped at `clip`."""
    return ((1 - t) / t.clamp_min(torch.finfo(torch.float32).tiny)).clamp_max(clip)


def adm_gradient(u_teacher: torch.Tensor, u_student: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the gradient of KL(q_t || p_t) with respect to x_hat_t: -(s_T - s_S) = weight * (u_T - u_S).

    The exact weight is (1 - t) / t. Gradient descent moves the student's state, x_hat = x - dt * u_S, towards where the
    teacher would have gone.
    """
    return like(weight, u_teacher) * (u_teacher - u_student)


def adm_small_step(
    student: torch.nn.Module,
    teacher: torch.nn.Module,
    rollouts: StudentRollouts,
    dt: torch.Tensor,
    config: ObjectiveConfig,
) -> torch.Tensor:
    """Return the ADM loss at x_hat_t = x_s - dt u_S(x_s), t = s - dt, and advance the rollouts.

    The gradient is divided by |d x_hat / d u_S| = dt, so that its size doesn't depend on the size of the step. To first
    order in dt it is the gradient of the own-state velocity error.

    Args:
        student: The model to train.
        teacher: The teacher, called like the student.
        rollouts: Rollouts of the student.
        dt: [B], size of the small step in t, at most half of the rollouts' margin.
        config: Options of the weight.

    The value of the loss is the weighted mean of (u_T - u_S)^2 at x_hat_t.
    """
    t = rollouts.sigma - dt
    weight = torch.ones_like(t) if config.weight == "unit" else score_weight(t, config.weight_clip)
    return _adm(student, teacher, rollouts, dt, t, weight, normalize=True)


def adm_sampler_step(
    student: torch.nn.Module, teacher: torch.nn.Module, rollouts: StudentRollouts, config: ObjectiveConfig
) -> torch.Tensor:
    """Return the ADM loss after a whole sampler step, weight (1 - t) / t clipped, and advance the rollouts."""
    t = sampler_step_end(rollouts)
    weight = score_weight(t, config.weight_clip)
    return _adm(student, teacher, rollouts, rollouts.sigma - t, t, weight, normalize=False)


def sampler_step_end(rollouts: StudentRollouts) -> torch.Tensor:
    """Return t [B] at the end of each rollout's next sampler step.

    At t = 0 there is no score, so a step that would end there, or leave the expert's range, stops half-way to that end.
    """
    lowest = rollouts.sigma - rollouts.margin
    return torch.where(rollouts.sigma_next > lowest, rollouts.sigma_next, lowest + rollouts.margin / 2)


def _adm(student, teacher, rollouts, dt, t, weight, normalize: bool) -> torch.Tensor:
    conditions = rollouts.conditions()
    u = predict_velocity(student, rollouts.x, rollouts.timestep, conditions)
    x_hat = rollouts.x - like(dt, u) * u
    with torch.no_grad():
        timestep = NUM_TRAIN_TIMESTEPS * t
        u_teacher = teacher_velocity(teacher, x_hat, timestep, conditions)
        u_student = predict_velocity(student, x_hat, timestep, conditions)
        gradient = adm_gradient(u_teacher, u_student, weight)
        value = (gradient * (u_teacher - u_student)).mean()
    rollouts.advance(student, u)
    # -u is x_hat / dt as far as the gradient goes, also at the end of an expert's range, where dt is 0
    return descend(-u if normalize else x_hat, gradient, value)
