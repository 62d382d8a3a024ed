"""Few steps: a converted model, distilled so that it samples in 4 steps or fewer without guidance.

`Distiller(DistillConfig(...)).train()` does all of it, on the base that linvideo.training's runs have:

    distiller     the stages: regression -> dmd -> export
    config        its options
    regression    the start: from stored trajectories to where they end
    rollout       the student's own few-step sampling, one of its steps with gradient
    dmd           distribution matching: what moves the student, and what its critic learns
    adversarial   an optional second opinion on the critic's features
    step          one step's gradients over a global batch
"""

from linvideo.distillation.distill import Distiller, DistillResult
from linvideo.distillation.distill_config import DistillConfig

__all__ = ["DistillConfig", "DistillResult", "Distiller"]
