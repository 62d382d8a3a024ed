"""Feature maps phi on a tile of logits, and their derivatives. fp32 in, fp32 out.

"hedgehog" has two halves, softmax(x) and softmax(-x), taken one at a time: sign 1 or -1. The other maps have one.
Where D is below the tile's width the columns beyond are padding: phi is 0 there.
"""

import triton
import triton.language as tl


@triton.jit
def matmul(a, b_ptr, stride_k, stride_n, acc, WIDTH: tl.constexpr):
    """acc + a @ b, b [WIDTH, WIDTH] in memory; fp32 in pieces, as on CUDA cores a long inner axis fills registers."""
    n = tl.arange(0, WIDTH)
    if a.dtype == tl.float32:
        CHUNK: tl.constexpr = 16
        k = tl.arange(0, CHUNK)
        parts = tl.reshape(a, [a.shape[0], WIDTH // CHUNK, CHUNK])
        index = tl.arange(0, WIDTH // CHUNK)[None, :, None]
        for i in range(WIDTH // CHUNK):
            part = tl.sum(tl.where(index == i, parts, 0.0), axis=1)
            b = tl.load(b_ptr + (i * CHUNK + k)[:, None] * stride_k + n[None, :] * stride_n)
            acc = tl.dot(part, b, acc, input_precision="ieee")
    else:
        b = tl.load(b_ptr + n[:, None] * stride_k + n[None, :] * stride_n)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit
def load_weight(w_ptr, like, WIDTH: tl.constexpr, FEATURE_MAP: tl.constexpr):
    """W of the head, kept on chip by 16-bit tiles; 0 where there is none or `matmul` reads it in pieces."""
    w = 0
    if FEATURE_MAP == "hedgehog" and like != tl.float32:
        i = tl.arange(0, WIDTH)
        w = tl.load(w_ptr + i[:, None] * WIDTH + i[None, :])  # [in, out]
    return w


@triton.jit
def logits(u, w, w_ptr, WIDTH: tl.constexpr, FEATURE_MAP: tl.constexpr):
    if FEATURE_MAP == "hedgehog":
        if u.dtype == tl.float32:
            x = matmul(u, w_ptr, WIDTH, 1, tl.zeros([u.shape[0], WIDTH], tl.float32), WIDTH)
        else:
            x = tl.dot(u, w, input_precision="ieee")
    else:
        x = u.to(tl.float32)
    return x  # [BLOCK, WIDTH]


@triton.jit
def features(x, sign, D: tl.constexpr, WIDTH: tl.constexpr, FEATURE_MAP: tl.constexpr):
    real = (tl.arange(0, WIDTH) < D)[None, :]
    if FEATURE_MAP == "hedgehog" or FEATURE_MAP == "softmax":
        if FEATURE_MAP == "hedgehog":
            x = x * sign
        if D < WIDTH:
            x = tl.where(real, x, float("-inf"))
        e = tl.exp(x - tl.max(x, axis=1)[:, None])
        phi = e * (1.0 / tl.sum(e, axis=1))[:, None]
    elif FEATURE_MAP == "elu":
        # where, not tl.minimum: on a GPU that returns the operand which is not NaN, and a NaN would vanish.
        phi = tl.where(x > 0, x + 1.0, tl.exp(tl.where(x > 0, 0.0, x)))
        if D < WIDTH:
            phi = tl.where(real, phi, 0.0)
    elif FEATURE_MAP == "relu":
        phi = tl.where(x < 0, 0.0, x)  # keeps a NaN
    else:
        phi = x
    return phi  # [BLOCK, WIDTH]


@triton.jit
def features_grad(x, phi, dphi, sign, FEATURE_MAP: tl.constexpr):
    """Gradient with respect to x; for one half of "hedgehog"."""
    if FEATURE_MAP == "hedgehog" or FEATURE_MAP == "softmax":
        dx = phi * (dphi - tl.sum(phi * dphi, axis=1)[:, None])
        if FEATURE_MAP == "hedgehog":
            dx = dx * sign
    elif FEATURE_MAP == "elu":
        dx = dphi * tl.where(phi > 1.0, 1.0, phi)  # the slope is 1 above 0 and exp(x) = phi below
    elif FEATURE_MAP == "relu":
        dx = tl.where(x > 0, dphi, 0.0)  # not a product: dphi can be infinite where no key is active
    else:
        dx = dphi
    return dx  # [BLOCK, WIDTH]


@triton.jit
def split(x, DTYPE: tl.constexpr):
    """x = high + low with both in DTYPE: 16 bits and more of x survive a 16-bit dot."""
    high = x.to(DTYPE)
    return high, (x - high.to(tl.float32)).to(DTYPE)
