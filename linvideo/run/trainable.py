"""Models as a run trains them, and teachers as it asks them: compiled, in shards, offloaded, as configured."""

import torch

from linvideo.run.parallel import Ranks
from linvideo.run.run_config import RunConfig
from linvideo.run.sharding import shard, split_tokens


def trainable(model: torch.nn.Module, config: RunConfig, ranks: Ranks, own: bool = True) -> torch.nn.Module:
    """`model` in place, ready to train: compiled, in shards, activations recomputed, as configured.

    own: whether it gets trainable fp32 copies of weights that it shares with another; else they stay as they are.
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


def trained_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters that require gradients."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


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
