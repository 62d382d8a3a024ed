"""The sensitivity of each layer: the velocity error of the model with that layer converted and all others softmax.

It needs no training. We use it as a baseline for the paper's learned selection: at small scale, the layers with the
lowest errors were as good a choice as any learned one.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from linvideo.models import attention_types
from linvideo.models.branches import linear_branches
from linvideo.nn import WindowAttentionBranch
from linvideo.progress import bar
from linvideo.run.parallel import Ranks
from linvideo.trajectories.flow import predict_velocity
from linvideo.trajectories.store import StateBatch


@dataclass
class SensitivityConfig:
    """The sensitivity pass, which measures the error with each layer alone converted.

    Args:
        num_states: Number of teacher states that each layer is measured on. 0 skips the pass.
        batch_size: Number of teacher states per forward, on each rank.
    """

    num_states: int = 96
    batch_size: int = 16

    def __post_init__(self):
        if self.num_states < 0:
            raise ValueError(f"sensitivity.num_states must not be negative, got {self.num_states}")
        if self.batch_size < 1:
            raise ValueError(f"sensitivity.batch_size must be at least 1, got {self.batch_size}")


@torch.no_grad()
def velocity_error(student: torch.nn.Module, batches: Iterable[StateBatch], ranks: Ranks | None = None) -> float:
    """Return the mean over elements of |u_student - u_teacher|^2 on teacher states, with the stored u of the teacher.

    Args:
        student: The model.
        batches: The teacher states.
        ranks: Ranks that hold different batches; the mean is over all of them. None means this process alone.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=student.device)
    for batch in batches:
        u = predict_velocity(student, batch.x, batch.timestep, batch.conditions)
        if batch.counts:
            sums += torch.stack([(u - batch.u).square().sum().double(), torch.tensor(u.numel(), device=u.device)])
    total, count = (sums if ranks is None else ranks.sum(sums)).tolist()
    return total / count


def layer_sensitivity(
    student: torch.nn.Module,
    batches: Callable[[], Iterable[StateBatch]],
    progress: bool = True,
    ranks: Ranks | None = None,
) -> tuple[dict[int, float], float]:
    """Return layer -> velocity error with that layer alone linear or, for window layers, with that layer as it is.

    The second result is the error with softmax in every layer.

    Args:
        student: Model with mixed, linear or window layers. Its r and other parameters are not changed.
        batches: Function that returns the same teacher states at every call, on each rank its own part.
        progress: Whether to show a progress bar.
        ranks: The ranks of the run. None means this process alone.

    Raises:
        ValueError: An error is not finite.
    """
    branches = linear_branches(student)
    layers = list(branches)
    errors = {}
    with attention_types(student, dict.fromkeys(layers, "softmax")):
        floor = velocity_error(student, batches(), ranks)
        for layer in bar(layers, progress, desc="sensitivity", unit="layer"):
            kind = "window" if isinstance(branches[layer], WindowAttentionBranch) else "linear"
            with attention_types(student, {layer: kind}):
                errors[layer] = velocity_error(student, batches(), ranks)
    for what, error in {"no layer": floor, **{f"layer {layer} alone": x for layer, x in errors.items()}}.items():
        if not math.isfinite(error):
            raise ValueError(
                f"the velocity error with {what} converted is {error}: the states or the model are not finite"
            )
    return errors, floor
