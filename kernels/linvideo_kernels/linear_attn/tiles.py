"""Where a program's rows lie, how their tiles come on chip, and the rotary embedding of a tile.

Rows are those of a batch, or of sequences packed one after another (cu_seqlens). Work items are runs of rows of one
sequence. Packed, sequence s has the items from cu[s] // rows + s on: there is room for all of it, without a table.
Every row starts at a multiple of 8 elements (side.aligned), which Triton cannot tell from strides that are no multiple
of 16.
"""

import triton
import triton.language as tl


@triton.jit
def locate(item, cu_ptr, SEQUENCES, N, splits, rows):
    """An item's sequence, batch entry, the sequence's first row in it and its length, the item's first and last row."""
    if cu_ptr is None:
        sequence = item // splits
        batch, first, length = sequence, tl.full([], 0, tl.int32), N
        start = item % splits * rows
    else:
        low = 0
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
def head_rows(ptr, batch, first, head, stride_b, stride_n, stride_h, TMA: tl.constexpr):
    """The address of a head's row `first`; a descriptor stays what it is."""
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
    """Rows [row, row + BLOCK) of a head. Those past the sequence repeat its last one (0 with TMA); not kept ones are 0.

    A repeated row is finite if its sequence is, so that a factor 0 takes it out.
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
    """Which of the rows n the key mask [B, N] leaves in."""
    return tl.load(keep_ptr + batch.to(tl.int64) * N + n, valid, 0) != 0


@triton.jit
def store_rows(ptr, x, row, valid, stride_n, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    at = offsets(row + tl.arange(0, BLOCK), stride_n, WIDTH)
    tl.store(ptr + at, x.to(ptr.dtype.element_ty), valid[:, None] & (tl.arange(0, WIDTH) < D)[None, :])


@triton.jit
def rotate(u, cos_ptr, sin_ptr, row, valid, sign, D: tl.constexpr, WIDTH: tl.constexpr):
    """Rotates the pairs (2i, 2i + 1) of rows `row` and on by their angles i, back where sign is -1.

    In fp32, rounded to u's dtype.
    """
    pair = tl.arange(0, WIDTH // 2)
    start = row.to(tl.int64) * (D // 2)  # the tile's own offsets stay 32 bits wide: half the registers
    at = tl.arange(0, u.shape[0])[:, None] * (D // 2) + pair[None, :]
    real = valid[:, None] & (pair < D // 2)[None, :]
    cos = tl.load(cos_ptr + start + at, real, 0.0).to(tl.float32)
    sin = tl.load(sin_ptr + start + at, real, 0.0).to(tl.float32) * sign
    even, odd = tl.split(tl.reshape(u.to(tl.float32), [u.shape[0], WIDTH // 2, 2]))
    turned = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    return tl.reshape(turned, [u.shape[0], WIDTH]).to(u.dtype)
