"""AdamW for the student's weights and a separate Adam for the mixing scalars r, stepped as one."""

import math
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from diffusers.optimization import SchedulerType, get_scheduler
from torch.distributed.tensor import DTensor

from linvideo.models.branches import gates, kept_whole


@dataclass
class OptimizerConfig:
    """Names and meanings of diffusers' training scripts.

    Args:
        learning_rate: of AdamW. 1e-3 suits the embedded model (1 M parameters); for a 1.3B Wan start near 1e-5.
        lr_scheduler: a name of `diffusers.optimization.get_scheduler`, anew for selection and fine-tuning. On the
            embedded model 200 steps at 1e-3 with a cosine left 39% less velocity error than a constant 5e-4.
        lr_warmup_steps: steps over which the learning rate rises from 0.
        adam_beta1: of AdamW, decay of the gradient's running mean.
        adam_beta2: of AdamW, decay of the squared gradient's running mean.
        adam_weight_decay: of AdamW.
        adam_epsilon: of AdamW.
        use_8bit_adam: keep AdamW's moments in 8 bits; needs the package torchao.
        max_grad_norm: the weights' gradients are clipped to this norm; r's are not, Adam ignores their scale.
    """

    learning_rate: float = 1e-3
    lr_scheduler: str = "cosine"
    lr_warmup_steps: int = 10
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 1e-2
    adam_epsilon: float = 1e-8
    use_8bit_adam: bool = False
    max_grad_norm: float = 1.0

    def __post_init__(self):
        if self.use_8bit_adam and find_spec("torchao") is None:
            raise ValueError("optimizer.use_8bit_adam needs the package torchao, which is not installed")
        names = [kind.value for kind in SchedulerType if kind is not SchedulerType.PIECEWISE_CONSTANT]
        if self.lr_scheduler not in names:
            raise ValueError(f"optimizer.lr_scheduler must be one of {', '.join(names)}, got {self.lr_scheduler!r}")
        for name in ("learning_rate", "adam_epsilon", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"optimizer.{name} must be positive, got {getattr(self, name)}")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name} must lie in [0, 1), got {getattr(self, name)}")
        for name in ("lr_warmup_steps", "adam_weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"optimizer.{name} must not be negative, got {getattr(self, name)}")


class StudentOptimizer:
    """What of `student` requires a gradient trains; r, where layers are mixed, with its own Adam and clamped to [0, 1].

    Parameters may be sharded (FSDP2) or whole; gradients are expected to be the same on all ranks, or their shards.
    """

    def __init__(
        self, student: torch.nn.Module, config: OptimizerConfig, num_steps: int, r_learning_rate: float | None = None
    ):
        self.r = list(gates(student).values())
        r, kept = {id(p) for p in self.r}, {id(p) for p in kept_whole(student).values()}
        trained = [p for p in student.parameters() if p.requires_grad and id(p) not in r]
        # the same two groups however many ranks there are: an optimizer takes sharded and whole ones apart only
        groups = [[p for p in trained if (id(p) in kept) is whole] for whole in (False, True)]
        self.weights = [*groups[0], *groups[1]]
        self.max_grad_norm = config.max_grad_norm
        self.adamw = make_adamw([{"params": group} for group in groups if group], config)
        self.r_adam = torch.optim.Adam(self.r, lr=r_learning_rate) if self.r else None
        if self.r_adam is not None:
            fill_state(self.r_adam)
        self.schedule = get_scheduler(
            config.lr_scheduler,
            optimizer=self.adamw,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=num_steps,
        )

    @property
    def learning_rate(self) -> float:
        return float(self.schedule.get_last_lr()[0])

    def step(self) -> float | None:
        """Clip, step, clear gradients; returns the weights' gradient norm, or None when a gradient is not finite: then
        no parameter moves, only the schedule does. A collective where weights are sharded."""
        norm = clip_gradients(self.weights, self.max_grad_norm)
        finite = math.isfinite(norm) and all(bool(r.grad.isfinite()) for r in self.r if r.grad is not None)
        if finite:
            self.adamw.step()
            if self.r_adam is not None:
                self.r_adam.step()
                with torch.no_grad():
                    for r in self.r:
                        r.clamp_(0.0, 1.0)
        self.clear()
        self.schedule.step()
        return norm if finite else None

    def skip(self) -> None:
        """Pass over a step whose loss is not finite: only the schedule moves."""
        self.clear()
        self.schedule.step()

    def clear(self) -> None:
        for parameter in (*self.weights, *self.r):
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {
            "adamw": self.adamw.state_dict(),
            "r_adam": None if self.r_adam is None else self.r_adam.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.adamw.load_state_dict(state["adamw"])
        if self.r_adam is not None:
            self.r_adam.load_state_dict(state["r_adam"])
        self.schedule.load_state_dict(state["schedule"])


def make_adamw(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW whose state is there from the beginning."""
    settings = {
        "lr": config.learning_rate,
        "betas": (float(config.adam_beta1), float(config.adam_beta2)),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }
    if config.use_8bit_adam:
        from linvideo.run.eight_bit import CheckpointedAdamW8bit

        return CheckpointedAdamW8bit(groups, **settings)
    # fused: in place, where the default needs another 4 bytes a parameter while it steps
    adamw = torch.optim.AdamW(groups, fused=True, **settings)
    fill_state(adamw)
    return adamw


def clip_gradients(parameters: list[torch.nn.Parameter], max_norm: float) -> float:
    """The norm of all gradients together, sharded and whole ones, before they are clipped to `max_norm`."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    kinds = ([g for g in gradients if isinstance(g, DTensor) is sharded] for sharded in (True, False))
    norms = [torch.nn.utils.get_total_norm(kind) for kind in kinds if kind]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    norm = float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0
    scale = max_norm / (norm + 1e-6)
    if scale < 1:  # never of a norm that is not finite
        for gradient in gradients:
            (gradient.to_local() if isinstance(gradient, DTensor) else gradient).mul_(scale)
    return norm


def fill_state(optimizer: torch.optim.Optimizer) -> None:
    """Make the state that an optimizer of the Adam family makes in its first step, so that a checkpoint can be loaded
    into it, shard by shard."""
    rates = [group["lr"] for group in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter in parameters:
        parameter.grad = None
        optimizer.state[parameter]["step"].zero_()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
