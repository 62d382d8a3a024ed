"""Window attention's merge of softmax and linear attention under one normaliser, and what its backward needs per row.

Softmax over some of the keys gives O and the log-sum-exp L; softmax over others (the common keys, which are in every
window) may give a second pair. Linear attention over the rest gives its output O_l and denominator den, and a learned
gain g per head. With T = sum of exp(L) + g den:
    o = sum of exp(L) / T O + g den / T O_l,    lse = log T.
The backward of linear attention as a part of that sum needs do.o and a = g / T of each row (row_gradient.py).
"""

import torch
import triton
import triton.language as tl

from linvideo_kernels.linear_attn import configs
from linvideo_kernels.linear_attn.launch import SIZES, launch, target_of
from linvideo_kernels.linear_attn.side import aligned, strides
from linvideo_kernels.linear_attn.tiles import head_rows, load_rows, store_rows, tile_of_program


@triton.jit(do_not_specialize=SIZES)
def merge_rows(
    out_ptr, lse_ptr, common_ptr, common_lse_ptr, far_ptr, den_ptr, log_gain_ptr,
    stride_ob, stride_on, stride_oh, stride_cb, stride_cn, stride_ch, stride_fb, stride_fn, stride_fh,
    HEADS, N, splits,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Merge one tile of one head into out_ptr and lse_ptr, which hold the windows' softmax.

    Limited by memory: it reads each part and writes the result once.
    """
    batch, first, head, row, n, valid = tile_of_program(tl.program_id(0), HEADS, splits, N, BLOCK)
    at = (batch * HEADS + head).to(tl.int64) * N
    out_ptr = head_rows(out_ptr, batch, first, head, stride_ob, stride_on, stride_oh, False)
    near = tl.load(lse_ptr + at + n, valid, 0.0)
    top = near
    if common_ptr is not None:
        common = tl.load(common_lse_ptr + at + n, valid, 0.0)
        top = tl.maximum(top, common)
    if far_ptr is not None:
        far = tl.log(tl.load(den_ptr + at + n, valid, 0.0)) + tl.load(log_gain_ptr + head).to(tl.float32)
        top = tl.maximum(top, far)
    sums = tl.exp(near - top)
    if common_ptr is not None:
        sums += tl.exp(common - top)
    if far_ptr is not None:
        sums += tl.exp(far - top)
    total = top + tl.log(sums)
    out = load_rows(out_ptr, batch, head, row, N, None, stride_on, D, WIDTH, BLOCK, False).to(tl.float32)
    out *= tl.exp(near - total)[:, None]
    if common_ptr is not None:
        common_ptr = head_rows(common_ptr, batch, first, head, stride_cb, stride_cn, stride_ch, False)
        part = load_rows(common_ptr, batch, head, row, N, None, stride_cn, D, WIDTH, BLOCK, False)
        out += tl.exp(common - total)[:, None] * part.to(tl.float32)
    if far_ptr is not None:
        far_ptr = head_rows(far_ptr, batch, first, head, stride_fb, stride_fn, stride_fh, False)
        part = load_rows(far_ptr, batch, head, row, N, None, stride_fn, D, WIDTH, BLOCK, False)
        out += tl.exp(far - total)[:, None] * part.to(tl.float32)
    store_rows(out_ptr, out, row, valid, stride_on, D, WIDTH, BLOCK)
    tl.store(lse_ptr + at + n, total, valid)


@triton.jit(do_not_specialize=SIZES)
def merge_factors(
    do_ptr, out_ptr, lse_ptr, log_gain_ptr, dot_ptr, share_ptr,
    stride_gb, stride_gn, stride_gh, stride_ob, stride_on, stride_oh,
    HEADS, N, splits,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write do.o and g / T of one tile of one head. Limited by memory: it reads do and o once."""
    batch, first, head, row, n, valid = tile_of_program(tl.program_id(0), HEADS, splits, N, BLOCK)
    at = (batch * HEADS + head).to(tl.int64) * N
    do_ptr = head_rows(do_ptr, batch, first, head, stride_gb, stride_gn, stride_gh, False)
    out_ptr = head_rows(out_ptr, batch, first, head, stride_ob, stride_on, stride_oh, False)
    do = load_rows(do_ptr, batch, head, row, N, None, stride_gn, D, WIDTH, BLOCK, False).to(tl.float32)
    out = load_rows(out_ptr, batch, head, row, N, None, stride_on, D, WIDTH, BLOCK, False).to(tl.float32)
    tl.store(dot_ptr + at + n, tl.sum(do * out, axis=1), valid)
    lse = tl.load(lse_ptr + at + n, valid, 0.0)
    # Where the far part has any weight, T > g den keeps g / T below e^60. Elsewhere it is multiplied by 0.
    share = tl.minimum(tl.load(log_gain_ptr + head).to(tl.float32) - lse, 60.0)
    tl.store(share_ptr + at + n, tl.exp(share), valid)


def merge(out, lse, common=None, far=None, log_gain=None) -> None:
    """Merge the other parts into out [B, N, H, D] and lse [B, H, N], in place.

    Args:
        out, lse: Softmax of each row over its window, and its log-sum-exp, fp32 and contiguous. Afterwards they hold
            the merged output and the log of the whole normaliser.
        common: Pair (O, L) like (out, lse) of softmax over further keys.
        far: Pair (O_l, den) of linear attention like (out, lse).
        log_gain: log g [H].
    """
    common, common_lse = (None, None) if common is None else common
    far, den = (None, None) if far is None else far
    common, far = (None if x is None else aligned(x) for x in (common, far))
    _launch(
        merge_rows, out, out_ptr=out, lse_ptr=lse, common_ptr=common, common_lse_ptr=common_lse, far_ptr=far,
        den_ptr=den, log_gain_ptr=log_gain, **strides("o", out), **strides("c", common), **strides("f", far),
    )  # fmt: skip


def factors(do, out, lse, log_gain):
    """Return do.o and g / T, both [B, H, N] in fp32, of the merged out [B, N, H, D] and lse [B, H, N]."""
    do, out = aligned(do), aligned(out)
    dot, share = (torch.empty(lse.shape, dtype=torch.float32, device=lse.device) for _ in range(2))
    _launch(
        merge_factors, out, do_ptr=do, out_ptr=out, lse_ptr=lse, log_gain_ptr=log_gain, dot_ptr=dot, share_ptr=share,
        **strides("g", do), **strides("o", out),
    )  # fmt: skip
    return dot, share


def _launch(kernel, rows, **arguments) -> None:
    batch, length, heads, dim = rows.shape
    tile = configs.tile(kernel.__name__, dim, rows.dtype, target_of(rows).capability, "")
    splits = -(-length // tile.block)
    launch(
        kernel, batch * splits * heads, tile, rows.device, **arguments, HEADS=heads, N=length, splits=splits,
        D=dim, WIDTH=configs.padded(dim), BLOCK=tile.block,
    )  # fmt: skip
