"""Random draws named by what they are for, hash(seed, purpose, index), in place of a generator that remembers.

A run that is resumed, or that uses another number of processes, draws the same numbers without any saved loader state.
"""

import hashlib
from collections.abc import Iterable

import torch


def stable_hash(*name: int | str) -> int:
    """A 63-bit integer that depends only on `name`, on every machine and in every process."""
    digest = hashlib.blake2b(repr(name).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*name: int | str) -> torch.Generator:
    """A CPU generator seeded by `stable_hash(*name)`; draw on the CPU and move, so that devices agree."""
    return torch.Generator().manual_seed(stable_hash(*name))


def draw_noise(shape: tuple[int, ...], *name: int | str) -> torch.Tensor:
    """Standard normal fp32 CPU tensor of `shape`."""
    return torch.randn(shape, generator=generator(*name))


def draw_indices(size: int, positions: Iterable[int], *name: int | str) -> list[int]:
    """An integer in [0, size) for each of `positions`, the places in a global batch, with replacement."""
    return [stable_hash(*name, position) % size for position in positions]


def random_state(device: torch.device) -> dict[str, torch.Tensor | None]:
    """torch's own generators, for checkpoints of models that draw from them (dropout)."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None}


def set_random_state(state: dict[str, torch.Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
