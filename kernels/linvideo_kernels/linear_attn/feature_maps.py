"""The feature maps phi on a tile of logits x, and their derivatives, in fp32.

"hedgehog" is [softmax(x), softmax(-x)], and "hedgehog_joint" is one softmax over [2x, -2x]. Both are computed one half
at a time, with SIGN 1 or -1, so that a tile of features is never wider than D. The other maps have a single half. If D
is less than the tile's width, the columns beyond it are padding, where phi is 0.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def features(x, SIGN: tl.constexpr, scale, D: tl.constexpr, WIDTH: tl.constexpr, FEATURE_MAP: tl.constexpr):
    """Return scale * phi for one half; scale is a number or one number per row.

    The cheapest exponential is exp2 of one fused multiply-add. It limits the logits of a softmax on a GPU: from 2^30 on
    the exact product in the multiply-add may exceed the rounded `top` by more than exp2 can take, and the row is NaN.
    """
    real = (tl.arange(0, WIDTH) < D)[None, :]
    scale = tl.zeros([x.shape[0]], tl.float32) + scale
    if FEATURE_MAP == "hedgehog_joint":
        top = tl.max(tl.abs(x), axis=1) * (2 * LOG2E)
        e = tl.exp2(x * (2 * SIGN * LOG2E) - top[:, None])
        other = tl.exp2(x * (-2 * SIGN * LOG2E) - top[:, None])
        if D < WIDTH:
            e = tl.where(real, e, 0.0)
            other = tl.where(real, other, 0.0)
        return e * (scale / (tl.sum(e, axis=1) + tl.sum(other, axis=1)))[:, None]
    elif FEATURE_MAP == "hedgehog" or FEATURE_MAP == "softmax":
        if D < WIDTH:
            x = tl.where(real, x, -SIGN * float("inf"))
        if SIGN == 1:
            top = tl.max(x, axis=1) * LOG2E
        else:
            top = tl.min(x, axis=1) * -LOG2E
        e = tl.exp2(x * (SIGN * LOG2E) - top[:, None])
        return e * (scale / tl.sum(e, axis=1))[:, None]
    elif FEATURE_MAP == "elu":
        # tl.where, not tl.minimum, which on a GPU returns the operand that is not NaN: a NaN would vanish.
        phi = tl.where(x > 0, x + 1.0, tl.exp2(tl.where(x > 0, 0.0, x) * LOG2E))
        if D < WIDTH:
            phi = tl.where(real, phi, 0.0)
        return phi * scale[:, None]
    elif FEATURE_MAP == "relu":
        return tl.where(x < 0, 0.0, x) * scale[:, None]  # written so that NaN stays NaN
    else:
        return x * scale[:, None]


@triton.jit
def pull_back(x, phi, g, FEATURE_MAP: tl.constexpr):
    """Map the gradient g of the features to that of SIGN * x, and return it with <phi, g> per row.

    For "hedgehog_joint" it is only phi * g: the caller adds the rest, which needs both halves.
    """
    if FEATURE_MAP == "elu":
        return g * tl.where(x > 0, 1.0, phi), tl.sum(phi * g, axis=1)
    elif FEATURE_MAP == "relu":
        return tl.where(x > 0, g, 0.0), tl.sum(phi * g, axis=1)
    elif FEATURE_MAP == "identity":
        return g, tl.sum(phi * g, axis=1)
    elif FEATURE_MAP == "hedgehog_joint":
        return phi * g, tl.sum(phi * g, axis=1)
    else:
        inner = tl.sum(phi * g, axis=1)
        return phi * (g - inner[:, None]), inner
