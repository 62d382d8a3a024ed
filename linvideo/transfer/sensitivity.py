"""Per-layer sensitivity: the velocity error of the model with one layer linear and all others softmax, without
training.

A baseline of ours next to the paper's learned selection: at small scale the layers with the lowest error were as good a
choice as any learned one.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from linvideo.models import attention_types
from linvideo.models.branches import linear_branches
from linvideo.run.parallel import Ranks
from linvideo.trajectories.flow import predict_velocity
from linvideo.trajectories.store import StateBatch


@dataclass
class SensitivityConfig:
    """The sensitivity pass, each layer linear alone.

    Args:
        num_states: teacher states each layer is judged on; 0 skips the pass.
        batch_size: teacher states a forward, on each rank.
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
    """Mean over elements of |u_student - u_teacher|^2 on teacher states, the teacher's u as stored.

    ranks: that hold other batches; the mean is over all of them.
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
    """(layer -> velocity error with that layer alone linear, the error with none linear).

    Args:
        student: with mixed or linear layers; its r and parameters are not touched.
        batches: gives the same teacher states on every call; of several `ranks` each gives its own.

    Raises:
        ValueError: an error is not finite.
    """
    layers = list(linear_branches(student))
    errors = {}
    with attention_types(student, dict.fromkeys(layers, "softmax")):
        floor = velocity_error(student, batches(), ranks)
        for layer in tqdm(layers, desc="sensitivity", unit="layer", disable=not progress):
            with attention_types(student, {layer: "linear"}):
                errors[layer] = velocity_error(student, batches(), ranks)
    for what, error in {"no layer": floor, **{f"layer {layer} alone": x for layer, x in errors.items()}}.items():
        if not math.isfinite(error):
            raise ValueError(
                f"the velocity error with {what} linear is {error}: the states or the model are not finite"
            )
    return errors, floor
