"""The configuration of selective transfer, and how a configuration is read.

Every value can come from a YAML file and be overridden on the command line by its dotted name:

    linvideo train --config run.yaml --selection.num_linear_layers 16 --optimizer.learning_rate 1e-5

Defaults are what worked in short runs (about 100 steps a stage) of the embedded model. The paper's own form, for runs
of thousands of steps, is selection.count=rounded, selection.rounding=threshold,
selection.lambda_con=selection.lambda_reg=0.01, selection.objective=adm_step, selection.r_learning_rate about 1e-3,
objective.name=adm_step.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from linvideo.nn import FEATURE_MAPS
from linvideo.training.adapters import AdapterConfig
from linvideo.training.bounded_yaml import MOST_CHARACTERS, read_yaml
from linvideo.training.experts import EXPERTS
from linvideo.training.objectives import ObjectiveConfig
from linvideo.training.run_config import RunConfig
from linvideo.training.selection import SelectionConfig
from linvideo.training.sensitivity import SensitivityConfig
from linvideo.training.warmup import WarmupConfig

LONGEST = 400  # characters of a message
RECIPES = resources.files("linvideo") / "recipes"
Config = TypeVar("Config", bound=RunConfig)


@dataclass
class TrainConfig(RunConfig):
    """Selective transfer of one Wan pipeline, from trajectories to the exported pipeline folder.

    Of the options that every run has: output_dir also gets selection.json; max_train_steps and use_ema are of
    fine-tuning, compile is for selection and fine-tuning; train_batch_size counts teacher states, or lanes of student
    states; offload_teacher is of use with objectives that ask the teacher in every step, all but "mse", and with lora
    the teacher costs nothing anyway.

    Args:
        expert: which transformer of a pipeline with two (Wan 2.2) is trained, "high_noise" or "low_noise"; the other is
            exported as it is. To convert both, give the pipeline of one run to a second.
        feature_map: of the linear branch.
    """

    expert: str | None = None
    feature_map: str = "hedgehog"
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    sensitivity: SensitivityConfig = field(default_factory=SensitivityConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    lora: AdapterConfig = field(default_factory=AdapterConfig)

    def __post_init__(self):
        super().__post_init__()
        self.check_choice("expert", (None, *EXPERTS))
        self.check_choice("feature_map", FEATURE_MAPS)
        if self.offload_teacher and self.lora.rank is not None:
            raise ValueError("offload_teacher and lora.rank exclude each other: the teacher is the student's own base")
        ranks_layers = self.selection.method == "sensitivity" or self.selection.r_from_sensitivity
        if ranks_layers and not self.sensitivity.num_states:
            raise ValueError("selection by sensitivity needs sensitivity.num_states of at least 1, got 0")


def make_parser(kind: type[RunConfig] = TrainConfig, command: str = "train"):
    """The jsonargparse parser of a `linvideo` command: one option per field, with the docstrings as help."""
    import yaml
    from jsonargparse import ArgumentParser, set_loader

    set_loader("bounded_yaml", read_yaml, exceptions=(yaml.YAMLError,))
    parser = ArgumentParser(prog=f"linvideo {command}", exit_on_error=False, parser_mode="bounded_yaml")
    parser.add_argument("--config", action="config", help="YAML file with any of the options below, or a recipe's name")
    # Each section's options are added on their own. An option whose type is the section's class would take a
    # class_path too, and jsonargparse would import whatever module a config names there.
    sections = _sections(kind)
    parser.add_class_arguments(kind, as_group=False, skip=set(sections))
    for name, default in sections.items():
        group = parser.add_argument_group(name)
        group.add_class_arguments(type(default()), name, as_group=False, default=default())
    return parser


def _sections(kind: type[RunConfig]) -> dict[str, Callable[[], Any]]:
    """Name -> what makes the section's default."""
    return {f.name: f.default_factory for f in dataclasses.fields(kind) if dataclasses.is_dataclass(f.type)}


def load_config(argv: list[str], kind: type[Config] = TrainConfig, command: str = "train") -> Config:
    """A config from `--config file.yaml` and dotted `--name value` arguments; later ones win.

    In place of a file --config takes the name of a recipe in linvideo/recipes.

    Raises:
        ValueError: anything that is no valid configuration, in one line. `--help` prints the options and exits.
    """
    from jsonargparse import ArgumentError

    names = {path.name.removesuffix(".yaml"): str(path) for path in RECIPES.iterdir()}
    argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    for place, word in enumerate(argv):
        if place and argv[place - 1] == "--config" and not Path(word).exists():
            if word not in names and ":" not in word:  # with one it may be the YAML itself
                known = ", ".join(sorted(names))
                raise ValueError(f"--config must be a YAML file or the name of a recipe, got {word}; recipes: {known}")
            argv = [*argv[:place], names.get(word, word), *argv[place + 1 :]]
        elif place and argv[place - 1] == "--config" and Path(word).stat().st_size > MOST_CHARACTERS:
            raise ValueError(f"expected a config of at most {MOST_CHARACTERS} characters, got the file {word}")
    try:
        values = make_parser(kind, command).parse_args(argv)
        values = values.as_dict()
        values.pop("config", None)
        return from_dict(values, kind)
    except (ArgumentError, TypeError, OSError) as error:
        raise ValueError(_one_line(error)) from None


def from_dict(values: dict[str, Any], kind: type[Config] = TrainConfig) -> Config:
    """A config from nested plain values, the inverse of `to_dict`."""
    sections = _sections(kind)
    for name in sections.keys() & values.keys():
        if not isinstance(values[name], dict):
            raise ValueError(f"{name} must be a section of options, got {values[name]!r:.200}")
    try:
        parts = {n: dataclasses.replace(default(), **values[n]) for n, default in sections.items() if n in values}
        return kind(**{**values, **parts})
    except TypeError as error:
        raise ValueError(_one_line(error)) from None


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines) or type(error).__name__
    return text if len(text) <= LONGEST else text[:LONGEST] + " ..."
