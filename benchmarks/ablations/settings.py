"""The settings to compare, each of which changes one thing in the default recipe.

A setting shares all stages before the change with the default run of the same seed, and fine-tunes for the same time:
an objective whose step takes twice as long gets half as many steps (COST).
"""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from linvideo.trajectories.seeding import generator

# Time of one step relative to one of MSE on stored teacher states, measured on the small world (CPU, one thread, batch
# size 8, guided rollouts). The rows have the time that each run took.
COST = {
    "mse": 1.0,
    "own_mse": 1.75,
    "adm": 2.0,
    "adm_step": 2.0,
    "adm_renoise": 2.0,
    "adm_score_net": 3.0,
    "dmd": 3.0,
}
FORWARD = 0.3  # time of one forward, in the same unit

TUNING_SEED = 1000  # seed on which learning rates are tuned; it gives no figure of its own
SLOW = {"optimizer.learning_rate": 0.25}


@dataclass(frozen=True)
class Setting:
    """One recipe, described by its difference from the default.

    Args:
        name: Name of the setting in tables and files.
        groups: Tables in which the setting appears.
        changes: Dotted names of TrainConfig's fields -> values. The value of objective.mse_steps is a share of the
            budget, and that of optimizer.learning_rate a factor applied to the suite's.
        after: Last stage shared with the default run: "selection", "sensitivity" or "trajectories".
        layers: Rule of `fixed_layers` for layers that are fixed in place of learned. There are two more: "default"
            means the layers of the default run, and "most sensitive" the one with the largest error alone.
        windows: Rule for the layers that become window layers: one of those for `layers`, or "rest". `layers` then says
            which ones become linear; None means none.
        share: Share of the layers that become linear or, with `windows`, of either kind if its rule needs a number.
        objective: Objective that exists only in the ablations, see objectives.py.
        sampler_steps: Number of steps of the student's own rollouts. None means the teacher's number.
        variant: Change of the model, see variants.py.
        tuned: Name of the setting on which the learning rate was tuned, which may be this one (see tuning.py). None
            means the suite's rate.
        length: Length of fine-tuning relative to the suite's budget.
    """

    name: str
    groups: tuple[str, ...]
    changes: dict[str, Any] = field(default_factory=dict)
    after: str = "selection"
    layers: str | None = None
    windows: str | None = None
    share: float = 0.5
    objective: str | None = None
    sampler_steps: int | None = None
    variant: str | None = None
    tuned: str | None = None
    length: float = 1.0


def _objective(label: str, name: str, changes: dict[str, Any] | None = None, **more: Any) -> Setting:
    return Setting(label, ("objective",), {"objective.name": name} | (changes or {}), **more)


def _own(label: str, name: str, **more: Any) -> Setting:
    """Return a setting with an objective on the student's own states alone.

    At the default's learning rate these end worse than they began, so they get a quarter of it. In trials of both, each
    had less velocity error with the quarter.
    """
    return _objective(label, name, SLOW, **more)


def _second(label: str, changes: dict[str, Any], **more: Any) -> Setting:
    """Return a setting with every second layer linear, which is harder: fine-tuning can't fully repair it."""
    return Setting(
        f"every second, {label}", ("objective, every second layer",), changes, "sensitivity", "spread", **more
    )


def _tuned(label: str, objective: str) -> list[Setting]:
    """Return settings with an objective at its best learning rate, on layers chosen well and badly.

    They share the stages up to the sensitivity pass, so that all training of the weights is by the objective.
    """
    well, badly = (f"{label}, {layers} layers" for layers in ("well-chosen", "badly chosen"))
    changes = {"objective.name": objective}
    first = changes | {"selection.method": "sensitivity"}
    return [
        Setting(well, ("tuned objective, well-chosen layers",), first, "sensitivity", tuned=well),
        Setting(badly, ("tuned objective, badly chosen layers",), changes, "sensitivity", "spread", tuned=badly),
    ]


def _longer(label: str, objective: str) -> list[Setting]:
    """Return the settings of `_tuned` on well-chosen layers and on the first half of all layers, four times as long."""
    well, badly = _tuned(label, objective)
    first = replace(badly, name=f"{label}, first half", layers="first", tuned=well.name)
    return [
        replace(setting, name=f"{setting.name}, four times as long", groups=(LONGER,), length=4.0)
        for setting in (well, first)
    ]


def _trajectories(label: str, **changes: Any) -> list[Setting]:
    """Return settings with other teacher trajectories, for MSE and ADM on badly chosen layers."""
    changes = {f"trajectories.{name}": value for name, value in changes.items()}
    names = {"MSE": "mse", "ADM, small step": "adm"}
    return [
        Setting(
            f"{objective}, {label}",
            ("guidance",),
            {"objective.name": name} | changes,
            "trajectories",
            "spread",
            tuned=f"{objective}, badly chosen layers",
        )
        for objective, name in names.items()
    ]


def _hybrid(label: str, **changes: Any) -> Setting:
    changes = {"name": "hybrid"} | changes
    return Setting(f"hybrid, {label}", ("t law",), {f"objective.{k}": v for k, v in changes.items()})


def _selection(
    label: str, groups: tuple[str, ...] = ("selection",), share: float = Setting.share, **changes: Any
) -> Setting:
    return Setting(label, groups, {f"selection.{k}": v for k, v in changes.items()}, "sensitivity", share=share)


def _rate(label: str, **changes: Any) -> Setting:
    return Setting(label, (RATE,), {f"optimizer.{name}": value for name, value in changes.items()})


def _lowest(label: str, groups: tuple[str, ...], **more: Any) -> Setting:
    return Setting(label, groups, {"selection.method": "sensitivity"}, "sensitivity", **more)


def _branch(label: str, variant: str | None = None, **changes: Any) -> Setting:
    """Return a setting with another linear branch in the default run's layers, which is warmed up first."""
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    return Setting(label, ("linear branch",), changes, "trajectories", "default", variant=variant)


def _window(label: str, windows: str, chunk: int, overlap: int, layers: str | None = None, **more: Any) -> Setting:
    """Return a setting with window layers, which differ from linear ones from the warm-up on."""
    changes = {"window.chunk": chunk, "window.overlap": overlap}
    name = f"{label}, {chunk} + {overlap}"
    return Setting(name, ("window",), changes, "trajectories", layers, windows, **more)


# Length of fine-tuning that takes as long as learning r and then fine-tuning for 200 steps: 80 steps with both kinds of
# attention in every layer take as long as 92 of fine-tuning (the median of 70 runs on the small world).
LEARNING = 1.45
CHOICE, LONGER, RATE = "choice of layers", "four times as long", "learning rate"
# The rounding is top_k because after few steps it may be that no r is below 0.5.
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
        Setting(
            "every second", ("objective, every second layer", "layers", "window"), after="sensitivity", layers="spread"
        ),
        Setting(
            "every second, no fine-tuning",
            ("objective, every second layer", "tuned objective, badly chosen layers"),
            {"max_train_steps": 0},
            "sensitivity",
            "spread",
        ),
        _second("MSE, own states", {"objective.name": "own_mse"} | SLOW),
        _second("ADM, small step", {"objective.name": "adm"} | SLOW),
        _second("ADM, one sampler step", {"objective.name": "adm_step"} | SLOW),
        _second("hybrid", {"objective.name": "hybrid"}),
        _second("hybrid, ADM in the last fifth", {"objective.name": "hybrid", "objective.mse_steps": 0.8}),
        _second("hybrid, own-state MSE for ADM", {"objective.name": "hybrid"}, objective="own_mse_for_adm"),
        _lowest("lowest sensitivity", ("layers", CHOICE)),
        Setting("first half", ("layers", CHOICE), after="sensitivity", layers="first"),
        Setting("last half", ("layers", "window"), after="sensitivity", layers="last"),
        Setting("random", ("layers",), after="sensitivity", layers="random"),
        _selection("no L_reg", lambda_reg=0.0),
        _selection("rounded count, the paper's weights", **PAPER),
        _selection("the same with ADM, one sampler step", **PAPER, objective="adm_step"),
        _selection("alpha 2 throughout", alpha_start=2.0),
        _selection("alpha 20 throughout", alpha_end=20.0),
        _selection("r from 0.5", ("selection", CHOICE), r_init=0.5),
        _selection("r from 0.95", r_init=0.95),
        _selection("r from the sensitivity", ("selection", CHOICE), r_from_sensitivity=True),
        _selection("learning rate of r / 4", r_learning_rate=5e-3),
        _selection("learning rate of r x 3", ("selection", CHOICE), r_learning_rate=6e-2),
        _selection("lambda_con / 10", lambda_con=0.02),
        _selection("lambda_con x 10", lambda_con=2.0),
        _selection("lambda_reg x 10", lambda_reg=0.15),
        *(
            Setting(f"{share:.1%} linear", ("target", *also), {}, "sensitivity", share=share)
            for share, *also in ((0.125,), (0.25,), (0.375,), (0.625,), (0.75, CHOICE), (0.875,), (1.0, "window"))
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
        *(_window("all window", "all", *window) for window in ((1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (3, 1))),
        *(_window("first half linear, rest window", "rest", 1, overlap, "first") for overlap in (0, 1)),
        *(_window("last half window", "last", 1, overlap) for overlap in (0, 1)),
        *(_window("every second window", "spread", 1, overlap) for overlap in (0, 1)),
        Setting("most sensitive linear", ("window",), {}, "trajectories", "most sensitive"),
        *(_window("most sensitive window", "most sensitive", 1, overlap) for overlap in (0, 1)),
        Setting("LoRA of rank 16", ("weights",), {"optimizer.learning_rate": 5.0}, variant="lora"),
        *_tuned("MSE", "mse"),
        *_tuned("MSE, own states", "own_mse"),
        *_tuned("ADM, small step", "adm"),
        *_tuned("ADM, one sampler step", "adm_step"),
        *_tuned("hybrid", "hybrid"),
        Setting(
            "lowest sensitivity, no fine-tuning",
            ("layers", "tuned objective, well-chosen layers"),
            {"max_train_steps": 0, "selection.method": "sensitivity"},
            "sensitivity",
        ),
        *_longer("MSE", "mse"),
        *_longer("ADM, small step", "adm"),
        *_longer("ADM, one sampler step", "adm_step")[:1],
        _rate("learning rate / 4", learning_rate=0.25),
        _rate("learning rate / 2", learning_rate=0.5),
        _rate("learning rate x 2", learning_rate=2.0),
        _rate("50 steps of rising learning rate", lr_warmup_steps=50),
        _rate("50 steps of rising learning rate, x 2", lr_warmup_steps=50, learning_rate=2.0),
        *_trajectories("no negative prompts", negative_probability=0.0),
        *_trajectories("half negative prompts", negative_probability=0.5),
        *_trajectories("states without guidance", guidance_scale=1.0),
        _lowest("lowest sensitivity, longer", (CHOICE,), length=LEARNING),
        Setting("first half, longer", (CHOICE,), after="sensitivity", layers="first", length=LEARNING),
        _lowest("75.0% linear, lowest sensitivity", (CHOICE,), share=0.75),
        _lowest("75.0% linear, lowest sensitivity, longer", (CHOICE,), share=0.75, length=LEARNING),
        _selection("75.0% linear, r from the sensitivity", (CHOICE,), 0.75, r_from_sensitivity=True),
        Setting("75.0% linear, first layers", (CHOICE,), after="sensitivity", layers="first", share=0.75),
    )
}
GROUPS = tuple(dict.fromkeys(group for setting in SETTINGS.values() for group in setting.groups))


def in_groups(*groups: str) -> tuple[str, ...]:
    """Return the names of all settings in any of the groups."""
    return tuple(name for name, setting in SETTINGS.items() if set(groups) & set(setting.groups))


# These take about an hour on two CPU cores.
CORE = (
    *in_groups("default", "objective", "layers"),
    *("every second, no fine-tuning", "every second, MSE, own states", "every second, ADM, small step"),
    *("every second, hybrid", "every second, hybrid, ADM in the last fifth"),
    *("every second, hybrid, own-state MSE for ADM", "no L_reg", "rounded count, the paper's weights", "elu"),
    *("75.0% linear", "100.0% linear"),
)


ALL = tuple(name for name, setting in SETTINGS.items() if setting.tuned is None)
# Teachers that leave something to gain, each of which takes about 90 minutes on two CPU cores.
OBJECTIVES = in_groups("default", "tuned objective, well-chosen layers", "tuned objective, badly chosen layers")
HEADROOM = (*OBJECTIVES, *in_groups(CHOICE))


@dataclass(frozen=True)
class Suite:
    """The settings to run, the world and the scale.

    Args:
        world: Name of the world.
        settings: Names of the settings.
        budget: Length of fine-tuning, in MSE steps.
        selection_steps: Number of training steps of the selection.
        warmup_steps: Number of training steps of the warm-up.
        num_states: Number of states of the sensitivity pass.
        num_trajectories: Number of teacher trajectories to train on.
        batch_size: Training batch size.
        learning_rate: Learning rate of the default setting.
        mixed_precision: Autocast precision as in TrainConfig: "no" or "bf16".
        videos: Number of videos to judge per seed.
        noises: Number of videos with the same caption; above 1, the variety among them is measured.
        compared: Number of videos per seed on whose states the velocity error is measured. None means all.
        guidance_scale: Guidance scale of the sampler, for trajectories and videos. None means the world's.
        headroom: Whether the teacher must come from train_teacher.py; the results then keep its record, and appear in
            headroom.md in place of ablations.md.
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
    noises: int = 1
    compared: int | None = None
    guidance_scale: float | None = None
    headroom: bool = False

    @property
    def scale(self) -> dict[str, Any]:
        """Everything except the settings: a folder of work may be continued with other settings."""
        return {name: value for name, value in asdict(self).items() if name != "settings"}


_GPU = {"budget": 1000, "selection_steps": 300, "warmup_steps": 200, "num_trajectories": 512, "batch_size": 16}
_GPU |= {"learning_rate": 5e-4, "mixed_precision": "bf16"}
_HEADROOM = {"budget": 200, "noises": 3, "compared": 48, "headroom": True}
SUITES = {
    "small": Suite("small", CORE, 200),
    "small-all": Suite("small", ALL, 200),
    "headroom": Suite("small", HEADROOM, **_HEADROOM),
    "headroom-all": Suite("small", (*HEADROOM, *in_groups(LONGER, RATE, "guidance")), **_HEADROOM),
    "headroom-unguided": Suite("small", OBJECTIVES, **_HEADROOM, guidance_scale=1.0),
    "middle": Suite("middle", ALL, **_GPU),
    "large": Suite("large", CORE, **_GPU),
}


def steps(objective: str, budget: int, mse_steps: int, second: str = "adm", guided: bool = True) -> int:
    """Return the number of optimizer steps that take as long as `budget` MSE steps.

    "hybrid" begins with `mse_steps` MSE steps and then alternates between "mse" and `second`. Rollouts without guidance
    save one forward.
    """
    cost = {name: value if guided or name == "mse" else value - FORWARD for name, value in COST.items()}
    if objective != "hybrid":
        return round(budget / cost[objective])
    begin = min(mse_steps, budget)
    return begin + round(2 * (budget - begin) / (cost["mse"] + cost[second]))


def fixed_layers(rule: str, count: int, num_layers: int, seed: int) -> list[int]:
    """Choose `count` of `num_layers` layers by a rule; returns them sorted."""
    if rule == "all":
        return list(range(num_layers))
    if rule == "first":
        return list(range(count))
    if rule == "last":
        return list(range(num_layers - count, num_layers))
    if rule == "spread":
        return [int((i + 0.5) * num_layers / count) for i in range(count)]
    if rule == "random":
        return sorted(torch.randperm(num_layers, generator=generator(seed, "random layers"))[:count].tolist())
    raise ValueError(f"expected the rule to be all, first, last, spread or random, got {rule!r}")
