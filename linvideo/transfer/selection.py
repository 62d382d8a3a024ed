"""Selective transfer: which layers become linear (LinVideo, arXiv 2510.08318).

Every candidate layer computes r * softmax + (1 - r) * linear with its own scalar r, and all weights train on

    L = L_task + lambda_con * L_con + lambda_reg * L_reg.

L_con asks for the target number of linear layers, L_reg = sum_l (1 - |2 r_l - 1|^alpha) pushes every r to 0 or 1, with
alpha annealed from 20 to 2. At the end the layers with the smallest r, as many as the target says, become linear; or,
as in the paper, those with r < 0.5.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from linvideo.transfer.objectives import OBJECTIVES

METHODS = ("learned", "sensitivity", "layers")
COUNTS = ("continuous", "rounded")
ROUNDINGS = ("top_k", "threshold")


@dataclass
class SelectionConfig:
    """Layer selection. The defaults work in about 100 steps; the paper's form needs thousands.

    Args:
        method: "learned" (r, the paper), "sensitivity" (lowest errors of that pass, no training) or "layers".
        num_linear_layers: the target; None is half of the model's layers (of "layers": its length).
        layers: 0-based layers for method "layers".
        max_train_steps: of the mixed stage (method "learned").
        count: form of L_con.
            "continuous" (ours): (mean r - (1 - target/L))^2, which does not grow with depth.
            "rounded" (paper): (number of r that round to 0, minus target)^2 with a straight-through estimator; it gives
            every layer the same push, and with few steps all r end near 0.5.
        rounding: which layers the learned r makes linear.
            "top_k" (ours): the smallest r, exactly as many as the target.
            "threshold" (paper): every r < 0.5, however many; none is an error. Method "learned" only.
        lambda_con: weight of L_con. Paper: 0.01, with count "rounded".
        lambda_reg: weight of L_reg. Paper: 0.01, with count "rounded".
        alpha_start: alpha of L_reg at the first step, linear over the stage.
        alpha_end: alpha of L_reg at the last step.
        r_init: start of r. Not 1: there L_reg holds every r whatever the count says.
        r_from_sensitivity: start r between 0.6 and 0.95 by rank in the sensitivity pass, instead of at r_init.
        r_learning_rate: of r's own Adam; 2e-2 for about 100 steps, about 1e-3 for 3000.
        objective: L_task, a name from ObjectiveConfig.
    """

    method: str = "learned"
    num_linear_layers: int | None = None
    layers: list[int] | None = None
    max_train_steps: int = 80
    count: str = "continuous"
    rounding: str = "top_k"
    lambda_con: float = 0.2
    lambda_reg: float = 0.015
    alpha_start: float = 20.0
    alpha_end: float = 2.0
    r_init: float = 0.8
    r_from_sensitivity: bool = False
    r_learning_rate: float = 2e-2
    objective: str = "mse"

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"selection.method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.count not in COUNTS:
            raise ValueError(f"selection.count must be one of {', '.join(COUNTS)}, got {self.count!r}")
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"selection.rounding must be one of {', '.join(ROUNDINGS)}, got {self.rounding!r}")
        if self.rounding == "threshold" and self.method != "learned":
            raise ValueError(f"selection.rounding threshold needs selection.method learned, got {self.method}")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"selection.objective must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}")
        if (self.layers is not None) != (self.method == "layers"):
            raise ValueError(
                f"selection.layers goes with selection.method layers, got method {self.method} and layers {self.layers}"
            )
        if self.layers is not None and (not self.layers or len(set(self.layers)) != len(self.layers)):
            raise ValueError(f"selection.layers must be a list of distinct layers, got {self.layers}")
        if self.num_linear_layers is not None and self.num_linear_layers < 1:
            raise ValueError(f"selection.num_linear_layers must be at least 1, got {self.num_linear_layers}")
        if self.layers is not None and self.num_linear_layers not in (None, len(self.layers)):
            raise ValueError(
                f"selection.num_linear_layers must agree with selection.layers, got {self.num_linear_layers} and"
                f" {len(self.layers)} layers"
            )
        if self.max_train_steps < 0:
            raise ValueError(f"selection.max_train_steps must not be negative, got {self.max_train_steps}")
        if self.method == "learned" and not self.max_train_steps and not self.r_from_sensitivity:
            raise ValueError("selection.method learned needs selection.max_train_steps of at least 1, got 0")
        if self.lambda_con < 0 or self.lambda_reg < 0:
            raise ValueError(
                f"selection.lambda_con and lambda_reg must not be negative, got {self.lambda_con} and {self.lambda_reg}"
            )
        if self.alpha_start < 1 or self.alpha_end < 1:
            raise ValueError(
                f"selection.alpha_start and alpha_end must be at least 1, got {self.alpha_start} and {self.alpha_end}"
            )
        if not 0 < self.r_init < 1:
            raise ValueError(f"selection.r_init must lie inside (0, 1): at the ends r cannot move; got {self.r_init}")
        if self.r_learning_rate <= 0:
            raise ValueError(f"selection.r_learning_rate must be positive, got {self.r_learning_rate}")

    def target(self, num_layers: int) -> int:
        """How many of `num_layers` become linear.

        Raises:
            ValueError: more than there are, or layers out of range.
        """
        if self.layers is not None:
            if any(not 0 <= layer < num_layers for layer in self.layers):
                raise ValueError(f"selection.layers must lie in 0 to {num_layers - 1}, got {self.layers}")
            return len(self.layers)
        target = max(1, num_layers // 2) if self.num_linear_layers is None else self.num_linear_layers
        if target > num_layers:
            raise ValueError(
                f"selection.num_linear_layers must be at most the model's {num_layers} layers, got {target}"
            )
        return target


def count_penalty(r: torch.Tensor, target: int, count: str = "continuous") -> torch.Tensor:
    """L_con for r [L]: how far the number of linear layers is from `target`; scalar fp32."""
    if count == "continuous":
        return (r.mean() - (1 - target / len(r))).square()
    hard = (r >= 0.5).to(r.dtype)
    rounded = r + (hard - r).detach()  # straight-through: rounds forward, identity backward
    return ((1 - rounded).sum() - target).square()


def rounding_penalty(r: torch.Tensor, alpha: float) -> torch.Tensor:
    """L_reg for r [L]: sum_l (1 - |2 r_l - 1|^alpha), 0 when every r is 0 or 1."""
    return (1 - (2 * r - 1).abs().pow(alpha)).sum()


def anneal_alpha(config: SelectionConfig, step: int) -> float:
    """alpha at `step` of the stage, from alpha_start at the first to alpha_end at the last."""
    progress = step / max(1, config.max_train_steps - 1)
    return config.alpha_start + (config.alpha_end - config.alpha_start) * min(1.0, progress)


def add_penalties(
    parameters: list[torch.nn.Parameter], target: int, config: SelectionConfig, step: int
) -> dict[str, float]:
    """Add the gradients of lambda_con * L_con and lambda_reg * L_reg to r's; returns both, and r's three gradient
    norms.

    `parameters` are the r of all mixed layers, each [1], with the task's gradient in place.
    """
    alpha = anneal_alpha(config, step)
    r = torch.cat(parameters)
    penalties = {
        "con": config.lambda_con * count_penalty(r, target, config.count),
        "reg": config.lambda_reg * rounding_penalty(r, alpha),
    }
    report = {"alpha": alpha, "grad_r_task": _norm([p.grad for p in parameters if p.grad is not None])}
    for name, penalty in penalties.items():
        gradients = torch.autograd.grad(penalty, parameters, retain_graph=True)
        report |= {f"loss_{name}": float(penalty.detach()), f"grad_r_{name}": _norm(gradients)}
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    return report


def _norm(gradients: Sequence[torch.Tensor]) -> float:
    return float(torch.cat(list(gradients)).norm()) if gradients else 0.0


def lowest(values: dict[int, float], count: int) -> list[int]:
    """The `count` layers with the smallest value, sorted; ties go to the earlier layer.

    Raises:
        ValueError: a value is NaN, which has no place in an order.
    """
    if unknown := [layer for layer, value in values.items() if math.isnan(value)]:
        raise ValueError(f"cannot choose layers: the values of layers {unknown} are NaN")
    return sorted(sorted(values, key=lambda layer: (values[layer], layer))[:count])


def round_r(r: dict[int, float], target: int, rounding: str = "top_k") -> list[int]:
    """The layers that learned `r` makes linear, sorted; see SelectionConfig.rounding.

    Raises:
        ValueError: "threshold", and no r lies below 0.5.
    """
    if rounding == "top_k":
        return lowest(r, target)
    layers = sorted(layer for layer, value in r.items() if value < 0.5)
    if not layers:
        raise ValueError(
            f"selection.rounding threshold expected an r below 0.5, got {min(r.values()):.2f} as the smallest; train"
            " longer or continue with selection.rounding top_k"
        )
    return layers


def initial_r(sensitivity: dict[int, float]) -> dict[int, float]:
    """Start of r by rank: 0.6 for the least sensitive layer to 0.95 for the most."""
    order = sorted(sensitivity, key=lambda layer: (sensitivity[layer], layer))
    return {layer: 0.6 + 0.35 * rank / max(1, len(order) - 1) for rank, layer in enumerate(order)}
