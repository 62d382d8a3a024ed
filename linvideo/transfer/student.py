"""The student of a run, and its teacher as training asks it."""

from collections.abc import Callable

import torch

from linvideo.models import convert
from linvideo.run.adapters import FrozenBase, add_adapters
from linvideo.run.parallel import Ranks
from linvideo.run.trainable import frozen, trainable
from linvideo.transfer.train_config import TrainConfig


def mixed(teacher: torch.nn.Module, config: TrainConfig) -> torch.nn.Module:
    """The teacher with mixed layers where linear ones may come, sharing its weights."""
    selection = config.selection
    layers = "all" if selection.layers is None else selection.layers
    settings = {"feature_map": config.feature_map, "r_init": selection.r_init}
    return convert(teacher, layers, mode="mixed", copy=False, **settings)


def make_student(teacher: torch.nn.Module, config: TrainConfig, ranks: Ranks) -> torch.nn.Module:
    """With trainable fp32 weights of its own, or adapters on the teacher's; of several ranks, in shards."""
    student = mixed(teacher, config)
    if config.lora.rank is not None:
        torch.manual_seed(config.seed)  # adapters start from draws of their own
        add_adapters(student, config.lora)
    return trainable(student, config, ranks, own=config.lora.rank is None)


def training_teacher(
    teacher: torch.nn.Module, student: torch.nn.Module, config: TrainConfig, ranks: Ranks
) -> torch.nn.Module | Callable:
    """The teacher as `frozen`; with adapters, the student's base."""
    if config.lora.rank is not None:
        if ranks.size > 1:
            teacher.to("meta")  # the student's shards have its weights
        return FrozenBase(student)
    return frozen(teacher, config, ranks)
