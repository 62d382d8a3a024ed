"""Which recipes fit a model.

The default learning rate suits the embedded model, and the default video suits Wan. So the defaults together suit no
model, and a run has to set one of them.
"""

import dataclasses
import os
from collections.abc import Collection
from pathlib import Path

from linvideo.packaged import packaged
from linvideo.planning.sizes import known_name
from linvideo.run.bounded_yaml import read_yaml
from linvideo.run.read_config import RECIPES
from linvideo.run.run_config import RunConfig

EMBEDDED = "linvideo/demo/teacher"


def fitting_recipes(model: str, kind: type[RunConfig]) -> list[str]:
    """Return the names of the recipes for this kind of run whose teacher is `model`.

    Two names stand for the same teacher if both are the same published Wan (see known_name) or the embedded model.
    """
    embedded, name, options = is_embedded(model), known_name(model), {field.name for field in dataclasses.fields(kind)}
    found = []
    for path in RECIPES.iterdir():
        values = read_yaml(path.read_text())
        teacher = values["pretrained_model_name_or_path"]
        same = is_embedded(teacher) if embedded else name is not None and name == known_name(teacher)
        if same and values.keys() <= options:
            found.append(path.name.removesuffix(".yaml"))
    return sorted(found)


def is_embedded(model: str) -> bool:
    """Return whether this is the folder of the embedded model."""
    return os.path.realpath(packaged(model)) == os.path.realpath(packaged(EMBEDDED))


def check_choice_of_defaults(config: RunConfig, given: Collection[str]) -> None:
    """Raise ValueError if a run begins with defaults that do not suit its teacher. The message says which recipes fit,
    or which options to set.

    given: Dotted names of the options that were set, in files or by the user, with "config" among them if there was a
        file.
    """
    model, begun = config.pretrained_model_name_or_path, Path(config.output_dir) / "config.yaml"
    if model is None or (config.resume_from_checkpoint is not None and begun.is_file()):
        return
    if is_embedded(model):
        video = config.trajectories
        option, default = "trajectories.height", f"the default video of {video.height}x{video.width} suits Wan"
    else:
        rate = config.optimizer.learning_rate
        option, default = "optimizer.learning_rate", f"the default of {rate:g} suits the embedded model"
    if option in given:
        return
    recipes = fitting_recipes(model, type(config))
    if "config" in given and not recipes:  # if the model is unknown to us, the user's config is trusted
        return
    if recipes:
        advice = f"recipes that fit: {', '.join(recipes)}"
    else:
        advice = (
            "no recipe is known to fit it: set --optimizer.learning_rate, --train_batch_size, --max_train_steps,"
            " --mixed_precision and --gradient_checkpointing (linvideo plan MODEL shows what fits a GPU)"
        )
    raise ValueError(f"expected --config with {option}, or --{option}, for {model}, got neither: {default}; {advice}")
