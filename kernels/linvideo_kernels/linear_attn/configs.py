"""Tile shapes and grid sizes by kernel, head dimension, element size and architecture; no autotuning."""

import functools
from typing import NamedTuple

import torch

AMD = {942: 64, 950: 64, 1100: 32}  # capability: threads of a warp; 942 stands for gfx942 (MI300)


class Tile(NamedTuple):
    block: int  # rows of a tile
    warps: int
    stages: int
    resident: int = 1  # programs that one SM holds at a time
    keeps: bool = True  # the state stays on chip (16-bit tiles)
    tma: bool = False  # read rows through TMA descriptors where they allow it
    value_first: bool = True  # accumulate_state forms S^T = y^T phi, not S = phi^T y
    z_by_dot: bool = True  # accumulate_state sums z by a dot of 16 rows, not in registers (wgmma's layout)
    amd: bool = False  # compiled for one of AMD, with other options

    @property
    def options(self) -> dict[str, int]:
        """Triton's. A stated limit of registers keeps ptxas from spilling a few bytes for one more program on an SM.

        AMD's matrix instructions of 16 rows leave each row of a result to one warp, so that features made of it are
        computed once; those of 32 rows, Triton's choice, spread a row over two.
        """
        if self.amd:
            return {"num_warps": self.warps, "num_stages": self.stages, "matrix_instr_nonkdim": 16}
        limit = min(255, 65536 // (32 * self.warps * self.resident))
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": limit}


class Work(NamedTuple):
    """Rows of all sequences, dealt out in items (tiles.locate)."""

    sequences: int
    items: int
    splits: int  # items of a sequence; of packed sequences each has its own number
    rows: int  # of an item


# Options under which a TMA descriptor cannot read the rows: it leaves none out, knows one length and repeats nothing.
NO_DESCRIPTOR = {
    "accumulate_state": frozenset({"packed", "expanded", "key_mask"}),
    "apply_state": frozenset({"packed", "expanded"}),
}
# Programs of an SM one after another, at most: those that write a partial sum each, and others.
WAVES_OF_PARTIALS, WAVES = 5, 16
ROOM = 32768.0  # features of at most 1 are multiplied by it, so that small ones stay in fp16's range


@functools.cache
def tile(
    kernel: str, head_dim: int, dtype: torch.dtype, capability: int, feature_map: str, options: frozenset = frozenset()
) -> Tile:
    """The table. capability: 90 for sm_90, 0 for the interpreter.

    options: those of "rope", "mix", "key_mask", "packed", "expanded" (rows repeat in memory), "tf32x3", "factors"
    (accumulate_state multiplies its rows by factors: the backward of a normalised output) and "keys" (map_grad's rows
    are the keys) that hold.
    """
    wide = padded(head_dim) == 128
    if kernel in ("prepare_state", "reduce_state", "mix_grad", "rotate_rows"):
        return _small(kernel)._replace(amd=capability in AMD)
    if capability in AMD:
        return _amd(kernel, wide, dtype, capability, feature_map, options)._replace(amd=True)
    if capability == 0:
        return Tile(64, 1, 1)
    if dtype == torch.float32:
        return _float32(kernel, head_dim, wide, "tf32x3" in options)
    if capability // 10 == 9:
        if wide:
            return _hopper(kernel, dtype, feature_map, options)
        return Tile(64, 4, 2 if head_dim > 32 else 1, resident=2)
    if capability // 10 == 10:
        return _blackwell(kernel, head_dim)
    return _mma(kernel, wide, signs(feature_map) == 2, capability, options)


def _small(kernel: str) -> Tile:
    """Kernels without products; the rows of the first two are features."""
    if kernel == "prepare_state":
        return Tile(64, 8, 1)
    if kernel == "reduce_state":
        return Tile(16, 4, 1)
    return Tile(64, 4, 1, resident=2)


def _float32(kernel: str, head_dim: int, wide: bool, tf32x3: bool) -> Tile:
    if kernel == "apply_state" or head_dim <= 32:
        return Tile(64, 8, 1)
    if tf32x3 and kernel == "accumulate_state" and wide:
        return Tile(16, 8, 1, value_first=False)
    if tf32x3 and kernel == "project_grad":
        return Tile(16, 8, 1) if wide else Tile(32, 4, 1, resident=2)
    return Tile(16, 16, 1) if wide and kernel == "project_grad" else Tile(32, 8, 1)


def _hopper(kernel: str, dtype: torch.dtype, feature_map: str, options: frozenset) -> Tile:
    """D > 64 on sm_90. 64 rows need 4 warps, 128 rows 8, for a dot that feeds a dot: fewer rows repeat exponentials.

    Triton's two stages issue the next tile's copies at the end of an iteration and wait for them at the top of the
    next: only another program on the SM computes meanwhile. A program that is alone on its SM needs three stages.
    """
    weighted, joint = signs(feature_map) == 2, feature_map == "hedgehog_joint"
    if kernel == "accumulate_state":
        factors, pointers = "factors" in options, options & NO_DESCRIPTOR[kernel]
        if factors and (pointers or dtype == torch.float16):
            return Tile(128, 8, 1)
        if pointers:
            return Tile(64, 4, 3) if feature_map == "hedgehog" else Tile(128, 8, 1)
        if factors:
            return Tile(64, 4, 3, tma=True) if joint else Tile(64, 4, 1, resident=2, tma=True)
        if joint:
            return Tile(64, 4, 1, resident=2, tma=True)
        return Tile(64, 4, 2, resident=2, tma=True, z_by_dot=False)
    if kernel == "apply_state":
        if "mix" in options and options & {"rope", "packed"} or joint and "rope" in options:
            return Tile(64, 4, 2, keeps=False)
        # Without descriptors the angles leave registers for a second program.
        return Tile(64, 4, 1, resident=2, tma=not options & {"rope", *NO_DESCRIPTOR[kernel]})
    if kernel == "map_grad":
        return Tile(64, 8, 3) if weighted or "keys" not in options else Tile(64, 4, 1, resident=2)
    return Tile(64, 8, 3) if "rope" in options else Tile(64, 4, 2, resident=2)


def _blackwell(kernel: str, head_dim: int) -> Tile:
    """sm_100: Triton 3.6 fails to compile two or more stages of a tcgen05 loop; 3.7.1 may give wrong sums."""
    if kernel == "map_grad":
        return Tile(64, 4, 1) if padded(head_dim) < 128 else Tile(64, 8, 1, keeps=False)
    return Tile(64, 8 if head_dim > 32 else 4, 1)


def _mma(kernel: str, wide: bool, weighted: bool, capability: int, options: frozenset) -> Tile:
    """mma.sync: phi comes first in accumulate_state, as y^T would be prefetched in registers.

    sm_89 and sm_120 have 99 KB of shared memory: the state of a wide head comes from L2 for each tile. More stages
    would keep several copies of it on chip.
    """
    if not wide:
        if kernel == "apply_state":
            return Tile(32, 8, 1) if weighted else Tile(128, 8, 1)
        return Tile(64, 4, 1) if kernel == "accumulate_state" else Tile(32, 4, 2)
    if kernel == "accumulate_state":
        return Tile(64 if capability == 80 and weighted else 32, 8, 3, value_first=False)
    if kernel == "project_grad":
        return Tile(16, 4, 1, resident=2)
    if not weighted:
        return Tile(32, 4, 1, resident=2)
    if capability == 80:
        return Tile(32, 8, 3)
    full = kernel == "apply_state" and {"rope", "mix"} <= options  # more of each row in registers
    return Tile(16 if full else 32, 8, 1, keeps=False)


def _amd(kernel: str, wide: bool, dtype: torch.dtype, capability: int, feature_map: str, options: frozenset) -> Tile:
    """gfx942, gfx950: one warp for each 16 rows. gfx1100 has half the registers, and products read them twice."""
    if "tf32x3" in options:
        raise ValueError(f"fp32_precision 'tf32x3' needs an NVIDIA GPU; use 'ieee' on {arch(capability)}")
    if capability == 1100:
        if wide:
            return Tile(32, 16, 1, keeps=False) if kernel == "map_grad" else Tile(16, 8, 1, keeps=False)
        return Tile(32, 8, 1, keeps=False)
    if dtype == torch.float32:
        return Tile(32, 4, 1)
    if kernel == "accumulate_state":
        return Tile(64, 4, 1, resident=1 if wide else 2, value_first=False)
    if not wide:
        return Tile(64, 4, 1, resident=2)
    if kernel != "apply_state":
        return Tile(64, 4, 1, keeps=False)
    # More of each row is in registers here, and gfx942's products take more instructions than gfx950's.
    more = dtype == torch.float16 or feature_map == "hedgehog_joint" or options & {"rope", "mix"}
    return Tile(32, 4, 1, keeps=False) if capability == 942 and more else Tile(32, 2, 1, resident=2, keeps=False)


def arch(capability: int) -> str:
    """The name that the compiler has for it: sm_90, gfx942."""
    return f"gfx{capability}" if capability in AMD else f"sm_{capability}"


def signs(feature_map: str) -> int:
    """Halves of the features, phi(x) and phi(-x)."""
    return 2 if feature_map.startswith("hedgehog") else 1


def room(feature_map: str) -> float:
    return ROOM if feature_map in ("hedgehog", "hedgehog_joint", "softmax") else 1.0


@functools.lru_cache(1024)
def deal_out(
    tile: Tile, length: int, batch: int, sequences: int | None, programs: int, sm_count: int, partials: bool = False
) -> Work:
    """`programs`: per item; `partials`: each writes a partial sum. A function of these alone: reruns are bit-equal.

    The splits of least time, counted in tiles: programs that an SM runs one after another, times the tiles of each and
    one more for what it loads before the first.
    """
    blocks = -(-length // tile.block)
    slots = tile.resident * sm_count
    per_split = programs * (batch if sequences is None else 1)

    def time(splits: int) -> int:
        tiles = -(-blocks // splits)
        return -(-per_split * -(-blocks // tiles) // slots) * (tiles + 1)

    most = (WAVES_OF_PARTIALS if partials else WAVES) * slots // per_split
    splits = min(range(1, max(1, min(blocks, most)) + 1), key=time)
    rows = -(-blocks // splits) * tile.block
    if sequences is None:
        splits = -(-length // rows)
        return Work(batch, batch * splits, splits, rows)
    return Work(sequences, length // rows + sequences, 0, rows)


def prepared_shapes(batch: int, heads: int, head_dim: int, signs: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of a prepared state and of its statistics (prepare.py)."""
    width = padded(head_dim)
    return (batch, heads, signs, width, width), (batch, heads, 2 * signs + 2, width)


def padded(head_dim: int) -> int:
    """The tile's width: D rounded up to a power of two, at least 16 for tl.dot."""
    return max(16, 1 << (head_dim - 1).bit_length())
