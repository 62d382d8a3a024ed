"""Feature-map warm-up: fit W_q and W_k of every candidate layer to its softmax attention, before all other training.

The loss of a layer is the relative error |linear - softmax|^2 / |softmax|^2 of its attention output on teacher states.
All layers are fitted at once, as LoLCATs does for language models (arXiv 2410.10254); the LinVideo paper has no such
stage. Window layers are fitted in the same way, together with their gains. The layers run as softmax, so each sees the
same inputs as in the teacher. The warm-up takes seconds, and the selection depends on it: without it, layers that are
cheap to convert look expensive.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from linvideo.models import attention_types
from linvideo.models.branches import feature_weights, linear_branches
from linvideo.nn import LinearAttentionBranch, WindowAttentionBranch
from linvideo.run.parallel import Ranks
from linvideo.trajectories.atomic_files import read_safetensors
from linvideo.trajectories.flow import predict_velocity
from linvideo.trajectories.store import StateBatch


@dataclass
class WarmupConfig:
    """Feature-map warm-up.

    Args:
        max_train_steps: Number of warm-up steps. 0 skips the warm-up.
        learning_rate: Learning rate of Adam for W_q and W_k, the weights of the feature maps, and the gains of window
            layers.
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


def candidates(student: torch.nn.Module) -> dict[int, LinearAttentionBranch]:
    """Return {layer: branch} for the mixed and the window layers."""
    branches = linear_branches(student).items()
    return {
        layer: branch for layer, branch in branches if branch.r is not None or isinstance(branch, WindowAttentionBranch)
    }


@contextmanager
def softmax_with_hooks(student: torch.nn.Module, make_hook: Callable[[int], Callable]) -> Iterator[None]:
    """Context manager in which the candidates run as softmax and a function sees their inputs.

    Args:
        student: The model.
        make_hook: Function of a layer that returns a function of (branch, rows, settings, softmax_out): q, k and v
            [B, N, H, D] without graph, the other arguments of the branch's forward, and softmax attention's output.
    """

    def hook(layer: int):
        function = make_hook(layer)

        def call(branch, args, settings, output):
            rows = tuple(x.detach() for x in args)
            softmax_out = settings.pop("softmax_out", None)
            if softmax_out is None:
                softmax_out = branch.forward(*rows, **settings, softmax=True)
            function(branch, rows, settings, softmax_out)
            return softmax_out  # so that later layers see the teacher's activations

        return call

    branches = candidates(student)
    types = {layer: "mixed" if branch.r is not None else "window" for layer, branch in branches.items()}
    hooks = [branch.register_forward_hook(hook(layer), with_kwargs=True) for layer, branch in branches.items()]
    try:
        with torch.no_grad(), attention_types(student, types):
            yield
    finally:
        for handle in hooks:
            handle.remove()


def attention_output_errors(
    student: torch.nn.Module, batch: StateBatch, backward: bool = False, ranks: Ranks | None = None
) -> dict[int, torch.Tensor]:
    """Return layer -> relative error of its branch against softmax attention, on the teacher's activations.

    Args:
        student: Model with mixed or window layers. Other layers are ignored.
        batch: Teacher states.
        backward: Whether to add the gradient of each error to the feature weights. This happens layer by layer, so that
            only one layer's graph exists at a time.
        ranks: Ranks that hold the other samples, or tokens, of the batch. Errors and gradients are those of the whole
            batch. None means this process alone.
    """
    errors: dict[int, torch.Tensor] = {}
    size = 1 if ranks is None else ranks.size

    def compare(layer: int):
        def function(branch, rows, settings, softmax_out):
            with torch.set_grad_enabled(backward):
                mine = square_sums(branch.forward(*rows, **settings), softmax_out) * batch.counts
                every = mine.detach() if ranks is None else ranks.sum(mine)
                if backward and mine.requires_grad:  # a map may have no weights
                    (mine[0] / every[1] * size).backward()
            errors[layer] = every[0] / every[1]

        return function

    with softmax_with_hooks(student, compare):
        predict_velocity(student, batch.x, batch.timestep, batch.conditions)
    if backward and ranks is not None:
        ranks.average_gradients(feature_weights(student).values())
    return errors


def start_gains(student: torch.nn.Module, batch: StateBatch, ranks: Ranks | None = None) -> None:
    """Set the gains of window layers so that the far frames have, on average, the weight that softmax gives them.

    Args:
        student: Model with window layers, which are set; other layers are ignored.
        batch: Teacher states.
        ranks: Ranks that hold other samples; the average is over all samples. None means this process alone.
    """
    gains: dict[int, torch.Tensor] = {}
    samples = len(batch.x) * batch.counts

    def measure(layer: int):
        def function(branch, rows, settings, softmax_out):
            if isinstance(branch, WindowAttentionBranch):
                gains[layer] = branch.measured_log_gain(*rows[:2], **settings)

        return function

    with softmax_with_hooks(student, measure):
        predict_velocity(student, batch.x, batch.timestep, batch.conditions)
    with torch.no_grad():
        for layer, branch in candidates(student).items():
            if layer in gains:
                mine = torch.cat([gains[layer] * samples, gains[layer].new_tensor([samples])])
                every = mine if ranks is None else ranks.sum(mine)
                branch.log_gain.copy_(every[:-1] / every[-1])


def fit_feature_maps(student: torch.nn.Module, batches: Iterable[StateBatch], learning_rate: float) -> None:
    """Run the warm-up on one process, outside of a run: one Adam step per batch.

    It fits W_q and W_k and, in window layers, the gains, which `start_gains` sets before.
    """
    weights = list(feature_weights(student).values())
    if not weights:  # the feature map has none
        return
    optimizer = torch.optim.Adam(weights, lr=learning_rate)
    for batch in batches:
        attention_output_errors(student, batch, backward=True)
        optimizer.step()
        optimizer.zero_grad()


def load_feature_maps(
    model: torch.nn.Module, path: str | Path, layers: Collection[int] | None = None
) -> torch.nn.Module:
    """Load what the warm-up has fitted, from a run's feature_maps.safetensors, into the layers of `model`, in place.

    Args:
        model: Model with linear, mixed or window layers.
        path: File of the fitted maps: W_q and W_k and, of window layers, the gains.
        layers: Numbers of the layers to load. None means all that have a linear branch.

    Raises:
        ValueError: The file is missing or damaged, or its weights for one of these layers are missing, of another kind
            of layer, of another shape or not finite.
    """
    _, tensors = read_safetensors(path)
    weights = feature_weights(model, layers)
    wanted, fitted = ({name.rpartition(".")[0] for name in found} for found in (weights, tensors))
    for layer in sorted(wanted & fitted):
        kind, got = ("window" if f"{layer}.log_gain" in found else "linear" for found in (weights, tensors))
        if kind != got:
            raise ValueError(f"expected {layer} of a {kind} layer in {path}, got that of a {got} layer")
    with torch.no_grad():
        for name, weight in weights.items():
            if name not in tensors:
                raise ValueError(f"{path} has no {name}: that layer was not warmed up")
            if tensors[name].shape != weight.shape:
                got = list(tensors[name].shape)
                raise ValueError(f"expected {name} of shape {list(weight.shape)} in {path}, got {got}")
            if not tensors[name].isfinite().all():
                raise ValueError(f"{name} in {path} is not finite")
            weight.copy_(tensors[name])
    return model
