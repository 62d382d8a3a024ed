"""Random draws that depend on a name, hash(seed, purpose, index), in place of a generator with a state.

So a run that is resumed, or that uses a different number of processes, draws the same numbers without a saved state.
"""

import hashlib
from collections.abc import Iterable

import torch


def stable_hash(*name: int | str) -> int:
    """Return a 63-bit integer that depends only on `name`, the same on every machine and in every process."""
    digest = hashlib.blake2b(repr(name).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*name: int | str) -> torch.Generator:
    """Return a CPU generator seeded by `stable_hash(*name)`. Draw on the CPU and move the result, so that all devices
    get the same numbers."""
    return torch.Generator().manual_seed(stable_hash(*name))


def draw_noise(shape: tuple[int, ...], *name: int | str) -> torch.Tensor:
    """Draw a standard normal fp32 tensor of `shape`, on the CPU."""
    return torch.randn(shape, generator=generator(*name))


def draw_indices(size: int, positions: Iterable[int], *name: int | str) -> list[int]:
    """Draw an integer in [0, size), with replacement, for each of these positions in a global batch."""
    return [stable_hash(*name, position) % size for position in positions]


def random_state(device: torch.device) -> dict[str, torch.Tensor | None]:
    """Return the state of torch's own generators, for checkpoints of models that use them (dropout)."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None}


def set_random_state(state: dict[str, torch.Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
