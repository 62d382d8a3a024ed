"""Tile shapes and grid sizes by kernel, head dimension, dtype and architecture. There is no autotuning."""

import functools
from typing import NamedTuple

import torch

AMD = {942: 64, 950: 64, 1100: 32}  # capability -> threads per warp; 942 stands for gfx942 (MI300)


class Tile(NamedTuple):
    block: int  # rows per tile
    warps: int  # warps per program
    stages: int  # stages of the software pipeline (Triton's num_stages)
    resident: int = 1  # programs that one SM is meant to hold at a time
    keeps: bool = True  # the state stays on chip between tiles (16-bit only); otherwise each tile reads it again
    tma: bool = False  # rows are read through TMA descriptors
    value_first: bool = True  # accumulate_state forms S^T = y^T phi rather than S = phi^T y
    z_by_dot: bool = True  # accumulate_state sums z with a 16-row product rather than in registers (wgmma's layout)
    amd: bool = False  # compiled for a GPU in AMD, with other compiler options

    @property
    def options(self) -> dict[str, int]:
        """The compiler options for Triton.

        On NVIDIA the register limit is explicit: without it, ptxas spills a few bytes to fit one more program on an SM.
        On AMD, matrix instructions of 16 rows leave each row of a result in one warp, so that its features are computed
        once; the instructions of 32 rows that Triton would choose spread a row over two warps.
        """
        if self.amd:
            return {"num_warps": self.warps, "num_stages": self.stages, "matrix_instr_nonkdim": 16}
        limit = min(255, 65536 // (32 * self.warps * self.resident))
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": limit}


class Work(NamedTuple):
    """How the rows of all sequences are divided into work items (see tiles.locate)."""

    sequences: int
    items: int  # work items in total
    splits: int  # items per sequence; 0 for packed sequences, each of which has its own number
    rows: int  # rows per item


# Options that a TMA descriptor cannot read rows under: it has one fixed length, reads every key, and cannot handle
# strides of 0.
NO_DESCRIPTOR = {
    "accumulate_state": frozenset({"packed", "expanded", "key_mask"}),
    "apply_state": frozenset({"packed", "expanded"}),
}
# The most programs that an SM runs one after another. Programs that each write a partial sum get fewer.
WAVES_OF_PARTIALS, WAVES = 5, 16
FEATURE_SCALE = 32768.0  # factor of features that are at most 1: it keeps small ones in fp16's range


@functools.cache
def tile(
    kernel: str, head_dim: int, dtype: torch.dtype, capability: int, feature_map: str, options: frozenset = frozenset()
) -> Tile:
    """Look up a kernel's tile.

    Args:
        kernel: Name of the kernel.
        head_dim: Head dimension D.
        dtype: Dtype of the rows.
        capability: 90 for sm_90, 942 for gfx942, 0 for Triton's interpreter.
        feature_map: Name of the feature map.
        options: Those that apply: "rope", "mix", "key_mask", "packed", "tf32x3", "expanded" (rows with a stride of 0),
            "factors" (accumulate_state multiplies rows by factors, in the backward of a normalised output), "keys"
            (map_grad's rows are the keys) and "normalizer" (apply_state writes denominators).
    """
    wide = padded(head_dim) == 128
    if kernel in ("prepare_state", "reduce_state", "mix_grad", "rotate_rows", "merge_rows", "merge_factors"):
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
    """Kernels without matrix products. For prepare_state and reduce_state the tile's rows are features."""
    if kernel == "prepare_state":
        return Tile(64, 8, 1)
    if kernel == "reduce_state":
        return Tile(16, 4, 1)
    if kernel in ("merge_rows", "merge_factors"):
        return Tile(32, 4, 1, resident=2)
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
    """D > 64 on sm_90.

    A product that feeds another product gets 4 warps for 64 rows and 8 for 128, that is 16 rows per warp. With fewer
    rows, several warps share a row and repeat the exponentials between the two products.

    With two stages Triton issues the next tile's copies at the end of an iteration and waits for them at the start of
    the next one, so only another program on the SM can compute in the meantime. A program that is alone on its SM needs
    three stages to overlap loads with work.
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
        # Reading the rows without descriptors leaves enough registers for the angles, or for the address of the
        # denominators, and a second program.
        return Tile(64, 4, 1, resident=2, tma=not options & {"rope", "normalizer", *NO_DESCRIPTOR[kernel]})
    if kernel == "map_grad":
        return Tile(64, 8, 3) if weighted or "keys" not in options else Tile(64, 4, 1, resident=2)
    return Tile(64, 8, 3) if "rope" in options else Tile(64, 4, 2, resident=2)


def _blackwell(kernel: str, head_dim: int) -> Tile:
    """sm_100, with one stage: Triton 3.6 cannot compile a tcgen05 loop with more, and 3.7.1 may give wrong sums."""
    if kernel == "map_grad":
        return Tile(64, 4, 1) if padded(head_dim) < 128 else Tile(64, 8, 1, keeps=False)
    return Tile(64, 8 if head_dim > 32 else 4, 1)


def _mma(kernel: str, wide: bool, weighted: bool, capability: int, options: frozenset) -> Tile:
    """GPUs whose products are mma.sync: sm_80, sm_89, sm_120 and the like.

    accumulate_state forms phi^T y, because y^T as a first operand would be prefetched into registers. sm_89 and sm_120
    have only 99 KB of shared memory, so there the state of a wide head is read from L2 for each tile; with more than
    one stage, several copies of it would be on chip.
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
    full = kernel == "apply_state" and {"rope", "mix"} <= options  # these options need more registers per row
    return Tile(16 if full else 32, 8, 1, keeps=False)


def _amd(kernel: str, wide: bool, dtype: torch.dtype, capability: int, feature_map: str, options: frozenset) -> Tile:
    """gfx942 and gfx950 use one warp per 16 rows. gfx1100 has half the registers, and its products read them twice."""
    if "tf32x3" in options:
        raise ValueError(f"expected fp32_precision 'ieee' on {arch(capability)}, got 'tf32x3', for NVIDIA GPUs only")
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
    # These cases need more registers per row, and gfx942's products take more instructions than gfx950's.
    more = dtype == torch.float16 or feature_map == "hedgehog_joint" or options & {"rope", "mix"}
    return Tile(32, 4, 1, keeps=False) if capability == 942 and more else Tile(32, 2, 1, resident=2, keeps=False)


def arch(capability: int) -> str:
    """Return the compiler's name for a capability: "sm_90" for 90, "gfx942" for 942."""
    return f"gfx{capability}" if capability in AMD else f"sm_{capability}"


def signs(feature_map: str) -> int:
    """Return the number of halves of the features: 2 for phi(x) and phi(-x), else 1."""
    return 2 if feature_map.startswith("hedgehog") else 1


def feature_scale(feature_map: str) -> float:
    """Return the power of two that the kernels multiply phi by."""
    return FEATURE_SCALE if feature_map in ("hedgehog", "hedgehog_joint", "softmax") else 1.0


@functools.lru_cache(1024)
def deal_out(
    tile: Tile, length: int, batch: int, sequences: int | None, programs: int, sm_count: int, partials: bool = False
) -> Work:
    """Divide the rows of a batch, or of packed sequences, into work items.

    The number of splits minimises the time, counted in tiles: the programs that an SM runs one after another, times the
    tiles of each program plus one for what it loads before the first. It depends on the arguments alone, so reruns sum
    in the same order and are bit-equal.

    Args:
        tile: The kernel's tile.
        length: Rows per sequence, or of all packed sequences together.
        batch: Number of batch entries.
        sequences: Number of packed sequences; None if nothing is packed.
        programs: Programs per item, one for each head or for each half of a head's features.
        sm_count: SMs of the GPU.
        partials: Whether each program writes a partial sum.
    """
    blocks = max(1, -(-length // tile.block))
    slots = tile.resident * sm_count
    per_split = max(1, programs * (batch if sequences is None else 1))

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
    """Return the shapes of a prepared state and of its statistics (prepare.py)."""
    width = padded(head_dim)
    return (batch, heads, signs, width, width), (batch, heads, 2 * signs + 2, width)


def padded(head_dim: int) -> int:
    """Return the width of a tile: D rounded up to a power of two, at least the 16 that tl.dot needs."""
    return max(16, 1 << (head_dim - 1).bit_length())
