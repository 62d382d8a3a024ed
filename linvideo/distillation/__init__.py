"""Distillation to few steps: a converted model learns to sample in 4 steps or fewer, without guidance.

`distill(DistillConfig(...))` runs all of it:

    distiller        a run and its stages
    distill_config   the options of a run
    regression       the first stage: learn to jump from stored states to the ends of their trajectories
    rollout          the student's own few-step sampling, with a gradient through one of its steps
    dmd              distribution matching: the losses of the student and the critic
    adversarial      an optional discriminator on the critic's features
    dmd_step         the gradients of one step over a global batch
"""

from linvideo.distillation.distill_config import DistillConfig
from linvideo.distillation.distiller import DistillResult, distill

__all__ = ["DistillConfig", "DistillResult", "distill"]
