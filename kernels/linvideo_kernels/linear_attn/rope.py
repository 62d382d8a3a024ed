"""Rotary embedding of rows on its own: of the keys, and in training of the queries, which the backward wants in memory.

Without gradients apply_state turns the queries' tiles itself, which saves writing and reading them. The keys' tiles are
read by a program for each half of the feature map, in a kernel without room for angles: turning them first is cheaper.
"""

import torch
import triton
import triton.language as tl

from linvideo_kernels.linear_attn.launch import SIZES, launch
from linvideo_kernels.linear_attn.side import Side, strides
from linvideo_kernels.linear_attn.tiles import head_rows, load_rows, rotate, store_rows


@triton.jit(do_not_specialize=SIZES)
def rotate_rows(
    u_ptr, cos_ptr, sin_ptr, out_ptr, stride_ub, stride_un, stride_uh, stride_ob, stride_on, stride_oh,
    HEADS, N, splits,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)  # the heads of a block of rows side by side: they find their angles in L2
    head = pid % HEADS
    batch = pid // HEADS // splits
    row = pid // HEADS % splits * BLOCK
    n = row + tl.arange(0, BLOCK)
    first = tl.full([], 0, tl.int32)
    u_ptr = head_rows(u_ptr, batch, first, head, stride_ub, stride_un, stride_uh, False)
    out_ptr = head_rows(out_ptr, batch, first, head, stride_ob, stride_on, stride_oh, False)
    u = load_rows(u_ptr, batch, head, row, N, None, stride_un, D, WIDTH, BLOCK, False)
    u = rotate(u, cos_ptr, sin_ptr, row, n < N, 1.0, D, WIDTH)
    store_rows(out_ptr, u, row, n < N, stride_on, D, WIDTH, BLOCK)


def rotated(side: Side) -> Side:
    """The same rows, rotated, and no angles any more."""
    u = side.u
    batch, length, heads, dim = u.shape
    out = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    tile = side.tile("rotate_rows")
    splits = -(-length // tile.block)
    launch(
        rotate_rows, batch * splits * heads, tile, u.device,
        u_ptr=u, cos_ptr=side.cos, sin_ptr=side.sin, out_ptr=out, **strides("u", u), **strides("o", out),
        HEADS=heads, N=length, splits=splits,
        D=dim, WIDTH=side.width, BLOCK=tile.block,
    )  # fmt: skip
    return side._replace(u=out, cos=None, sin=None)
