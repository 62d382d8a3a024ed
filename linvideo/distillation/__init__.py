"""Few steps: a converted model, distilled so that it samples in 4 steps or fewer without guidance.

`distill(DistillConfig(...))` does all of it:

    distiller     the run and its stages; distill_config, its options
    regression    the start: from stored trajectories to where they end
    rollout       the student's own few-step sampling, one of its steps with gradient
    dmd           distribution matching: what moves the student, and what its critic learns
    adversarial   an optional second opinion on the critic's features
    dmd_step      one step's gradients over a global batch
"""

from linvideo.distillation.distill_config import DistillConfig
from linvideo.distillation.distiller import DistillResult, distill

__all__ = ["DistillConfig", "DistillResult", "distill"]
