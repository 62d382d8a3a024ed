"""A whole distillation of a second or two, in this process or as a script, as tiny_run.py is for transfers; the
stage may also be "export", where there is but one step to die at."""

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

LINEAR = [1]  # layers of the student


def distill_config(output_dir, **overrides) -> DistillConfig:
    """Both stages train a little, every stateful part is in use; `overrides` replace top-level values and sections."""
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
    """What the finished run has made on its way; see tiny_run.watched."""
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
