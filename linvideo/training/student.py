"""The student of a run, and its teacher as training asks it."""

from collections.abc import Callable

import torch

from linvideo.models import convert
from linvideo.training.adapters import FrozenBase, add_adapters
from linvideo.training.config import TrainConfig
from linvideo.training.parallel import Ranks
from linvideo.training.run_config import RunConfig
from linvideo.training.sharding import shard, split_tokens


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


def trainable(model: torch.nn.Module, config: RunConfig, ranks: Ranks, own: bool = True) -> torch.nn.Module:
    """`model` in place, ready to train: compiled, in shards, activations recomputed, as configured.

    own: give it trainable fp32 copies of weights that it shares with another; else they stay as they are.
    """
    if config.compile:
        # the blocks share their code: kinds of attention, with and without gradient and adapters
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
        for block in model.blocks:
            block.forward = torch.compile(block.forward)  # not the call: hooks of FSDP2 stay outside
    split_tokens(model, ranks)
    dtype = torch.bfloat16 if own and config.mixed_precision == "bf16" else None
    shard(model, ranks, compute_dtype=dtype, own=own)
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model.train()


def training_teacher(
    teacher: torch.nn.Module, student: torch.nn.Module, config: TrainConfig, ranks: Ranks
) -> torch.nn.Module | Callable:
    """The teacher as `frozen`; with adapters, the student's base."""
    if config.lora.rank is not None:
        if ranks.size > 1:
            teacher.to("meta")  # the student's shards have its weights
        return FrozenBase(student)
    return frozen(teacher, config, ranks)


def frozen(teacher: torch.nn.Module, config: RunConfig, ranks: Ranks) -> torch.nn.Module:
    """The teacher in place, in shards or offloaded."""
    if ranks.size > 1:
        teacher.requires_grad_(False)
        split_tokens(teacher, ranks)
        shard(teacher, ranks, offload=config.offload_teacher)
    elif config.offload_teacher:
        streams = ranks.device.type == "cuda"
        teacher.enable_group_offload(ranks.device, num_blocks_per_group=1, use_stream=streams)
    return teacher
