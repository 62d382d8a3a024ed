"""The linear branches of a converted model and their mixing scalars r."""

from collections.abc import Collection

import torch

from linvideo.nn import LinearAttentionBranch


def linear_branches(model: torch.nn.Module) -> dict[int, LinearAttentionBranch]:
    """Return {layer: branch} for the layers that have a linear branch; layers are numbered from 0."""
    branches = {layer: getattr(block.attn1, "linear_attn", None) for layer, block in enumerate(model.blocks)}
    return {layer: branch for layer, branch in branches.items() if branch is not None}


def gates(model: torch.nn.Module) -> dict[int, torch.nn.Parameter]:
    """Return {layer: r} for the mixed layers; r has shape [1]."""
    return {layer: branch.r for layer, branch in linear_branches(model).items() if branch.r is not None}


def kept_whole(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return {name: parameter} for the parameters that are not sharded: each rank keeps them whole and in fp32.

    They are about 1% of all: the linear branches, which the warm-up uses outside of any forward that FSDP2 sees (and r
    is a single number); a critic's discriminator, which is used outside as well; and the norms and modulation tables,
    which Wan computes in fp32.
    """
    pieces = ("linear_attn", "discriminator", "scale_shift_table")
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if any(piece in pieces or piece.startswith("norm") for piece in name.split("."))
    }


def feature_weights(model: torch.nn.Module, layers: Collection[int] | None = None) -> dict[str, torch.nn.Parameter]:
    """Return {name in the state dict: parameter} of what the warm-up fits, in these layers (default: all).

    These are W_q and W_k [H, D, D], except for feature maps without weights, and log_gain [H] of window layers.
    """
    return {
        f"blocks.{layer}.attn1.linear_attn.{name}": getattr(branch, name)
        for layer, branch in linear_branches(model).items()
        if layers is None or layer in layers
        for name in ("q_weight", "k_weight", "log_gain")
        if getattr(branch, name, None) is not None
    }
