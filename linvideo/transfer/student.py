"""The models of a run: the student, and the teacher as training evaluates it."""

from collections.abc import Callable

import torch

from linvideo.models import convert
from linvideo.run.adapters import FrozenBase, add_adapters
from linvideo.run.parallel import Ranks
from linvideo.run.trainable import frozen, trainable
from linvideo.transfer.train_config import TrainConfig


def candidate(teacher: torch.nn.Module, config: TrainConfig) -> torch.nn.Module:
    """Return a copy of the teacher, sharing its weights, with mixed layers where layers may become linear.

    The layers that are to be window layers are so from the beginning.
    """
    selection, settings = config.selection, {"feature_map": config.feature_map, "copy": False}
    student = teacher
    if selection.layers != []:
        layers = "all" if selection.layers is None else selection.layers
        student = convert(student, layers, mode="mixed", r_init=selection.r_init, **settings)
    if selection.window_layers:
        window = config.window.settings()
        student = convert(student, selection.window_layers, mode="window", window=window, **settings)
    return student


def make_student(teacher: torch.nn.Module, config: TrainConfig, ranks: Ranks) -> torch.nn.Module:
    """Return the student, sharded over the ranks, with fp32 weights of its own or adapters on the teacher's weights."""
    student = candidate(teacher, config)
    if config.lora.rank is not None:
        torch.manual_seed(config.seed)  # the initial adapters are random
        add_adapters(student, config.lora)
    return trainable(student, config, ranks, own=config.lora.rank is None)


def training_teacher(
    teacher: torch.nn.Module, student: torch.nn.Module, config: TrainConfig, ranks: Ranks
) -> torch.nn.Module | Callable:
    """Return the teacher as prepared by `frozen`; with adapters, the base of the student."""
    if config.lora.rank is not None:
        if ranks.size > 1:
            teacher.to("meta")  # the student's shards have its weights
        return FrozenBase(student)
    return frozen(teacher, config, ranks)
