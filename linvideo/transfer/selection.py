"""Selective transfer: the choice of the layers that become linear (LinVideo, arXiv 2510.08318).

Every candidate layer computes r * softmax + (1 - r) * linear with its own scalar r, and all weights train on

    L = L_task + lambda_con * L_con + lambda_reg * L_reg.

L_con asks for the target number of linear layers. L_reg = sum_l (1 - |2 r_l - 1|^alpha) pushes every r to 0 or 1, with
alpha annealed from 20 to 2. At the end, the target number of layers with the smallest r become linear. Optionally, as
in the paper, it is all layers with r < 0.5 instead.
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
    """Layer selection. The defaults work in about 100 steps, the paper's form needs thousands.

    Args:
        method: Method of selection:
            "learned" (paper): every layer computes r * softmax + (1 - r) * linear, and its r is trained.
            "sensitivity": the layers with the lowest errors in the sensitivity pass, without training.
            "layers": those given as selection.layers.
        num_linear_layers: Target number of linear layers. None means half of the model's layers, or the number of
            selection.layers.
        layers: The layers to make linear (0-based), for method "layers".
        window_layers: The layers to make window layers (0-based), for method "layers": softmax attention to near
            frames and linear attention to the others, as set in `window`. All other layers stay softmax.
        max_train_steps: Number of steps in which r is learned, for method "learned".
        count: Form of L_con, which draws the number of linear layers towards the target:
            "continuous" (ours): (mean r - (1 - target/L))^2, which doesn't grow with the depth L.
            "rounded" (paper): ((number of r that round to 0) - target)^2 with a straight-through estimator. It pushes
            all layers equally, and with few steps all r end near 0.5.
        rounding: Rule that turns the learned r into a choice of layers:
            "top_k" (ours): the target number of layers with the smallest r.
            "threshold" (paper): every layer with r < 0.5, regardless of the target. It is an error if there is none.
            Only for method "learned".
        lambda_con: Weight of L_con. The paper uses 0.01, with count "rounded".
        lambda_reg: Weight of L_reg, which pushes every r to 0 or 1. The paper uses 0.01, with count "rounded".
        alpha_start: Exponent alpha of L_reg at the first step. It changes linearly over the stage. A large
            alpha makes L_reg flat except near 0 and 1, so r first moves freely.
        alpha_end: Exponent alpha of L_reg at the last step.
        r_init: Initial value of r. It must be below 1, where L_reg would hold every r in place.
        r_from_sensitivity: Whether to start r between 0.6 and 0.95 by rank in the sensitivity pass, instead of at
            r_init. With three quarters of the layers linear, this found better layers on three of four teachers and
            worse ones on the fourth; with half of them, the same ones (docs/results.md).
        r_learning_rate: Learning rate of r, which has its own Adam. 2e-2 suits about 100 steps, about 1e-3 suits 3000.
        objective: Objective while r is learned (L_task), one of the names of objective.name.
    """

    method: str = "learned"
    num_linear_layers: int | None = None
    layers: list[int] | None = None
    window_layers: list[int] | None = None
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
        chosen = [*(self.layers or ()), *(self.window_layers or ())]
        if (self.layers is not None or self.window_layers is not None) != (self.method == "layers"):
            raise ValueError(
                "selection.method layers needs selection.layers or selection.window_layers, and these need it; got"
                f" method {self.method}, layers {self.layers} and window_layers {self.window_layers}"
            )
        if self.method == "layers" and (not chosen or len(set(chosen)) != len(chosen)):
            raise ValueError(
                "selection.layers and selection.window_layers must be lists of distinct layers, at least one in total,"
                f" got {self.layers} and {self.window_layers}"
            )
        if self.method == "layers" and self.layers is None:
            self.layers = []
        if self.layers is not None and self.num_linear_layers not in (None, len(self.layers)):
            raise ValueError(
                f"selection.num_linear_layers must be null or the number of selection.layers, {len(self.layers)}, got"
                f" {self.num_linear_layers}"
            )
        if self.layers is None and self.num_linear_layers is not None and self.num_linear_layers < 1:
            raise ValueError(f"selection.num_linear_layers must be at least 1, got {self.num_linear_layers}")
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
            raise ValueError(f"selection.r_init must lie inside (0, 1): r cannot leave 0 or 1, got {self.r_init}")
        if self.r_learning_rate <= 0:
            raise ValueError(f"selection.r_learning_rate must be positive, got {self.r_learning_rate}")

    def target(self, num_layers: int) -> int:
        """Return the target number of linear layers of a model with `num_layers` layers.

        Raises:
            ValueError: The target is larger than the model, or selection.layers are out of range.
        """
        if self.layers is not None:
            for name, layers in (("layers", self.layers), ("window_layers", self.window_layers or [])):
                if any(not 0 <= layer < num_layers for layer in layers):
                    raise ValueError(f"selection.{name} must lie in 0 to {num_layers - 1}, got {layers}")
            return len(self.layers)
        target = max(1, num_layers // 2) if self.num_linear_layers is None else self.num_linear_layers
        if target > num_layers:
            raise ValueError(
                f"selection.num_linear_layers must be at most the model's {num_layers} layers, got {target}"
            )
        return target


def count_penalty(r: torch.Tensor, target: int, count: str = "continuous") -> torch.Tensor:
    """Return L_con for r [L], a measure of how far the number of linear layers is from `target`, as an fp32 scalar."""
    if count == "continuous":
        return (r.mean() - (1 - target / len(r))).square()
    hard = (r >= 0.5).to(r.dtype)
    rounded = r + (hard - r).detach()  # straight-through: rounds forward, identity backward
    return ((1 - rounded).sum() - target).square()


def rounding_penalty(r: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return L_reg for r [L]: sum_l (1 - |2 r_l - 1|^alpha), which is 0 when every r is 0 or 1."""
    return (1 - (2 * r - 1).abs().pow(alpha)).sum()


def anneal_alpha(config: SelectionConfig, step: int) -> float:
    """Return alpha at `step` of the stage, linear from alpha_start at the first step to alpha_end at the last."""
    progress = step / max(1, config.max_train_steps - 1)
    return config.alpha_start + (config.alpha_end - config.alpha_start) * min(1.0, progress)


def add_penalties(
    parameters: list[torch.nn.Parameter], target: int, config: SelectionConfig, step: int
) -> dict[str, float]:
    """Add the gradients of lambda_con * L_con and lambda_reg * L_reg to those of r.

    Args:
        parameters: The r of all mixed layers, each [1], which have the gradient of the task already.
        target: Target number of linear layers.
        config: Options of the selection.
        step: Step of the stage.

    Returns alpha, the two weighted penalties, and the norms of the three gradients with respect to r.
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
    """Return the `count` layers with the smallest values, sorted. Ties go to the earlier layer.

    Raises:
        ValueError: A value is NaN, which cannot be ranked.
    """
    if unknown := [layer for layer, value in values.items() if math.isnan(value)]:
        raise ValueError(f"cannot choose layers: the values of layers {unknown} are NaN")
    return sorted(sorted(values, key=lambda layer: (values[layer], layer))[:count])


def round_r(r: dict[int, float], target: int, rounding: str = "top_k") -> list[int]:
    """Return the layers that become linear according to the learned `r`, sorted; see SelectionConfig.rounding.

    Raises:
        ValueError: The rounding is "threshold" and no r is below 0.5.
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
    """Return initial values of r by rank, from 0.6 for the least sensitive layer to 0.95 for the most sensitive."""
    order = sorted(sensitivity, key=lambda layer: (sensitivity[layer], layer))
    return {layer: 0.6 + 0.35 * rank / max(1, len(order) - 1) for rank, layer in enumerate(order)}
