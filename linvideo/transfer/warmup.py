"""Feature-map warm-up: fit W_q and W_k of every candidate layer to its softmax attention, before anything else trains.

Per layer the relative error |linear - softmax|^2 / |softmax|^2 of the attention output, on teacher states, all layers
at once (as LoLCATs does for language models, arXiv 2410.10254; not in the LinVideo paper). The layers run as softmax,
so each sees the inputs it has in the teacher. It takes seconds and decides what the selection then sees: without it
the cheap layers look expensive.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from linvideo.models import attention_types
from linvideo.models.branches import feature_weights, linear_branches
from linvideo.run.parallel import Ranks
from linvideo.trajectories.atomic_files import read_safetensors
from linvideo.trajectories.flow import predict_velocity
from linvideo.trajectories.store import StateBatch


@dataclass
class WarmupConfig:
    """Feature-map warm-up.

    Args:
        max_train_steps: of warm-up; 0 skips it.
        learning_rate: of Adam on W_q and W_k.
        batch_size: teacher states a step, of all ranks together.
    """

    max_train_steps: int = 80
    learning_rate: float = 2e-2
    batch_size: int = 8

    def __post_init__(self):
        if self.max_train_steps < 0:
            raise ValueError(f"warmup.max_train_steps must not be negative, got {self.max_train_steps}")
        if self.learning_rate <= 0:
            raise ValueError(f"warmup.learning_rate must be positive, got {self.learning_rate}")
        if self.batch_size < 1:
            raise ValueError(f"warmup.batch_size must be at least 1, got {self.batch_size}")


def square_sums(output: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """[2]: |output - reference|^2 and |reference|^2 over the whole tensor, in fp32."""
    reference = reference.float()
    return torch.stack([(output.float() - reference).square().sum(), reference.square().sum()])


def attention_output_errors(
    student: torch.nn.Module, batch: StateBatch, backward: bool = False, ranks: Ranks | None = None
) -> dict[int, torch.Tensor]:
    """Layer -> relative error of its linear branch's output against softmax attention, on the teacher's activations.

    Args:
        student: with mixed layers; the others are not looked at.
        backward: also add each error's gradient to the feature weights, layer by layer: no more than one layer's graph
            is alive at a time.
        ranks: that hold the other samples, or tokens, of the batch: errors and gradients are the whole batch's.
    """
    errors: dict[int, torch.Tensor] = {}
    size = 1 if ranks is None else ranks.size

    def compare(layer: int):
        def hook(branch, args, kwargs, output):
            q, k, v = (x.detach() for x in args)
            softmax_out = kwargs["softmax_out"]
            with torch.set_grad_enabled(backward):
                mine = square_sums(branch.forward(q, k, v, group=kwargs.get("group")), softmax_out) * batch.counts
                every = mine.detach() if ranks is None else ranks.sum(mine)
                if backward:
                    (mine[0] / every[1] * size).backward()
            errors[layer] = every[0] / every[1]
            return softmax_out  # the layers behind see the teacher's activations

        return hook

    branches = {layer: branch for layer, branch in linear_branches(student).items() if branch.r is not None}
    hooks = [branch.register_forward_hook(compare(layer), with_kwargs=True) for layer, branch in branches.items()]
    try:
        with torch.no_grad(), attention_types(student, dict.fromkeys(branches, "mixed")):
            predict_velocity(student, batch.x, batch.timestep, batch.conditions)
    finally:
        for hook in hooks:
            hook.remove()
    if backward and ranks is not None:
        ranks.average_gradients(feature_weights(student).values())
    return errors


def fit_feature_maps(student: torch.nn.Module, batches: Iterable[StateBatch], learning_rate: float) -> None:
    """The warm-up on one process and without a run around it: an Adam step of W_q and W_k for each batch."""
    weights = list(feature_weights(student).values())
    if not weights:  # maps without weights
        return
    optimizer = torch.optim.Adam(weights, lr=learning_rate)
    for batch in batches:
        attention_output_errors(student, batch, backward=True)
        optimizer.step()
        optimizer.zero_grad()


def load_feature_maps(model: torch.nn.Module, path: str | Path) -> torch.nn.Module:
    """Give the linear layers of `model`, in place, the warmed-up W_q and W_k a run has left in
    feature_maps.safetensors.

    Raises:
        ValueError: the file is not there or damaged, or has none for a layer that is linear here, or one of another
            shape, or one that is not finite.
    """
    _, tensors = read_safetensors(path)
    with torch.no_grad():
        for name, weight in feature_weights(model).items():
            if name not in tensors:
                raise ValueError(f"{path} has no {name}: that layer was not warmed up")
            if tensors[name].shape != weight.shape:
                got = list(tensors[name].shape)
                raise ValueError(f"expected {name} of shape {list(weight.shape)} in {path}, got {got}")
            if not tensors[name].isfinite().all():
                raise ValueError(f"{name} in {path} is not finite")
            weight.copy_(tensors[name])
    return model
