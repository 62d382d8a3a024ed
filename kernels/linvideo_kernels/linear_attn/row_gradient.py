"""Gradients with respect to the rows u of one side (q or k) and to its feature weights, in two kernels.

map_grad takes the gradient back through the feature map to the logits x = u W. It computes the features again. With T
and c from prepare.py and t_f = T_f.y:
    queries  y = do: a = 1 / den, delta = do.(o - c) = a (sum_f phi_f t_f - eps do.c), dphi_f = a (t_f - delta z_f)
    keys     y = v - c: dphi_f = t_f + dz_f + T_f.c
A gradient g of den itself adds g z_f to dphi_f, which is the same as subtracting g / a from delta.

The queries' rows may also be one part of a sum with a normaliser of its own, as in window attention (window.py):
o = (G sum_f phi_f S_f + other terms) / total. Then a = G / total and do.o come from outside, delta = do.o - do.c, and
the gradient of log G is a (sum_f phi_f t_f - delta den).

The derivative of the map, `pull`, is linear in dphi, so the queries' dx is a (pull(t) - delta pull(z)). One pass over
the features therefore gives dx and also a and delta, which accumulate_state needs.

project_grad computes du = dx W^T, which overwrites dx, and dW = sum_n u_n^T dx_n.
"""

import torch
import triton
import triton.language as tl

from linvideo_kernels.linear_attn.feature_maps import features, pull_back
from linvideo_kernels.linear_attn.launch import SIZES, launch
from linvideo_kernels.linear_attn.products import logits, operand, times
from linvideo_kernels.linear_attn.side import Side, strides
from linvideo_kernels.linear_attn.tiles import head_rows, kept, load_rows, locate, rotate, store_rows


@triton.jit(do_not_specialize=SIZES)
def map_grad(
    u_ptr, w_ptr, y_ptr, state_ptr, stats_ptr, cos_ptr, sin_ptr, keep_ptr, r_ptr, cu_ptr, factors_ptr, den_grad_ptr,
    dot_ptr, dx_ptr,
    stride_ub, stride_un, stride_uh, stride_yb, stride_yn, stride_yh, stride_ob, stride_on, stride_oh,
    SEQUENCES, HEADS, N, splits, rows, factors_plane, scale, eps,
    D: tl.constexpr, WIDTH: tl.constexpr, SIGNS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    FEATURE_MAP: tl.constexpr, NORMALIZE: tl.constexpr, KEYS: tl.constexpr, KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write dx of one item and head and, for normalised queries, a and delta to factors_ptr.

    den_grad_ptr [B, H, N] holds the gradients of the denominators. With dot_ptr [B, H, N], which holds do.o of each
    row, the normaliser comes from outside: a is read from factors_ptr, and the gradient of log G goes to its third
    plane.

    W and, with KEEP, both halves of T stay on chip. For each tile the loop loads u and y, computes the logits once, and
    for each half phi and t = y T^T. The row sums <phi, t> and <phi, z> give delta and den only after both halves; so
    pull(t) and pull(z) are accumulated separately and combined at the end, which saves a second pass over q and do.
    Without weights dx is already du, and the rotary embedding is undone here.

    Roofline, per row and head: 6 D^2 flops and, in 16 bits, 6 D bytes for u, y and dx, that is D flops per byte, so at
    D = 128 memory would be the limit. In the model of kernels/README.md it is instead the time of one program: with
    hedgehog only one fits on a Hopper SM, and its products, exponentials and row sums follow each other.
    """
    pid = tl.program_id(0)
    head = pid % HEADS
    item = pid // HEADS
    sequence, batch, first, length, start, stop = locate(item, cu_ptr, SEQUENCES, N, splits, rows)
    u_ptr = head_rows(u_ptr, batch, first, head, stride_ub, stride_un, stride_uh, False)
    y_ptr = head_rows(y_ptr, batch, first, head, stride_yb, stride_yn, stride_yh, False)
    dx_ptr = head_rows(dx_ptr, batch, first, head, stride_ob, stride_on, stride_oh, False)
    at = (batch * HEADS + head).to(tl.int64) * N + first
    key_head = (sequence * (HEADS // GROUP) + head // GROUP).to(tl.int64)
    state_ptr += key_head * SIGNS * WIDTH * WIDTH
    stats_ptr += key_head * (2 * SIGNS + 2) * WIDTH
    cols = tl.arange(0, WIDTH)
    w = w_ptr
    if w_ptr is not None:
        w = operand(w_ptr + head * WIDTH * WIDTH, True, WIDTH)
    state = operand(state_ptr, KEEP, WIDTH)
    state2 = operand(state_ptr + (SIGNS - 1) * WIDTH * WIDTH, KEEP, WIDTH)  # the second half, if there is one
    factor = tl.load(stats_ptr + (2 * SIGNS + 1) * WIDTH) * scale
    mixed = 1.0
    if r_ptr is not None:
        mixed = 1.0 - tl.load(r_ptr).to(tl.float32)
    for row in range(start, stop, BLOCK):
        n = row + tl.arange(0, BLOCK)
        valid = n < length
        u = load_rows(u_ptr, batch, head, row, length, None, stride_un, D, WIDTH, BLOCK, False)
        y = load_rows(y_ptr, batch, head, row, length, None, stride_yn, D, WIDTH, BLOCK, False)
        center = tl.load(stats_ptr + 2 * SIGNS * WIDTH + cols)
        y_center = tl.sum(y.to(tl.float32) * center[None, :], axis=1)
        if KEYS:
            y = (y.to(tl.float32) - center[None, :]).to(u.dtype)
        x = logits(u, w, WIDTH, PRECISION)
        dx = tl.zeros([BLOCK, WIDTH], tl.float32)  # pull(t)
        dz = tl.zeros([BLOCK, WIDTH], tl.float32)  # pull(z)
        both = tl.zeros([BLOCK, WIDTH], tl.float32)  # for hedgehog_joint: phi of the first half minus the second
        inner = tl.zeros([BLOCK], tl.float32)  # <phi, t>
        den = tl.zeros([BLOCK], tl.float32)  # <phi, z>
        for half in tl.static_range(SIGNS):
            phi = features(x, 1 - 2 * half, 1.0, D, WIDTH, FEATURE_MAP)
            t = tl.zeros([BLOCK, WIDTH], tl.float32)
            t = times(y, state if half == 0 else state2, t, True, WIDTH, PRECISION)
            if KEYS:
                t += tl.load(stats_ptr + (SIGNS + half) * WIDTH + cols)[None, :]
            t, phi_t = pull_back(x, phi, t, FEATURE_MAP)
            dx = dx + t if half == 0 else dx - t  # the second half is phi(-x), hence the minus
            inner += phi_t
            if FEATURE_MAP == "hedgehog_joint":
                both = both + phi if half == 0 else both - phi
            if NORMALIZE and not KEYS:
                z, phi_z = pull_back(x, phi, tl.load(stats_ptr + half * WIDTH + cols)[None, :], FEATURE_MAP)
                dz = dz + z if half == 0 else dz - z
                den += phi_z
        if NORMALIZE and not KEYS:
            if dot_ptr is None:
                a = 1.0 / (den + eps)
                delta = (inner * factor - eps * y_center) * a
                if den_grad_ptr is not None:
                    delta -= tl.load(den_grad_ptr + at + n, valid, 0.0) * (den + eps)
                tl.store(factors_ptr + at + n, a, valid)
            else:
                a = tl.load(factors_ptr + at + n, valid, 0.0)
                delta = tl.load(dot_ptr + at + n, valid, 0.0) - y_center
            tl.store(factors_ptr + factors_plane + at + n, delta, valid)
            dx = dx * factor - delta[:, None] * dz
            inner = inner * factor - delta * den
            if dot_ptr is not None:
                tl.store(factors_ptr + 2 * factors_plane + at + n, a * inner, valid)
            a *= mixed
        else:
            if factors_ptr is not None:  # mix_grad reads do.o here
                tl.store(factors_ptr + factors_plane + at + n, inner * factor, valid)
            a = tl.zeros([BLOCK], tl.float32) + factor * mixed
        if FEATURE_MAP == "hedgehog_joint":
            dx = 2.0 * (dx - inner[:, None] * both)
        dx = dx * a[:, None]
        if keep_ptr is not None:
            dx = tl.where(kept(keep_ptr, batch, N, first + n, valid)[:, None], dx, 0.0)
        if cos_ptr is not None and w_ptr is None:
            dx = rotate(dx, cos_ptr, sin_ptr, first + row, valid, -1.0, D, WIDTH)
        store_rows(dx_ptr, dx, row, valid, stride_on, D, WIDTH, BLOCK)


@triton.jit(do_not_specialize=SIZES)
def project_grad(
    u_ptr, w_ptr, cos_ptr, sin_ptr, keep_ptr, dx_ptr, dw_partial_ptr,
    stride_ub, stride_un, stride_uh, stride_ob, stride_on, stride_oh,
    SEQUENCES, HEADS, N, splits, rows,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Overwrite dx with du, rotated back, and write one partial dW for each item and head.

    Packed sequences count as one here, because rows of different sequences share W. W and the accumulator dW stay on
    chip. Each tile loads u and dx, adds u^T dx to dW, and stores dx W^T.

    Roofline, per row and head: 4 D^2 flops and, in 16 bits, 6 D bytes to read u and dx and to write du. That is 2/3 D
    flops per byte, 85 at D = 128, so memory is the limit.
    """
    pid = tl.program_id(0)
    head = pid % HEADS
    item = pid // HEADS
    sequence, batch, first, length, start, stop = locate(item, None, SEQUENCES, N, splits, rows)
    u_ptr = head_rows(u_ptr, batch, first, head, stride_ub, stride_un, stride_uh, False)
    dx_ptr = head_rows(dx_ptr, batch, first, head, stride_ob, stride_on, stride_oh, False)
    cols = tl.arange(0, WIDTH)
    w_ptr += head * WIDTH * WIDTH
    # The three products of "tf32x3" fill the registers unless formed in pieces; "ieee" spills if it is.
    IN_PIECES: tl.constexpr = PRECISION == "tf32x3"
    w = w_ptr  # [in, out]
    if not IN_PIECES:
        w = tl.load(w_ptr + cols[:, None] * WIDTH + cols[None, :])
    dw = tl.zeros([WIDTH, WIDTH], tl.float32)  # [in, out]
    for row in range(start, stop, BLOCK):
        n = row + tl.arange(0, BLOCK)
        valid = n < length
        counts = valid
        if keep_ptr is not None:
            counts = kept(keep_ptr, batch, N, n, valid)
        u = load_rows(u_ptr, batch, head, row, length, counts, stride_un, D, WIDTH, BLOCK, False)
        dx = load_rows(dx_ptr, batch, head, row, length, valid, stride_on, D, WIDTH, BLOCK, False)
        dw = tl.dot(tl.trans(u), dx, dw, input_precision=PRECISION)
        if IN_PIECES:
            du = times(dx, w, tl.zeros([BLOCK, WIDTH], tl.float32), True, WIDTH, PRECISION)
        else:
            du = tl.dot(dx, tl.trans(w), input_precision=PRECISION)
        if cos_ptr is not None:
            du = rotate(du, cos_ptr, sin_ptr, first + row, valid, -1.0, D, WIDTH)
        store_rows(dx_ptr, du, row, valid, stride_on, D, WIDTH, BLOCK)
    at = pid.to(tl.int64) * D * D + cols[:, None] * D + cols[None, :]
    tl.store(dw_partial_ptr + at, dw, (cols < D)[:, None] & (cols < D)[None, :])


def row_gradient(
    side: Side, y, state, stats, *,
    keys, normalize, rope=None, scale=1.0, eps=0.0, r=None, factors=None, den_grad=None, dot=None,
):  # fmt: skip
    """Return du, like side.u, and the gradient of the weight [H, D, D] in fp32 (None without weights).

    side.u has been rotated by rope = (cos, sin), and du is the gradient of the rows before that rotation. If given,
    factors [2, B, H, N] receives a and delta. With dot [B, H, N], which is do.o, it is [3, B, H, N] and holds a
    already; delta and the gradient of log G are added. den_grad [B, H, N] is the gradient of den.
    """
    u = side.u
    batch, length, heads, dim = u.shape
    if rope is not None:  # the kernels rotate the gradient back
        side = side._replace(cos=rope[0].contiguous(), sin=rope[1].contiguous())
    dx = side.new_rows()
    tile = side.tile("map_grad", keys=keys)
    work = side.work(tile)
    width = state.shape[-1]
    launch(
        map_grad, work.items * heads, tile, u.device,
        u_ptr=u, w_ptr=side.weight, y_ptr=y, state_ptr=state, stats_ptr=stats, cos_ptr=side.cos, sin_ptr=side.sin,
        keep_ptr=side.keep, r_ptr=r, cu_ptr=side.cu_seqlens, factors_ptr=factors, den_grad_ptr=den_grad,
        dot_ptr=dot, dx_ptr=dx, **strides("u", u), **strides("y", y), **strides("o", dx),
        SEQUENCES=work.sequences, HEADS=heads, N=length, splits=work.splits, rows=work.rows,
        factors_plane=0 if factors is None else factors.stride(0), scale=scale, eps=eps,
        D=dim, WIDTH=width, SIGNS=side.signs, GROUP=heads // state.shape[1], BLOCK=tile.block,
        FEATURE_MAP=side.feature_map, NORMALIZE=normalize, KEYS=keys, KEEP=tile.keeps,
        PRECISION=side.precision,
    )  # fmt: skip
    if side.weight is None:
        return dx, None
    # project_grad reads all rows as one sequence, and 0 times a NaN in a row of no sequence would reach dW.
    side = side._replace(keep=side.covered(), cu_seqlens=None)
    tile = side.tile("project_grad")
    work = side.work(tile, partials=True)
    dw_partial = torch.empty((work.items, heads, dim, dim), dtype=torch.float32, device=u.device)
    launch(
        project_grad, work.items * heads, tile, u.device,
        u_ptr=u, w_ptr=side.weight, cos_ptr=side.cos, sin_ptr=side.sin, keep_ptr=side.keep, dx_ptr=dx,
        dw_partial_ptr=dw_partial, **strides("u", u), **strides("o", dx),
        SEQUENCES=batch, HEADS=heads, N=length, splits=work.splits, rows=work.rows,
        D=dim, WIDTH=width, BLOCK=tile.block, PRECISION=side.precision,
    )  # fmt: skip
    return dx, dw_partial.sum(0)  # a sum over one axis has the same order in every run
