"""Dividing a model among ranks: FSDP2 over its blocks, context parallelism through diffusers' hooks."""

import warnings

import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from diffusers.hooks.context_parallel import apply_context_parallel
from diffusers.models._modeling_parallel import ContextParallelConfig
from diffusers.models._modeling_parallel import ParallelConfig as DiffusersParallelConfig
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from linvideo.models import LinVideoWanTransformer3DModel
from linvideo.models.branches import kept_whole
from linvideo.run.adapters import ADAPTER, adapters, merge
from linvideo.run.parallel import Ranks


def shard(
    model: nn.Module,
    ranks: Ranks,
    compute_dtype: torch.dtype | None = None,
    own: bool = False,
    offload: bool = False,
) -> nn.Module:
    """Apply FSDP2 to `model` in place, one block at a time. In a run of one process, only `own` has an effect.

    Parameters that are `kept_whole` are not sharded; `Ranks.average_gradients` averages their gradients.

    Args:
        model: The model.
        ranks: The ranks of the run.
        compute_dtype: Dtype in which the shards are gathered. None means the dtype they have. Gradients are always
            reduced in fp32.
        own: Whether to first replace weights that the model shares with another one by trainable fp32 copies on the
            ranks' device. This also happens one block at a time, so that no rank ever holds all of them.
        offload: Whether to keep the shards in CPU memory, for a model that is not trained.
    """
    # inputs are not cast, because rotary tables and timesteps must stay fp32; autocast handles the rest
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    options = {"offload_policy": CPUOffloadPolicy(pin_memory=ranks.device.type == "cuda")} if offload else {}
    # Wan's output is a view, but nothing here writes to it
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    finished = set()
    for part in (*model.blocks, model):
        modules = set(part.modules()) - finished
        finished |= modules
        for module in modules if own else ():
            for name, parameter in list(module.named_parameters(recurse=False)):
                fresh = parameter.detach().to(ranks.device, torch.float32, copy=True)
                module.register_parameter(name, nn.Parameter(fresh))
            for name, buffer in list(module.named_buffers(recurse=False)):  # offloading moves the other's in place
                fresh = buffer.to(ranks.device, copy=True)
                module.register_buffer(name, fresh, name not in module._non_persistent_buffers_set)
        if ranks.size > 1:
            whole = set(kept_whole(model).values())
            options |= {"mesh": ranks.weights, "mp_policy": policy, "ignored_params": whole}
            # also for the root module, because optimizers and checkpoints must find shards
            fully_shard(part, reshard_after_forward=True, **options)
    return model


def split_tokens(model: nn.Module, ranks: Ranks) -> None:
    """Set up context parallelism in place. diffusers' enable_parallelism does the same, but needs an accelerator."""
    if ranks.context_size == 1:
        return
    warnings.filterwarnings("ignore", ".*all_gather_tensor. is deprecated", FutureWarning)  # in diffusers' hooks
    degrees = {"ring_degree": ranks.config.ring_degree, "ulysses_degree": ranks.config.ulysses_degree}
    config = DiffusersParallelConfig(context_parallel_config=ContextParallelConfig(**degrees))
    config.setup(ranks.rank, ranks.size, ranks.device, mesh=ranks.samples)
    for module in model.modules():
        if hasattr(getattr(module, "processor", None), "_parallel_config"):
            module.processor._parallel_config = config
    apply_context_parallel(model, config.context_parallel_config, model._cp_plan)


def gather(model: nn.Module, ranks: Ranks) -> nn.Module | None:
    """Return `model` as a whole model without adapters: itself if it is one already, otherwise a copy.

    The copy exists on the first rank only, the others get None. That of a sharded model is on the CPU.
    """
    scaling = {name: layer.scaling[ADAPTER] for name, layer in adapters(model).items()}
    if ranks.size == 1 and not scaling:
        return model
    state = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if ranks.first:
            state[name] = tensor.detach().cpu()
    if not ranks.first:
        return None
    with init_empty_weights():
        # type(model) may be a class that FSDP2 has made
        converted = isinstance(model, LinVideoWanTransformer3DModel)
        whole = (LinVideoWanTransformer3DModel if converted else WanTransformer3DModel).from_config(model.config)
    whole.load_state_dict(merge(state, scaling), assign=True)
    whole.eval().requires_grad_(False)
    return whole.to(ranks.device) if ranks.size == 1 else whole
