"""Products of a tile of rows with the matrices of its head: the weight and one half of the state."""

import triton
import triton.language as tl


@triton.jit
def operand(ptr, KEEP: tl.constexpr, WIDTH: tl.constexpr):
    """Load a [WIDTH, WIDTH] operand to keep it on chip, or return its address for `times` to load it for each tile."""
    if KEEP and ptr.dtype.element_ty != tl.float32:
        i = tl.arange(0, WIDTH)
        return tl.load(ptr + i[:, None] * WIDTH + i[None, :])
    else:
        return ptr


@triton.jit
def times(a, b, acc, TRANSPOSE: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr):
    """Return acc + a @ b, or acc + a @ b^T with TRANSPOSE; b is an `operand`.

    In fp32 the product is formed in pieces of 16 of the inner axis, because a long inner axis fills the registers.
    """
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
    """Return the logits u W with w an `operand`, or u itself if w is None (the maps without weights)."""
    if w is None:
        return u.to(tl.float32)
    else:
        return times(u, w, tl.zeros([u.shape[0], WIDTH], tl.float32), False, WIDTH, PRECISION)


@triton.jit
def floor_power(x):
    """Return 2^floor(log2 x) for x between 1e-25 and 1e25, else 1 (for 0, infinity and NaN, too)."""
    power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where((power > 1e-25) & (power < 1e25), power, 1.0)


@triton.jit
def split(x, DTYPE: tl.constexpr):
    """Split x into high + low, both in DTYPE, so that a 16-bit product keeps 16 bits of x or more."""
    high = x.to(DTYPE)
    return high, (x - high.to(tl.float32)).to(DTYPE)
