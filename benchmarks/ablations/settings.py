"""What is compared: each setting changes one thing of the default recipe.

A setting shares with its seed's default run all stages before the one it changes, and fine-tunes for the same time: an
objective whose step costs twice as much takes half as many steps (COST).
"""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from linvideo.trajectories.seeding import generator

# Time of one step, in steps of MSE on stored teacher states: measured on the small world (CPU, one thread, batch 8,
# guided rollouts). The rows have the time that was measured in each run.
COST = {
    "mse": 1.0,
    "own_mse": 1.75,
    "adm": 2.0,
    "adm_step": 2.0,
    "adm_renoise": 2.0,
    "adm_score_net": 3.0,
    "dmd": 3.0,
}


SLOW = {"optimizer.learning_rate": 0.25}


@dataclass(frozen=True)
class Setting:
    """One recipe, as its difference from the default.

    Args:
        groups: the tables it stands in.
        changes: dotted names of TrainConfig's fields -> values. Of objective.mse_steps it is the share of the
            budget, of optimizer.learning_rate the factor to the suite's.
        after: the last stage shared with the default run: "selection", "sensitivity" or "trajectories".
        layers: fixed layers by a rule of `fixed_layers`, in place of learned ones; "default" takes the default run's.
        share: of the layers that become linear.
        objective: one that only the ablations have, see objectives.py.
        sampler_steps: of the student's own trajectories; None is as many as the teacher's.
        variant: a change of the model, see variants.py.
    """

    name: str
    groups: tuple[str, ...]
    changes: dict[str, Any] = field(default_factory=dict)
    after: str = "selection"
    layers: str | None = None
    share: float = 0.5
    objective: str | None = None
    sampler_steps: int | None = None
    variant: str | None = None


def _objective(label: str, name: str, changes: dict[str, Any] | None = None, **more: Any) -> Setting:
    return Setting(label, ("objective",), {"objective.name": name} | (changes or {}), **more)


def _own(label: str, name: str, **more: Any) -> Setting:
    """An objective on the student's own states alone: at the default's learning rate these end worse than they began.
    They get a quarter of it, which left each with less velocity error when we tried both."""
    return _objective(label, name, SLOW, **more)


def _second(label: str, changes: dict[str, Any], **more: Any) -> Setting:
    """The objectives where it is harder: every second layer, which fine-tuning cannot quite mend."""
    return Setting(
        f"every second, {label}", ("objective, every second layer",), changes, "sensitivity", "spread", **more
    )


def _hybrid(label: str, **changes: Any) -> Setting:
    changes = {"name": "hybrid"} | changes
    return Setting(f"hybrid, {label}", ("t law",), {f"objective.{k}": v for k, v in changes.items()})


def _selection(label: str, **changes: Any) -> Setting:
    return Setting(label, ("selection",), {f"selection.{k}": v for k, v in changes.items()}, "sensitivity")


def _branch(label: str, variant: str | None = None, **changes: Any) -> Setting:
    """Another linear branch, warmed up anew, in the default run's layers."""
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    return Setting(label, ("linear branch",), changes, "trajectories", "default", variant=variant)


# top_k: after few steps no r need lie below 0.5.
PAPER = {"count": "rounded", "lambda_con": 0.01, "lambda_reg": 0.01, "rounding": "top_k"}
DEFAULT = Setting("default", ("default",), after="trajectories")
SETTINGS = {
    setting.name: setting
    for setting in (
        DEFAULT,
        Setting("no fine-tuning", ("objective",), {"max_train_steps": 0}),
        _own("MSE, own states", "own_mse"),
        _own("ADM, small step", "adm"),
        _own("ADM, one sampler step", "adm_step"),
        _own("ADM, one step of 25", "adm_step", sampler_steps=25),
        _own("ADM, one step of 50", "adm_step", sampler_steps=50),
        _own("ADM, re-noised", "own_mse", objective="adm_renoise"),
        _own("ADM, score network", "own_mse", objective="adm_score_net"),
        _own("DMD", "own_mse", objective="dmd"),
        _objective("hybrid", "hybrid"),
        _objective("hybrid, ADM in the last fifth", "hybrid", {"objective.mse_steps": 0.8}),
        _objective("hybrid, own-state MSE for ADM", "hybrid", objective="own_mse_for_adm"),
        _objective("ADM, small step, full learning rate", "adm"),
        Setting("every second", ("objective, every second layer", "layers"), after="sensitivity", layers="spread"),
        _second("no fine-tuning", {"max_train_steps": 0}),
        _second("MSE, own states", {"objective.name": "own_mse"} | SLOW),
        _second("ADM, small step", {"objective.name": "adm"} | SLOW),
        _second("ADM, one sampler step", {"objective.name": "adm_step"} | SLOW),
        _second("hybrid", {"objective.name": "hybrid"}),
        _second("hybrid, ADM in the last fifth", {"objective.name": "hybrid", "objective.mse_steps": 0.8}),
        _second("hybrid, own-state MSE for ADM", {"objective.name": "hybrid"}, objective="own_mse_for_adm"),
        Setting("lowest sensitivity", ("layers",), {"selection.method": "sensitivity"}, "sensitivity"),
        Setting("first half", ("layers",), after="sensitivity", layers="first"),
        Setting("last half", ("layers",), after="sensitivity", layers="last"),
        Setting("random", ("layers",), after="sensitivity", layers="random"),
        _selection("no L_reg", lambda_reg=0.0),
        _selection("rounded count, the paper's weights", **PAPER),
        _selection("the same with ADM, one sampler step", **PAPER, objective="adm_step"),
        _selection("alpha 2 throughout", alpha_start=2.0),
        _selection("alpha 20 throughout", alpha_end=20.0),
        _selection("r from 0.5", r_init=0.5),
        _selection("r from 0.95", r_init=0.95),
        _selection("r from the sensitivity", r_from_sensitivity=True),
        _selection("learning rate of r / 4", r_learning_rate=5e-3),
        _selection("learning rate of r x 3", r_learning_rate=6e-2),
        _selection("lambda_con / 10", lambda_con=0.02),
        _selection("lambda_con x 10", lambda_con=2.0),
        _selection("lambda_reg x 10", lambda_reg=0.15),
        *(
            Setting(f"{share:.1%} linear", ("target",), {}, "sensitivity", share=share)
            for share in (0.125, 0.25, 0.375, 0.625, 0.75, 0.875, 1.0)
        ),
        _branch("hedgehog_joint", feature_map="hedgehog_joint"),
        _branch("elu", feature_map="elu"),
        _branch("relu", feature_map="relu"),
        _branch("softmax", feature_map="softmax"),
        _branch("hedgehog, no warm-up", warmup__max_train_steps=0),
        _branch("hedgehog, no warm-up, RoPE after the map", "rope_after", warmup__max_train_steps=0),
        Setting("t uniform in the MSE", ("t law",), objective="uniform_t"),
        _hybrid("weight (1 - t) / t up to 5", weight="score"),
        _hybrid("weight (1 - t) / t up to 1", weight="score", weight_clip=1.0),
        _hybrid("ADM step up to 0.01", max_dt=0.01),
        _hybrid("ADM step up to 0.1", max_dt=0.1),
        Setting("LoRA of rank 16", ("weights",), {"optimizer.learning_rate": 5.0}, variant="lora"),
    )
}
GROUPS = tuple(dict.fromkeys(group for setting in SETTINGS.values() for group in setting.groups))

# about an hour on two CPU cores
CORE = (
    *(name for name, setting in SETTINGS.items() if {"default", "objective", "layers"} & set(setting.groups)),
    *("every second, no fine-tuning", "every second, MSE, own states", "every second, ADM, small step"),
    *("every second, hybrid", "every second, hybrid, ADM in the last fifth"),
    *("every second, hybrid, own-state MSE for ADM", "no L_reg", "rounded count, the paper's weights", "elu"),
    *("75.0% linear", "100.0% linear"),
)


@dataclass(frozen=True)
class Suite:
    """Which settings, on which world, at what scale.

    Args:
        budget: of fine-tuning, in MSE steps.
        selection_steps, warmup_steps, num_states, num_trajectories, batch_size, learning_rate, mixed_precision: as in
            TrainConfig; num_states is of the sensitivity pass.
        videos: judged per seed.
    """

    world: str
    settings: tuple[str, ...]
    budget: int
    selection_steps: int = 80
    warmup_steps: int = 80
    num_states: int = 96
    num_trajectories: int = 192
    batch_size: int = 8
    learning_rate: float = 1e-3
    mixed_precision: str = "no"
    videos: int = 168

    @property
    def scale(self) -> dict[str, Any]:
        """All but the settings, which a folder of work may be continued with others of."""
        return {name: value for name, value in asdict(self).items() if name != "settings"}


_GPU = {"budget": 1000, "selection_steps": 300, "warmup_steps": 200, "num_trajectories": 512, "batch_size": 16}
_GPU |= {"learning_rate": 5e-4, "mixed_precision": "bf16"}
SUITES = {
    "small": Suite("small", CORE, 200),
    "small-all": Suite("small", tuple(SETTINGS), 200),
    "middle": Suite("middle", tuple(SETTINGS), **_GPU),
    "large": Suite("large", CORE, **_GPU),
}


def steps(objective: str, budget: int, mse_steps: int, second: str = "adm") -> int:
    """Optimizer steps that take as long as `budget` MSE steps; "hybrid" begins with `mse_steps` of them and then takes
    "mse" and `second` in turn."""
    if objective != "hybrid":
        return round(budget / COST[objective])
    begin = min(mse_steps, budget)
    return begin + round(2 * (budget - begin) / (COST["mse"] + COST[second]))


def fixed_layers(rule: str, count: int, num_layers: int, seed: int) -> list[int]:
    """`count` of `num_layers` layers, sorted."""
    if rule == "first":
        return list(range(count))
    if rule == "last":
        return list(range(num_layers - count, num_layers))
    if rule == "spread":
        return [int((i + 0.5) * num_layers / count) for i in range(count)]
    if rule == "random":
        return sorted(torch.randperm(num_layers, generator=generator(seed, "random layers"))[:count].tolist())
    raise ValueError(f"expected a rule of first, last, spread, random, got {rule!r}")
