"""Gradients of the mixture o = r softmax_out + (1 - r) lin with respect to softmax_out and r.

d softmax_out = r do and dr = sum do.(softmax_out - lin). The linear output lin is not needed for that: per row,
do.lin = delta + do.c, where map_grad has computed delta (row_gradient.py) and c is the mean of v (prepare.py).
"""

import torch
import triton
import triton.language as tl

from linvideo_kernels.linear_attn import configs
from linvideo_kernels.linear_attn.launch import SIZES, launch
from linvideo_kernels.linear_attn.side import Side, aligned, strides
from linvideo_kernels.linear_attn.tiles import head_rows, load_rows, locate, store_rows


@triton.jit(do_not_specialize=SIZES)
def mix_grad(
    do_ptr, softmax_ptr, r_ptr, stats_ptr, factors_ptr, cu_ptr, dsoftmax_ptr, dr_partial_ptr,
    stride_gb, stride_gn, stride_gh, stride_mb, stride_mn, stride_mh, stride_ob, stride_on, stride_oh,
    SEQUENCES, HEADS, N, splits, rows, factors_plane,
    D: tl.constexpr, WIDTH: tl.constexpr, SIGNS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write d softmax_out, and one partial dr per item and head.

    Limited by memory: it reads do and softmax_out, writes d softmax_out, and forms no product.
    """
    pid = tl.program_id(0)
    head = pid % HEADS
    item = pid // HEADS
    sequence, batch, first, length, start, stop = locate(item, cu_ptr, SEQUENCES, N, splits, rows)
    do_ptr = head_rows(do_ptr, batch, first, head, stride_gb, stride_gn, stride_gh, False)
    softmax_ptr = head_rows(softmax_ptr, batch, first, head, stride_mb, stride_mn, stride_mh, False)
    dsoftmax_ptr = head_rows(dsoftmax_ptr, batch, first, head, stride_ob, stride_on, stride_oh, False)
    factors_ptr += factors_plane + (batch * HEADS + head).to(tl.int64) * N + first
    key_head = (sequence * (HEADS // GROUP) + head // GROUP).to(tl.int64)
    center = tl.load(stats_ptr + (key_head * (2 * SIGNS + 2) + 2 * SIGNS) * WIDTH + tl.arange(0, WIDTH))
    r = tl.load(r_ptr).to(tl.float32)
    dr = tl.zeros([BLOCK], tl.float32)
    for row in range(start, stop, BLOCK):
        n = row + tl.arange(0, BLOCK)
        valid = n < length
        do = load_rows(do_ptr, batch, head, row, length, valid, stride_gn, D, WIDTH, BLOCK, False).to(tl.float32)
        softmax_out = load_rows(softmax_ptr, batch, head, row, length, valid, stride_mn, D, WIDTH, BLOCK, False)
        dr += tl.sum(do * (softmax_out.to(tl.float32) - center[None, :]), axis=1)
        dr -= tl.load(factors_ptr + n, valid, 0.0)
        store_rows(dsoftmax_ptr, r * do, row, valid, stride_on, D, WIDTH, BLOCK)
    tl.store(dr_partial_ptr + pid, tl.sum(dr, axis=0))


def mix_gradient(side: Side, do, softmax_out, r, stats, factors):
    """Return the gradients of softmax_out and of r, the latter [1] in fp32.

    Args:
        side: The queries.
        do, softmax_out: Gradient of the output and softmax attention, [B, N, H, D].
        r: The mixing scalar, one element.
        stats: Statistics of the prepared state (prepare.py).
        factors: [2, B, H, N] as map_grad has written it; delta is the second plane.
    """
    softmax_out = aligned(softmax_out)
    dsoftmax = side.new_rows()
    _, length, heads, dim = do.shape
    tile = side.tile("mix_grad")
    work = side.work(tile)
    dr_partial = torch.empty(work.items * heads, dtype=torch.float32, device=do.device)
    launch(
        mix_grad, work.items * heads, tile, do.device,
        do_ptr=do, softmax_ptr=softmax_out, r_ptr=r, stats_ptr=stats, factors_ptr=factors, cu_ptr=side.cu_seqlens,
        dsoftmax_ptr=dsoftmax, dr_partial_ptr=dr_partial,
        **strides("g", do), **strides("m", softmax_out), **strides("o", dsoftmax),
        SEQUENCES=work.sequences, HEADS=heads, N=length, splits=work.splits, rows=work.rows,
        factors_plane=factors.stride(0),
        D=dim, WIDTH=configs.padded(dim), SIGNS=side.signs, GROUP=heads // stats.shape[1], BLOCK=tile.block,
    )  # fmt: skip
    return dsoftmax, dr_partial.sum(0, keepdim=True)
