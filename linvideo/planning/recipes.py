"""Which recipes fit a model. The default learning rate is for the embedded model and the default video for Wan: nobody
trains with both unasked."""

import dataclasses
import os
from collections.abc import Sequence

from linvideo.packaged import packaged
from linvideo.planning.sizes import known_name
from linvideo.run.bounded_yaml import read_yaml
from linvideo.run.read_config import RECIPES
from linvideo.run.run_config import RunConfig

EMBEDDED = "linvideo/demo/teacher"


def fitting_recipes(model: str, kind: type[RunConfig]) -> list[str]:
    """Names of the recipes of this kind of run whose teacher is `model`: the same published Wan, see known_name, or the
    embedded model."""
    options, found = {field.name for field in dataclasses.fields(kind)}, []
    for path in RECIPES.iterdir():
        values = read_yaml(path.read_text())
        teacher = values.get("pretrained_model_name_or_path")
        same = is_embedded(teacher) if is_embedded(model) else known_name(model) in {known_name(teacher)} - {None}
        if values.keys() <= options and same:
            found.append(path.name.removesuffix(".yaml"))
    return sorted(found)


def is_embedded(model: str) -> bool:
    """Whether this is the folder of the embedded model."""
    return os.path.realpath(packaged(model)) == os.path.realpath(packaged(EMBEDDED))


def check_choice_of_defaults(options: Sequence[str], config: RunConfig) -> None:
    """Raise ValueError where the words of a command line leave what does not suit the teacher to a default: it says
    which recipes fit, or what to set."""
    model = config.pretrained_model_name_or_path
    if model is None:
        return
    if is_embedded(model):
        video = config.trajectories
        choice, default = "--trajectories.height", f"a video of {video.height}x{video.width} is for Wan"
    else:
        rate = config.optimizer.learning_rate
        choice, default = "--optimizer.learning_rate", f"a learning rate of {rate:g} is for the embedded model"
    given = [word.partition("=")[0] for word in options if word.startswith("--")]
    # jsonargparse takes unique beginnings
    if any(option.startswith(name) for option in ("--config", choice) for name in given):
        return
    recipes = fitting_recipes(model, type(config))
    if recipes:
        advice = f"recipes that fit: {', '.join(recipes)}"
    else:
        advice = (
            "no recipe is known to fit it: set --optimizer.learning_rate, --train_batch_size, --max_train_steps,"
            " --mixed_precision and --gradient_checkpointing; linvideo plan MODEL says what fits a GPU"
        )
    raise ValueError(f"expected --config or {choice} for {model}, got neither, and the default of {default}; {advice}")
