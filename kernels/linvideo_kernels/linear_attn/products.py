"""Products of a tile of rows with what a head keeps: its weight, a half of its state, its z."""

import triton
import triton.language as tl


@triton.jit
def operand(ptr, KEEP: tl.constexpr, WIDTH: tl.constexpr):
    """A [WIDTH, WIDTH] operand to be kept on chip, or its address, where `times` shall read it for each tile."""
    if KEEP and ptr.dtype.element_ty != tl.float32:
        i = tl.arange(0, WIDTH)
        return tl.load(ptr + i[:, None] * WIDTH + i[None, :])
    else:
        return ptr


@triton.jit
def times(a, b, acc, TRANSPOSE: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a @ b, or a @ b^T, b an `operand`; fp32 in pieces, as a long inner axis fills registers."""
    i = tl.arange(0, WIDTH)
    if a.dtype == tl.float32:
        CHUNK: tl.constexpr = 16
        parts = tl.reshape(a, [a.shape[0], WIDTH // CHUNK, CHUNK])
        index = tl.arange(0, WIDTH // CHUNK)[None, :, None]
        for chunk in range(WIDTH // CHUNK):
            part = tl.sum(tl.where(index == chunk, parts, 0.0), axis=1)
            k = chunk * CHUNK + tl.arange(0, CHUNK)
            at = k[:, None] + i[None, :] * WIDTH if TRANSPOSE else k[:, None] * WIDTH + i[None, :]
            acc = tl.dot(part, tl.load(b + at), acc, input_precision=PRECISION)
        return acc
    else:
        if b.dtype.is_ptr():
            b = tl.load(b + i[:, None] * WIDTH + i[None, :])
        return tl.dot(a, tl.trans(b) if TRANSPOSE else b, acc, input_precision=PRECISION)


@triton.jit
def logits(u, w, WIDTH: tl.constexpr, PRECISION: tl.constexpr):
    """u W, w an `operand`; u itself for the maps without weights, w None."""
    if w is None:
        return u.to(tl.float32)
    else:
        return times(u, w, tl.zeros([u.shape[0], WIDTH], tl.float32), False, WIDTH, PRECISION)


@triton.jit
def floor_power(x):
    """2^floor(log2 x) for x in 1e-25 to 1e25; 1 for all else: 0, infinity, NaN."""
    power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where((power > 1e-25) & (power < 1e25), power, 1.0)


@triton.jit
def split(x, DTYPE: tl.constexpr):
    """x = high + low with both in DTYPE: 16 bits and more of x survive a 16-bit dot."""
    high = x.to(DTYPE)
    return high, (x - high.to(tl.float32)).to(DTYPE)
