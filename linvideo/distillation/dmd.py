"""Distribution matching distillation (DMD, Yin et al., arXiv 2311.18828; DMD2, arXiv 2405.14867) for rectified flow.

Let q be the distribution of the student's samples x_0 and p that of the teacher's, both noised to t. The gradient of
KL(q_t || p_t) with respect to a sample is proportional to

    s_q - s_p = ((1 - t) / t^2) (x_0^fake - x_0^real).

x_0^real is the estimate of the teacher (with its guidance). x_0^fake is that of the critic, a copy of the teacher that
is trained by flow matching on the student's current samples. In place of the weight we use the normaliser of the
papers, the distance between the sample and the teacher's estimate.

The samples may come from any source: the rollout of a few-step student, or one jump of a many-step student, which is
"DMD at t = 0", an alternative to ADM.
"""

from collections.abc import Callable

import torch

from linvideo.distillation.rollout import noised
from linvideo.run.gradient import descend, mean_square, teacher_velocity
from linvideo.trajectories.conditions import Conditions
from linvideo.trajectories.flow import NUM_TRAIN_TIMESTEPS, guide, like, predict_velocity

TINY = 1e-6


def draw_t(uniform: torch.Tensor, shift: float, t_min: float, t_max: float) -> torch.Tensor:
    """Return uniform numbers in [0, 1) shifted like a sampler's t, S t / (1 + (S - 1) t), and clamped."""
    return (shift * uniform / (1 + (shift - 1) * uniform)).clamp(t_min, t_max)


def guided_velocity(
    teacher: Callable,
    x: torch.Tensor,
    t: torch.Tensor,
    conditions: Conditions,
    negative_conditions: Conditions | None,
    guidance_scale: float,
) -> torch.Tensor:
    """Return the teacher's velocity as its sampler uses it, without guidance when guidance_scale is at most 1."""
    u = teacher_velocity(teacher, x, NUM_TRAIN_TIMESTEPS * t, conditions)
    if guidance_scale <= 1:
        return u
    return guide(u, teacher_velocity(teacher, x, NUM_TRAIN_TIMESTEPS * t, negative_conditions), guidance_scale)


def matching_loss(
    clean: torch.Tensor, x: torch.Tensor, t: torch.Tensor, u_fake: torch.Tensor, u_real: torch.Tensor
) -> torch.Tensor:
    """Return a loss whose derivative with respect to `clean` is the normalised gradient / numel.

    Its value is the mean of (x_0^fake - x_0^real)^2.

    Args:
        clean: Samples of the student.
        x: `clean` noised to t.
        t: [B], noise level of each sample.
        u_fake: Velocity of the critic at x.
        u_real: Velocity of the teacher at x.
    """
    with torch.no_grad():
        real, fake = (x - like(t, x) * u for u in (u_real, u_fake))
        distance = (clean - real).abs().flatten(1).mean(1).clamp_min(TINY)
        gradient = (fake - real) / like(distance, real)
    return descend(clean, gradient, mean_square(fake, real))


def critic_loss(
    critic: torch.nn.Module, clean: torch.Tensor, t: torch.Tensor, noise: torch.Tensor, conditions: Conditions
) -> torch.Tensor:
    """Return the flow matching loss on the student's samples, |u_C(x_t, t, c) - (eps - x_0)|^2."""
    x = noised(clean, t, noise)
    return mean_square(predict_velocity(critic, x, NUM_TRAIN_TIMESTEPS * t, conditions), noise - clean)
