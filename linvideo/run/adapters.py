"""LoRA training (Hu et al., arXiv 2106.09685): the base stays frozen and doubles as the teacher.

Feature maps and r train in full, everything else through low-rank adapters. The teacher is the student with its
adapters off and softmax in every layer, so that it costs no second copy of the weights.
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
    """Adapters in place of training all weights.

    Args:
        rank: of the adapters; None trains all weights.
        alpha: the update is scaled by alpha / rank; None is the rank.
        target_modules: ends of the names of the Linear layers that get one; diffusers' choice for Wan.
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
        """Raise ValueError when a name is the end of no Linear layer's."""
        linear = [f".{name}" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        for target in self.target_modules if self.rank is not None else ():
            if not any(name.endswith(f".{target}") for name in linear):
                raise ValueError(f"lora.target_modules must name Linear layers by their end, got {target}")


def add_adapters(student: torch.nn.Module, config: AdapterConfig) -> None:
    """In place: frozen views of the weights that the student shares with its teacher, adapters (fp32) next to them."""
    for module in student.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            view = torch.nn.Parameter(parameter.detach(), requires_grad=False)  # the teacher's own stay as they are
            module.register_parameter(name, view)
    alpha = config.rank if config.alpha is None else config.alpha
    student.add_adapter(LoraConfig(r=config.rank, lora_alpha=alpha, target_modules=config.target_modules), ADAPTER)
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # they come in the base's dtype, in which small steps are lost
    for branch in linear_branches(student).values():
        branch.requires_grad_(True)


def adapters(model: torch.nn.Module) -> dict[str, BaseTunerLayer]:
    """Name -> module that has an adapter."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


class FrozenBase:
    """The model under `student`'s adapters, called like any transformer. Only without gradient.

    Layers that are linear or mixed now run as softmax.
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
        # peft's own switch also changes requires_grad, which FSDP2 reads once and then relies on
        for layer in self.layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in self.layers:
                layer._disable_adapters = False


def merge(state: dict[str, torch.Tensor], scaling: dict[str, float]) -> dict[str, torch.Tensor]:
    """A state dict with adapters as one without: W + scaling * B A, computed in fp32, in W's dtype.

    scaling: of every module that has an adapter, by name.
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
