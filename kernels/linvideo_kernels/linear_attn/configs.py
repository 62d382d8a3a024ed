"""Tile shapes and grid sizes by kernel, head dimension, element size and architecture; no autotuning."""

from typing import NamedTuple


class Tile(NamedTuple):
    block: int  # rows of a tile; columns in reduce_state
    warps: int
    stages: int


def tile(kernel: str, head_dim: int, element_size: int, capability: int) -> Tile:
    """capability: 90 for sm_90, 0 for the interpreter. Chosen by registers and shared memory, not yet by time."""
    wide = padded(head_dim) == 128
    if kernel == "reduce_state":
        return Tile(16, 4, 1)
    if capability == 0:
        return Tile(64, 1, 1)
    if element_size == 4:  # CUDA cores
        if wide and kernel == "project_grad":
            return Tile(16, 16, 1)
        return Tile(32, 8 if head_dim > 32 else 4, 1)
    if capability // 10 == 10:  # tcgen05: two or more stages fail to compile (Triton 3.6)
        return Tile(64, 8 if head_dim > 32 else 4, 1)
    if not wide:
        return Tile(64, 4, 2)
    if capability // 10 == 9:  # wgmma
        return {"map_grad": Tile(64, 8, 1), "project_grad": Tile(128, 8, 2)}.get(kernel, Tile(128, 8, 1))
    return Tile(64 if kernel == "apply_state" else 32, 8, 1)  # mma.sync, at most 99 KB of shared memory


def split_rows(length: int, block: int, programs_per_split: int, sm_count: int) -> tuple[int, int]:
    """(splits, tiles per split), for two programs per SM. A function of these alone, so that reruns are bit-equal."""
    blocks = -(-length // block)
    splits = max(1, min(blocks, 2 * sm_count // programs_per_split))
    per_split = -(-blocks // splits)
    return -(-blocks // per_split), per_split


def saved_shapes(batch: int, heads: int, head_dim: int, signs: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the state and of its statistics (see forward.py)."""
    width = padded(head_dim)
    return (batch, heads, signs, width, width), (batch, heads, 2 * signs + 2, width)


def padded(head_dim: int) -> int:
    """The tile's width: D rounded up to a power of two, at least 16 for tl.dot."""
    return max(16, 1 << (head_dim - 1).bit_length())
