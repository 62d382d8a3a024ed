"""The state of linear attention, S = sum_n phi(u_n)^T y_n [F, D] and z = sum_n phi(u_n) [F], in fp32.

In the forward u = k and y = v. In the backward u = q and y = do, and if the output was normalised, the row factors
a = 1 / den and delta = do.(o - c) are applied:
    dS_f = sum_n a_n phi_nf do_n,    dz_f = -sum_n a_n delta_n phi_nf - dS_f.c.

accumulate_state writes a partial S and z for each work item, head and half of the feature map. reduce_state adds them
up in a fixed order, and in the backward also over the query heads that share a key head. Features are rounded to u's
dtype once, and S and z are sums of the same rounded features.
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
    FEATURE_MAP: tl.constexpr, FEATURE_SCALE: tl.constexpr, VALUE_FIRST: tl.constexpr, Z_BY_DOT: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the partial S [f, d] and z of one item, head and half.

    factors_ptr [2, B, H, N] holds a and delta of each row. gain_ptr is the forward's z, which multiplies the features
    in fp16: they are then shares of o, at most 1, whereas phi / den has no bound.

    W and the accumulators stay on chip. For each tile the loop loads u and y, computes the logits u W and phi of one
    half, and adds phi^T y to S. At D = 128 the [D, D] accumulator of one half takes half the registers that 4 warps can
    have, so each half has its own program, which loads the rows and computes the logits again.

    Roofline, per row and head: both halves together do 8 D^2 flops and, in 16 bits, read 4 D bytes from memory (the
    second half reads from L2). That is 2 D flops per byte, 256 at D = 128. An H200 balances about 180 flops with a byte
    (790 TFLOP/s, 4.3 TB/s), so the tensor cores are the limit, with memory close behind.
    """
    # A descriptor knows neither a sequence's first row and length nor which keys are masked.
    tl.static_assert(not TMA or (cu_ptr is None and keep_ptr is None))
    pid = tl.program_id(0)  # the two halves of a head run next to each other, so the second finds its rows in L2
    half = pid % SIGNS
    head = pid // SIGNS % HEADS
    item = pid // SIGNS // HEADS
    sequence, batch, first, length, start, stop = locate(item, cu_ptr, SEQUENCES, N, splits, rows)
    u_ptr = head_rows(u_ptr, batch, first, head, stride_ub, stride_un, stride_uh, TMA)
    y_ptr = head_rows(y_ptr, batch, first, head, stride_yb, stride_yn, stride_yh, TMA)
    at = (batch * HEADS + head).to(tl.int64) * N + first  # where the sequence begins in factors_ptr
    cols = tl.arange(0, WIDTH)
    w = w_ptr
    if w_ptr is not None:
        w = operand(w_ptr + head * WIDTH * WIDTH, True, WIDTH)
        if w_ptr.dtype.element_ty != tl.float32:
            w = (w * (1.0 - 2.0 * half)).to(w.dtype)  # the sign of the half, which is exact
    if gain_ptr is not None:
        gain_ptr += ((sequence * (HEADS // GROUP) + head // GROUP) * SIGNS + half).to(tl.int64) * D
    state = tl.zeros([WIDTH, WIDTH], tl.float32)  # [d, f] with VALUE_FIRST, else [f, d]
    # z sums phi over rows, which lie in different threads: a tl.sum for each tile would shuffle 200 times.
    if Z_BY_DOT:  # z is a product with a 16-row operand; z = row 0 + row 1 of the result
        sums = tl.zeros([16, WIDTH], tl.float32)
        one = (tl.arange(0, 16) == 0)[:, None]
        two = (tl.arange(0, 16) == 1)[:, None]
    else:  # wgmma's layout gives one thread rows n and n + 8 of every 16, so adding those moves no data
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
        factor = tl.where(valid, FEATURE_SCALE, 0.0)  # rows past the end, and masked ones, get no features
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
            if factors_ptr is not None:  # delta is the sum of two 16-bit numbers, one in each of the two rows
                delta = -tl.load(factors_ptr + factors_plane + at + n, valid, 0.0)
                if u.dtype == tl.float16:  # delta is a sum of D products with do and may exceed fp16's range
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
    """Write scale times the sum of a sequence's partials, for ROWS features of one key head.

    The number of partials, and with it the time of this pass, is limited by WAVES_OF_PARTIALS in configs.py.

    With BACKWARD it also divides by the gain that accumulate_state has multiplied by, and subtracts dS_f.c from dz with
    the center c in stats_ptr (without normalisation there is none, and dz = 0). If the output was mixed, it multiplies
    by 1 - r.
    """
    pid = tl.program_id(0)
    chunks = SIGNS * (WIDTH // ROWS)
    head = pid // chunks  # counts the key heads of all sequences
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
    """Return scale S [B, Hk, F, D] and scale z [B, Hk, F] in fp32; B is the number of sequences if they are packed.

    The backward passes r if the output was mixed and, if it was normalised, the row factors, the forward's z and its
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
    feature_scale = configs.feature_scale(side.feature_map) if gain is None else configs.FEATURE_SCALE
    launch(
        accumulate_state, work.items * heads * signs, tile, u.device,
        u_ptr=descriptor(u, tile, width) if tile.tma else u, w_ptr=side.weight,
        y_ptr=descriptor(y, tile, width) if tile.tma else y, keep_ptr=side.keep, factors_ptr=factors, gain_ptr=gain,
        cu_ptr=side.cu_seqlens, partial_ptr=partial, z_partial_ptr=z_partial, **strides("u", u), **strides("y", y),
        SEQUENCES=work.sequences, HEADS=heads, N=length, splits=work.splits, rows=work.rows,
        factors_plane=0 if factors is None else factors.stride(0),
        D=dim, WIDTH=width, SIGNS=signs, GROUP=heads // key_heads, BLOCK=tile.block, FEATURE_MAP=side.feature_map,
        FEATURE_SCALE=feature_scale, VALUE_FIRST=tile.value_first, Z_BY_DOT=tile.z_by_dot, TMA=tile.tma,
        PRECISION=side.precision,
    )  # fmt: skip
    state = torch.empty((work.sequences, key_heads, signs * dim, dim), **float32)
    z_out = torch.empty((work.sequences, key_heads, signs * dim), **float32)
    tile = side.tile("reduce_state")
    launch(
        reduce_state, work.sequences * key_heads * signs * (width // tile.block), tile, u.device,
        partial_ptr=partial, z_partial_ptr=z_partial, gain_ptr=gain, stats_ptr=stats, r_ptr=r,
        cu_ptr=side.cu_seqlens, state_ptr=state, z_ptr=z_out,
        HEADS=heads, splits=work.splits, rows=work.rows, scale=scale / feature_scale,
        D=dim, WIDTH=width, SIGNS=signs, GROUP=heads // key_heads, ROWS=tile.block, BACKWARD=backward,
    )  # fmt: skip
    return state, z_out
