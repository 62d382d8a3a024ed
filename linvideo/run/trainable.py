"""Preparing models to train and teachers to be evaluated: compiled, sharded, offloaded, as configured."""

import torch

from linvideo.run.parallel import Ranks
from linvideo.run.run_config import RunConfig
from linvideo.run.sharding import shard, split_tokens


def trainable(model: torch.nn.Module, config: RunConfig, ranks: Ranks, own: bool = True) -> torch.nn.Module:
    """Make `model` ready to train, in place: compiled, sharded, with gradient checkpointing, as configured.

    Args:
        model: The model.
        config: The options of the run.
        ranks: The ranks of the run.
        own: Whether to replace weights that the model shares with another one by trainable fp32 copies.
    """
    if config.compile:
        # the blocks share code, which is compiled for each kind of attention, with and without gradients and adapters
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
        for block in model.blocks:
            block.forward = torch.compile(block.forward)  # not the module, so that FSDP2's hooks stay outside
    split_tokens(model, ranks)
    dtype = torch.bfloat16 if own and config.mixed_precision == "bf16" else None
    shard(model, ranks, compute_dtype=dtype, own=own)
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model.train()


def trained_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Return the parameters that require gradients."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def frozen(teacher: torch.nn.Module, config: RunConfig, ranks: Ranks) -> torch.nn.Module:
    """Shard or offload the teacher in place, as configured."""
    if ranks.size > 1:
        teacher.requires_grad_(False)
        split_tokens(teacher, ranks)
        shard(teacher, ranks, offload=config.offload_teacher)
    elif config.offload_teacher:
        streams = ranks.device.type == "cuda"
        teacher.enable_group_offload(ranks.device, num_blocks_per_group=1, use_stream=streams)
    return teacher
