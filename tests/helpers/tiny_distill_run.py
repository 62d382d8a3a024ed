"""A complete distillation in a second or two, in this process or as a script, like tiny_run.py for transfers.

The stage to die at may also be "export", which has only one step.
"""

import copy
import json
import sys
from types import SimpleNamespace

import torch
from tiny_run import COMMON, PROMPTS, die, die_at, tiny_teacher, watched

from linvideo.distillation import DistillConfig, distill, distiller
from linvideo.models import convert
from linvideo.run import export
from linvideo.run.read_config import from_dict

LINEAR = [1]  # linear layers of the student


def distill_config(output_dir, **overrides) -> DistillConfig:
    """Return a config in which both stages train a little and every part with state is in use.

    `overrides` replace top-level values and sections.
    """
    values = {
        **copy.deepcopy(COMMON),
        "output_dir": str(output_dir),
        "max_train_steps": 7,
        "num_steps": 2,
        "regression": {"max_train_steps": 4},
        "dmd": {"student_every": 3, "adversarial_weight": 0.1},
        "optimizer": {"lr_scheduler": "cosine", "lr_warmup_steps": 0, "adam_beta1": 0.0},
        "critic_optimizer": {"lr_scheduler": "polynomial", "lr_warmup_steps": 0},
    }
    return from_dict({**values, **overrides}, DistillConfig)


def tiny_student(teacher):
    return convert(teacher.transformer, LINEAR, mode="linear")


def run(output_dir, **overrides) -> SimpleNamespace:
    """Run a distillation and return what it has made on the way; see tiny_run.watched."""
    teacher = tiny_teacher()
    with watched(distiller) as seen:
        distill(distill_config(output_dir, **overrides), teacher, tiny_student(teacher), PROMPTS)
    return seen


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, overrides, *point = sys.argv[1:]
    if point and point[0] == "export":
        export.save_pipeline = lambda *_, **__: die()
    elif point:
        die_at(point[0], int(point[1]))
    run(folder, **json.loads(overrides))
