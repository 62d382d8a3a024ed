"""Which rows a program has, loading and storing tiles of them, and the rotary embedding of a tile.

The rows belong to a batch, or to sequences packed one after another (cu_seqlens). A work item is a run of `rows`
consecutive rows of one sequence. Packed sequences need no table of items: sequence s owns the item numbers from
cu[s] // rows + s on, which are always enough for its rows.

Every row starts at a multiple of 8 elements (see side.aligned). Triton only infers alignment from strides that are
multiples of 16, so the addresses say so themselves (tl.multiple_of).
"""

import triton
import triton.language as tl


@triton.jit
def locate(item, cu_ptr, SEQUENCES, N, splits, rows):
    """Find a work item: its sequence and batch entry, and which rows it has.

    Returns (sequence, batch, first, length, start, stop): the sequence begins at row `first` of the batch entry and has
    `length` rows, of which the item has start to stop - 1. An item number that no sequence uses has an empty range.
    """
    if cu_ptr is None:
        sequence = item // splits
        batch, first, length = sequence, tl.full([], 0, tl.int32), N
        start = item % splits * rows
    else:
        low = 0  # binary search for the last sequence whose first item is at most `item`
        high = SEQUENCES
        while high - low > 1:
            middle = (low + high) // 2
            below = tl.load(cu_ptr + middle) // rows + middle <= item
            low = tl.where(below, middle, low)
            high = tl.where(below, high, middle)
        sequence, batch = low, tl.full([], 0, tl.int32)
        first = tl.load(cu_ptr + low)
        length = tl.load(cu_ptr + low + 1) - first
        start = (item - first // rows - low) * rows
    return sequence, batch, first, length, start, tl.minimum(start + rows, length)


@triton.jit
def tile_of_program(pid, HEADS, splits, N, BLOCK: tl.constexpr):
    """Find the tile of a kernel that works on each tile of rows alone, without packed sequences.

    Returns (batch, first, head, row, n, valid): the tile's rows are n = row, ..., row + BLOCK - 1, and `valid` says
    which of them exist; `first` is 0. The heads of a tile run next to each other, so what they share comes from L2.
    """
    row = pid // HEADS % splits * BLOCK
    n = row + tl.arange(0, BLOCK)
    return pid // HEADS // splits, tl.full([], 0, tl.int32), pid % HEADS, row, n, n < N


@triton.jit
def head_rows(ptr, batch, first, head, stride_b, stride_n, stride_h, TMA: tl.constexpr):
    """Return the address of a head's row `first`; a TMA descriptor is returned as it is."""
    if TMA:
        return ptr
    else:
        at = batch.to(tl.int64) * stride_b + first.to(tl.int64) * stride_n + head.to(tl.int64) * stride_h
        return ptr + tl.multiple_of(at, 8)


@triton.jit
def offsets(n, stride_n, WIDTH: tl.constexpr):
    at = n.to(tl.int64) * stride_n
    return tl.multiple_of(at[:, None], [8, 8]) + tl.arange(0, WIDTH)[None, :]


@triton.jit
def load_rows(
    ptr, batch, head, row, length, keep, stride_n,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Load rows [row, row + BLOCK) of a head.

    Rows past the sequence repeat its last row, without a mask on the loads; with TMA they are 0. A repeated row is
    finite if the sequence is, so the caller can cancel it with a factor 0. Rows that `keep` leaves out are 0.
    """
    if TMA:
        return tl.reshape(ptr.load([batch, head, row, 0]), [BLOCK, WIDTH])
    else:
        at = offsets(tl.minimum(row + tl.arange(0, BLOCK), length - 1), stride_n, WIDTH)
        real = (tl.arange(0, WIDTH) < D)[None, :]
        if keep is not None:
            return tl.load(ptr + at, keep[:, None] & real, 0.0)
        elif D < WIDTH:
            return tl.load(ptr + at, real, 0.0)
        else:
            return tl.load(ptr + at)


@triton.jit
def kept(keep_ptr, batch, N, n, valid):
    """Return which of the rows n the key mask [B, N] keeps."""
    return tl.load(keep_ptr + batch.to(tl.int64) * N + n, valid, 0) != 0


@triton.jit
def store_rows(ptr, x, row, valid, stride_n, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    at = offsets(row + tl.arange(0, BLOCK), stride_n, WIDTH)
    tl.store(ptr + at, x.to(ptr.dtype.element_ty), valid[:, None] & (tl.arange(0, WIDTH) < D)[None, :])


@triton.jit
def rotate(u, cos_ptr, sin_ptr, row, valid, sign, D: tl.constexpr, WIDTH: tl.constexpr):
    """Rotate the channel pairs (2i, 2i + 1) of a tile by the angles of its rows; sign -1 rotates back.

    The tile begins at row `row` of the tables. It is rotated in fp32 and rounded to u's dtype.
    """
    pair = tl.arange(0, WIDTH // 2)
    start = row.to(tl.int64) * (D // 2)  # offsets inside the tile stay 32 bits wide and take half the registers
    at = tl.arange(0, u.shape[0])[:, None] * (D // 2) + pair[None, :]
    real = valid[:, None] & (pair < D // 2)[None, :]
    cos = tl.load(cos_ptr + start + at, real, 0.0).to(tl.float32)
    sin = tl.load(sin_ptr + start + at, real, 0.0).to(tl.float32) * sign
    even, odd = tl.split(tl.reshape(u.to(tl.float32), [u.shape[0], WIDTH // 2, 2]))
    rotated = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    return tl.reshape(rotated, [u.shape[0], WIDTH]).to(u.dtype)
