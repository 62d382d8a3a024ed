"""The state of linear attention, S = sum_n phi(u_n)^T y_n [F, D] and z = sum_n phi(u_n) [F], in fp32.

Forward: u = k, y = v. Backward (row factors given): u = q, y = do, and with a = 1 / den and delta = do.(o - c)
    dS_f = sum_n a_n phi_nf do_n,    dz_f = -sum_n a_n delta_n phi_nf - dS_f.c.

accumulate_state writes one partial S and z per work item, head and half of the feature map; reduce_state sums them in a
fixed order, over the query heads of a key head too. Features are rounded to u's dtype once, for S and z alike.
"""

import torch
import triton
import triton.language as tl

from linvideo_kernels.linear_attn import configs
from linvideo_kernels.linear_attn.feature_maps import features
from linvideo_kernels.linear_attn.launch import SIZES, launch
from linvideo_kernels.linear_attn.products import floor_power, logits, operand, split
from linvideo_kernels.linear_attn.side import Side, descriptor, expanded, strides
from linvideo_kernels.linear_attn.tiles import head_rows, kept, load_rows, locate


@triton.jit(do_not_specialize=SIZES)
def accumulate_state(
    u_ptr, w_ptr, y_ptr, keep_ptr, factors_ptr, gain_ptr, cu_ptr, partial_ptr, z_partial_ptr,
    stride_ub, stride_un, stride_uh, stride_yb, stride_yn, stride_yh,
    SEQUENCES, HEADS, N, splits, rows, factors_plane,
    D: tl.constexpr, WIDTH: tl.constexpr, SIGNS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    FEATURE_MAP: tl.constexpr, ROOM: tl.constexpr, VALUE_FIRST: tl.constexpr, Z_BY_DOT: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial S [f, d] and z of one item, head and half; factors_ptr [2, B, H, N]: a and delta of each row.

    gain_ptr, the forward's z, multiplies the features: fp16 then holds shares of o, at most 1, and not phi / den.
    """
    # A descriptor knows neither a sequence's first row and length nor which keys are left out.
    tl.static_assert(not TMA or (cu_ptr is None and keep_ptr is None))
    pid = tl.program_id(0)  # the two halves of a head side by side: the second finds its rows in L2
    half = pid % SIGNS
    head = pid // SIGNS % HEADS
    item = pid // SIGNS // HEADS
    sequence, batch, first, length, start, stop = locate(item, cu_ptr, SEQUENCES, N, splits, rows)
    u_ptr = head_rows(u_ptr, batch, first, head, stride_ub, stride_un, stride_uh, TMA)
    y_ptr = head_rows(y_ptr, batch, first, head, stride_yb, stride_yn, stride_yh, TMA)
    at = (batch * HEADS + head).to(tl.int64) * N + first  # of a row in factors_ptr
    cols = tl.arange(0, WIDTH)
    w = w_ptr
    if w_ptr is not None:
        w = operand(w_ptr + head * WIDTH * WIDTH, True, WIDTH)
        if w_ptr.dtype.element_ty != tl.float32:
            w = (w * (1.0 - 2.0 * half)).to(w.dtype)  # the half's sign, exact
    if gain_ptr is not None:
        gain_ptr += ((sequence * (HEADS // GROUP) + head // GROUP) * SIGNS + half).to(tl.int64) * D
    state = tl.zeros([WIDTH, WIDTH], tl.float32)  # [d, f] value-first, else [f, d]
    if Z_BY_DOT:
        sums = tl.zeros([16, WIDTH], tl.float32)  # rows 0 and 1 together are z
        one = (tl.arange(0, 16) == 0)[:, None]
        two = (tl.arange(0, 16) == 1)[:, None]
    else:  # wgmma's layout gives a thread rows n and n + 8 of 16: their sum moves nothing between threads
        sums = tl.zeros([BLOCK // 16, 8, WIDTH], tl.float32)
    for row in range(start, stop, BLOCK):
        n = row + tl.arange(0, BLOCK)
        valid = n < length
        keep = None
        if keep_ptr is not None:
            keep = kept(keep_ptr, batch, N, first + n, valid)
            valid = keep
        u = load_rows(u_ptr, batch, head, row, length, keep, stride_un, D, WIDTH, BLOCK, TMA)
        y = load_rows(y_ptr, batch, head, row, length, keep, stride_yn, D, WIDTH, BLOCK, TMA)
        x = logits(u, w, WIDTH, PRECISION)
        if w_ptr is not None and u.dtype == tl.float32:
            x *= 1.0 - 2.0 * half
        factor = tl.where(valid, ROOM, 0.0)  # rows that do not count have no features
        if factors_ptr is not None:
            factor *= tl.load(factors_ptr + at + n, valid, 0.0)
        phi = features(x, 1, factor, D, WIDTH, FEATURE_MAP)
        if gain_ptr is not None:
            phi *= tl.load(gain_ptr + cols, cols < D, 0.0)[None, :]
        phi = phi.to(u.dtype)
        if VALUE_FIRST:
            state = tl.dot(tl.trans(y), phi, state, input_precision=PRECISION)
        else:
            state = tl.dot(tl.trans(phi), y, state, input_precision=PRECISION)
        if Z_BY_DOT:
            multipliers = tl.where(one, 1.0, tl.zeros([16, BLOCK], tl.float32)).to(u.dtype)
            power = 1.0
            if factors_ptr is not None:
                delta = -tl.load(factors_ptr + factors_plane + at + n, valid, 0.0)
                if u.dtype == tl.float16:  # a sum over D products of do: it may leave the range that do is in
                    power = floor_power(tl.max(tl.abs(delta), axis=0)) / 16384.0
                high, low = split(delta / power, u.dtype)
                multipliers = tl.where(one, high[None, :], tl.where(two, low[None, :], 0.0)).to(u.dtype)
            sums = tl.dot(multipliers, phi, sums / power, input_precision=PRECISION) * power
        else:
            weighed = phi.to(tl.float32)
            if factors_ptr is not None:
                weighed *= -tl.load(factors_ptr + factors_plane + at + n, valid, 0.0)[:, None]
            sums += tl.sum(tl.reshape(weighed, [BLOCK // 16, 2, 8, WIDTH]), axis=1)
    if VALUE_FIRST:
        state = tl.trans(state)
    out = pid.to(tl.int64) * WIDTH
    tl.store(partial_ptr + out * WIDTH + cols[:, None] * WIDTH + cols[None, :], state)
    if not Z_BY_DOT:
        sums = tl.sum(sums, axis=1)
    tl.store(z_partial_ptr + out + cols, tl.sum(sums, axis=0))


@triton.jit(do_not_specialize=SIZES)
def reduce_state(
    partial_ptr, z_partial_ptr, gain_ptr, stats_ptr, r_ptr, cu_ptr, state_ptr, z_ptr,
    HEADS, splits, rows, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, SIGNS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    BACKWARD: tl.constexpr,
):  # fmt: skip
    """scale times the sum of a sequence's partials, for ROWS features of one key head.

    BACKWARD divides by the gain that accumulate_state multiplied with, takes the center c in stats_ptr out of dz (none
    without normalisation: dz = 0), and multiplies by 1 - r where the output was mixed.
    """
    pid = tl.program_id(0)
    chunks = SIGNS * (WIDTH // ROWS)
    head = pid // chunks  # of all sequences' key heads
    half = pid % chunks // (WIDTH // ROWS)
    f = pid % (WIDTH // ROWS) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    sequence, key_head = head // (HEADS // GROUP), head % (HEADS // GROUP)
    if cu_ptr is None:
        item, count = sequence * splits, splits
    else:
        first = tl.load(cu_ptr + sequence)
        item = first // rows + sequence
        count = (tl.load(cu_ptr + sequence + 1) - first + rows - 1) // rows
    state = tl.zeros([ROWS, WIDTH], tl.float32)
    z = tl.zeros([ROWS], tl.float32)
    for i in range(count * GROUP):
        partial = (((item + i // GROUP) * HEADS + key_head * GROUP + i % GROUP) * SIGNS + half).to(tl.int64) * WIDTH
        state += tl.load(partial_ptr + (partial + f)[:, None] * WIDTH + d[None, :])
        z += tl.load(z_partial_ptr + partial + f)
    real = f < D
    out = (head * SIGNS + half).to(tl.int64) * D + f
    if r_ptr is not None:
        scale *= 1.0 - tl.load(r_ptr).to(tl.float32)
    state *= scale
    z *= scale
    if BACKWARD:
        if gain_ptr is not None:
            mass = tl.load(gain_ptr + out, real, 0.0)
            inverse = tl.where(mass > 0.0, 1.0 / tl.where(mass > 0.0, mass, 1.0), 0.0)
            state *= inverse[:, None]
            z *= inverse
        if stats_ptr is not None:
            center = tl.load(stats_ptr + (head.to(tl.int64) * (2 * SIGNS + 2) + 2 * SIGNS) * WIDTH + d)
            z -= tl.sum(state * center[None, :], axis=1)
        else:
            z = tl.zeros([ROWS], tl.float32)
    tl.store(state_ptr + out[:, None] * D + d[None, :], state, real[:, None] & (d < D)[None, :])
    tl.store(z_ptr + out, z, real)


def accumulate(side: Side, y, *, key_heads, backward=False, scale=1.0, factors=None, z=None, stats=None, r=None):
    """Returns scale S [B, Hk, F, D] and scale z [B, Hk, F] in fp32; B counts sequences where they are packed.

    The backward passes r where the output was mixed, and if it was normalised the row factors, the forward's z and its
    stats.
    """
    u = side.u
    _, length, heads, dim = u.shape
    signs, width = side.signs, side.width
    tile = side.tile("accumulate_state", expanded=expanded(u, y), factors=factors is not None)
    work = side.work(tile, halves=signs, partials=True)
    float32 = {"dtype": torch.float32, "device": u.device}
    partial = torch.empty((work.items, heads, signs, width, width), **float32)
    z_partial = torch.empty((work.items, heads, signs, width), **float32)
    gain = z if u.dtype == torch.float16 else None
    room = configs.room(side.feature_map) if gain is None else configs.ROOM
    launch(
        accumulate_state, work.items * heads * signs, tile, u.device,
        u_ptr=descriptor(u, tile, width) if tile.tma else u, w_ptr=side.weight,
        y_ptr=descriptor(y, tile, width) if tile.tma else y, keep_ptr=side.keep, factors_ptr=factors, gain_ptr=gain,
        cu_ptr=side.cu_seqlens, partial_ptr=partial, z_partial_ptr=z_partial, **strides("u", u), **strides("y", y),
        SEQUENCES=work.sequences, HEADS=heads, N=length, splits=work.splits, rows=work.rows,
        factors_plane=0 if factors is None else factors.stride(0),
        D=dim, WIDTH=width, SIGNS=signs, GROUP=heads // key_heads, BLOCK=tile.block, FEATURE_MAP=side.feature_map,
        ROOM=room, VALUE_FIRST=tile.value_first, Z_BY_DOT=tile.z_by_dot, TMA=tile.tma, PRECISION=side.precision,
    )  # fmt: skip
    state = torch.empty((work.sequences, key_heads, signs * dim, dim), **float32)
    z_out = torch.empty((work.sequences, key_heads, signs * dim), **float32)
    tile = side.tile("reduce_state")
    launch(
        reduce_state, work.sequences * key_heads * signs * (width // tile.block), tile, u.device,
        partial_ptr=partial, z_partial_ptr=z_partial, gain_ptr=gain, stats_ptr=stats, r_ptr=r,
        cu_ptr=side.cu_seqlens, state_ptr=state, z_ptr=z_out,
        HEADS=heads, splits=work.splits, rows=work.rows, scale=scale / room,
        D=dim, WIDTH=width, SIGNS=signs, GROUP=heads // key_heads, ROWS=tile.block, BACKWARD=backward,
    )  # fmt: skip
    return state, z_out
