"""Rotary embedding in a kernel of its own: for the keys and, in training, for the queries, which the backward reads.

Without gradients, apply_state rotates the queries' tiles itself, which saves writing and reading them. The keys are
always rotated first: two programs read each tile of theirs, one for each half of the feature map, in a kernel that has
no registers left for angles. One round trip to memory is cheaper than rotating twice.
"""

import torch
import triton
import triton.language as tl

from linvideo_kernels.linear_attn.launch import SIZES, launch
from linvideo_kernels.linear_attn.side import Side, strides
from linvideo_kernels.linear_attn.tiles import head_rows, load_rows, rotate, store_rows, tile_of_program


@triton.jit(do_not_specialize=SIZES)
def rotate_rows(
    u_ptr, cos_ptr, sin_ptr, out_ptr, stride_ub, stride_un, stride_uh, stride_ob, stride_on, stride_oh,
    HEADS, N, splits,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotate one tile of one head. Limited by memory: it reads and writes each row once and forms no product."""
    batch, first, head, row, n, valid = tile_of_program(tl.program_id(0), HEADS, splits, N, BLOCK)
    u_ptr = head_rows(u_ptr, batch, first, head, stride_ub, stride_un, stride_uh, False)
    out_ptr = head_rows(out_ptr, batch, first, head, stride_ob, stride_on, stride_oh, False)
    u = load_rows(u_ptr, batch, head, row, N, None, stride_un, D, WIDTH, BLOCK, False)
    u = rotate(u, cos_ptr, sin_ptr, row, valid, 1.0, D, WIDTH)
    store_rows(out_ptr, u, row, valid, stride_on, D, WIDTH, BLOCK)


def rotated(side: Side) -> Side:
    """Return the side with its rows rotated and without angles."""
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
