"""Feature-map warm-up: fit W_q and W_k of every candidate layer to its softmax attention, before all other training.

The loss of a layer is the relative error |linear - softmax|^2 / |softmax|^2 of its attention output on teacher states.
All layers are fitted at once, as LoLCATs does for language models (arXiv 2410.10254); the LinVideo paper has no such
stage. The layers run as softmax, so each sees the same inputs as in the teacher. The warm-up takes seconds, and the
selection depends on it: without it, layers that are cheap to convert look expensive.
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
        max_train_steps: Number of warm-up steps. 0 skips the warm-up.
        learning_rate: Learning rate of Adam for W_q and W_k, the weights of the feature maps.
        batch_size: Number of teacher states per step, over all ranks.
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
    """Return [2]: |output - reference|^2 and |reference|^2 over the whole tensor, in fp32."""
    reference = reference.float()
    return torch.stack([(output.float() - reference).square().sum(), reference.square().sum()])


def attention_output_errors(
    student: torch.nn.Module, batch: StateBatch, backward: bool = False, ranks: Ranks | None = None
) -> dict[int, torch.Tensor]:
    """Return layer -> relative error of its linear branch against softmax attention, on the teacher's activations.

    Args:
        student: Model with mixed layers. Other layers are ignored.
        batch: Teacher states.
        backward: Whether to add the gradient of each error to the feature weights. This happens layer by layer, so that
            only one layer's graph exists at a time.
        ranks: Ranks that hold the other samples, or tokens, of the batch. Errors and gradients are those of the whole
            batch. None means this process alone.
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
            return softmax_out  # so that later layers see the teacher's activations

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
    """Run the warm-up on one process, outside of a run: one Adam step of W_q and W_k per batch."""
    weights = list(feature_weights(student).values())
    if not weights:  # the feature map has none
        return
    optimizer = torch.optim.Adam(weights, lr=learning_rate)
    for batch in batches:
        attention_output_errors(student, batch, backward=True)
        optimizer.step()
        optimizer.zero_grad()


def load_feature_maps(model: torch.nn.Module, path: str | Path) -> torch.nn.Module:
    """Load the warmed-up W_q and W_k from a run's feature_maps.safetensors into the linear layers of `model`, in place.

    Raises:
        ValueError: The file is missing or damaged, or its weights for a linear layer of `model` are missing, have
            another shape or are not finite.
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
