"""Which recipes fit a model; defaults are for the embedded one, and nothing larger trains by them unasked."""

import dataclasses
import os
from collections.abc import Sequence

from linvideo.packaged import packaged
from linvideo.planning.sizes import known_name
from linvideo.run.bounded_yaml import read_yaml
from linvideo.run.read_config import RECIPES
from linvideo.run.run_config import RunConfig

EMBEDDED = "linvideo/demo/teacher"
CHOICES = ("--config", "--optimizer.learning_rate")


def fitting_recipes(model: str, kind: type[RunConfig]) -> list[str]:
    """Names of the recipes of this kind of run whose teacher is the same published Wan as `model`, see known_name."""
    name, options = known_name(model), {field.name for field in dataclasses.fields(kind)}
    found = []
    for path in RECIPES.iterdir():
        values = read_yaml(path.read_text())
        teacher = values.get("pretrained_model_name_or_path")
        if name is not None and values.keys() <= options and name == known_name(teacher):
            found.append(path.name.removesuffix(".yaml"))
    return sorted(found)


def check_choice_of_defaults(options: Sequence[str], config: RunConfig) -> None:
    """Raise ValueError where the words of a command line leave the learning rate to a default that was found with the
    embedded model, but the teacher is another: it says which recipes fit, or what to set."""
    model = config.pretrained_model_name_or_path
    if model is None or os.path.realpath(packaged(model)) == os.path.realpath(packaged(EMBEDDED)):
        return
    given = [word.partition("=")[0] for word in options if word.startswith("--")]
    if any(choice.startswith(name) for choice in CHOICES for name in given):  # jsonargparse takes unique beginnings
        return
    recipes = fitting_recipes(model, type(config))
    if recipes:
        advice = f"recipes that fit: {', '.join(recipes)}"
    else:
        advice = (
            "no recipe is known to fit it: set --optimizer.learning_rate, --train_batch_size, --max_train_steps,"
            " --mixed_precision and --gradient_checkpointing; linvideo plan MODEL says what fits a GPU"
        )
    raise ValueError(
        f"expected {' or '.join(CHOICES)} for {model}, got neither, and the default of"
        f" {config.optimizer.learning_rate:g} is for the embedded model of 1 M parameters; {advice}"
    )
