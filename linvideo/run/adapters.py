"""LoRA training (Hu et al., arXiv 2106.09685): the base stays frozen and doubles as the teacher.

Feature maps and r are trained directly, everything else through low-rank adapters. The teacher is the student with its
adapters disabled and softmax in every layer, so it needs no second copy of the weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer

from linvideo.models import attention_types
from linvideo.models.branches import linear_branches

ADAPTER = "default"


@dataclass
class AdapterConfig:
    """LoRA adapters, instead of training all weights.

    Args:
        rank: Rank of the adapters. None trains all weights instead.
        alpha: Numerator of the scale alpha / rank that is applied to an adapter's output. None means the rank,
            which gives a scale of 1.
        target_modules: Name endings of the Linear layers that get an adapter. The default is diffusers' choice for Wan.
    """

    rank: int | None = None
    alpha: float | None = None
    target_modules: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])

    def __post_init__(self):
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"lora.rank must be at least 1, got {self.rank}")
        if self.alpha is not None and self.alpha <= 0:
            raise ValueError(f"lora.alpha must be positive, got {self.alpha}")
        if not self.target_modules:
            raise ValueError("lora.target_modules must name at least one module, got none")

    def check(self, model: torch.nn.Module) -> None:
        """Raise ValueError when an entry of target_modules matches no Linear layer."""
        linear = [f".{name}" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        for target in self.target_modules if self.rank is not None else ():
            if not any(name.endswith(f".{target}") for name in linear):
                raise ValueError(f"lora.target_modules must be endings of names of Linear layers, got {target}")


def add_adapters(student: torch.nn.Module, config: AdapterConfig) -> None:
    """Add fp32 adapters to `student` in place, and freeze the weights that it shares with its teacher."""
    for module in student.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            view = torch.nn.Parameter(parameter.detach(), requires_grad=False)  # the teacher's own don't change
            module.register_parameter(name, view)
    alpha = config.rank if config.alpha is None else config.alpha
    student.add_adapter(LoraConfig(r=config.rank, lora_alpha=alpha, target_modules=config.target_modules), ADAPTER)
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # peft's are in the base's dtype, in which small steps are lost
    for branch in linear_branches(student).values():
        branch.requires_grad_(True)


def adapters(model: torch.nn.Module) -> dict[str, BaseTunerLayer]:
    """Return name -> module for all modules that have an adapter."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


class FrozenBase:
    """The model under the adapters of `student`, called like any transformer, without gradients only.

    All layers run as softmax here.
    """

    def __init__(self, student: torch.nn.Module):
        self.student, self.layers = student, list(adapters(student).values())
        self.config = student.config

    @property
    def dtype(self) -> torch.dtype:
        return self.student.dtype

    @property
    def device(self) -> torch.device:
        return self.student.device

    def __call__(self, *args, **kwargs):
        softmax = dict.fromkeys(linear_branches(self.student), "softmax")
        with self._adapters_off(), attention_types(self.student, softmax):
            return self.student(*args, **kwargs)

    @contextmanager
    def _adapters_off(self) -> Iterator[None]:
        # peft's own switch also changes requires_grad, which FSDP2 reads only once
        for layer in self.layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in self.layers:
                layer._disable_adapters = False


def merge(state: dict[str, torch.Tensor], scaling: dict[str, float]) -> dict[str, torch.Tensor]:
    """Merge the adapters in a state dict into its weights: W + scaling * B A, computed in fp32, returned in W's dtype.

    Args:
        state: State dict of a model with adapters.
        scaling: Scale of each adapter, by module name.
    """
    merged = {name: tensor for name, tensor in state.items() if ".lora_" not in name and ".base_layer." not in name}
    for name, scale in scaling.items():
        for part in ("weight", "bias"):
            if (key := f"{name}.base_layer.{part}") in state:
                merged[f"{name}.{part}"] = state[key]
        down, up = (state[f"{name}.lora_{side}.{ADAPTER}.weight"].float() for side in "AB")
        weight = state[f"{name}.base_layer.weight"]
        merged[f"{name}.weight"] = (weight.float() + scale * (up @ down)).to(weight.dtype)
    return merged
