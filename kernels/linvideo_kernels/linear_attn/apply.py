"""The rows' side of linear attention: phi(u) times a prepared state T (prepare.py).

Normalised, o = c + (phi(q) T - eps c) / (phi(q) z + eps); not normalised, o = scale phi(q) T. Optionally the pass mixes
o with softmax attention, r softmax_out + (1 - r) o. In the backward the same pass gives dv = phi(k) dS.
"""

import triton
import triton.language as tl

from linvideo_kernels.linear_attn import configs
from linvideo_kernels.linear_attn.feature_maps import features
from linvideo_kernels.linear_attn.launch import SIZES, launch
from linvideo_kernels.linear_attn.products import floor_power, logits, operand, split, times
from linvideo_kernels.linear_attn.side import Side, aligned, descriptor, expanded, strides
from linvideo_kernels.linear_attn.tiles import head_rows, kept, load_rows, locate, rotate, store_rows


@triton.jit(do_not_specialize=SIZES)
def apply_state(
    u_ptr, w_ptr, state_ptr, stats_ptr, cos_ptr, sin_ptr, keep_ptr, mix_ptr, r_ptr, cu_ptr, out_ptr, den_ptr,
    stride_ub, stride_un, stride_uh, stride_mb, stride_mn, stride_mh, stride_ob, stride_on, stride_oh,
    SEQUENCES, HEADS, N, splits, rows, scale, eps,
    D: tl.constexpr, WIDTH: tl.constexpr, SIGNS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    FEATURE_MAP: tl.constexpr, FEATURE_SCALE: tl.constexpr, NORMALIZE: tl.constexpr, KEEP: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the output rows of one item and head and, with den_ptr [B, H, N], each row's phi z.

    W and, with KEEP, both halves of T stay on chip for all tiles of the item. For each tile the loop loads u, rotates
    it if there are angles, computes the logits u W once, and for each half phi, its share of the denominator and phi T.

    Roofline, per row and head: 6 D^2 flops and, in 16 bits, 4 D bytes to read u and write o. That is 1.5 D flops per
    byte, 192 at D = 128. An H200 balances about 180 (see accumulate_state): tensor cores and memory are equally busy.
    """
    tl.static_assert(not TMA or cu_ptr is None)  # a descriptor does not know a sequence's first row and length
    pid = tl.program_id(0)
    head = pid % HEADS
    item = pid // HEADS
    sequence, batch, first, length, start, stop = locate(item, cu_ptr, SEQUENCES, N, splits, rows)
    u_ptr = head_rows(u_ptr, batch, first, head, stride_ub, stride_un, stride_uh, TMA)
    out_ptr = head_rows(out_ptr, batch, first, head, stride_ob, stride_on, stride_oh, False)
    if mix_ptr is not None:
        mix_ptr = head_rows(mix_ptr, batch, first, head, stride_mb, stride_mn, stride_mh, False)
        r = tl.load(r_ptr).to(tl.float32)
    key_head = (sequence * (HEADS // GROUP) + head // GROUP).to(tl.int64)
    state_ptr += key_head * SIGNS * WIDTH * WIDTH
    stats_ptr += key_head * (2 * SIGNS + 2) * WIDTH
    cols = tl.arange(0, WIDTH)
    w = w_ptr
    if w_ptr is not None:
        w = operand(w_ptr + head * WIDTH * WIDTH, True, WIDTH)
    state = operand(state_ptr, KEEP, WIDTH)
    state2 = operand(state_ptr + (SIGNS - 1) * WIDTH * WIDTH, KEEP, WIDTH)  # the second half, if there is one
    factor = tl.load(stats_ptr + (2 * SIGNS + 1) * WIDTH) * (scale / FEATURE_SCALE)
    # Without a weight, phi is computed in the layout of the loads, and a product needs it in another one. A row sum for
    # den would compute phi in both layouts, so den comes from a product, too.
    Z_BY_DOT: tl.constexpr = NORMALIZE and w_ptr is None and out_ptr.dtype.element_ty != tl.float32
    if Z_BY_DOT:
        z = tl.load(stats_ptr + cols)
        # Scale z to the top of fp16's range: small parts of it matter when den is close to eps.
        power = floor_power(tl.max(z, axis=0)) / 16384.0
        high, low = split(z / power, out_ptr.dtype.element_ty)
        column = tl.arange(0, 16)[None, :]
        z = tl.where(column == 0, high[:, None], tl.where(column == 1, low[:, None], 0.0)).to(high.dtype)
    for row in range(start, stop, BLOCK):
        n = row + tl.arange(0, BLOCK)
        valid = n < length
        u = load_rows(u_ptr, batch, head, row, length, None, stride_un, D, WIDTH, BLOCK, TMA)
        if cos_ptr is not None:
            u = rotate(u, cos_ptr, sin_ptr, first + row, valid, 1.0, D, WIDTH)
        x = logits(u, w, WIDTH, PRECISION)
        acc = tl.zeros([BLOCK, WIDTH], tl.float32)
        den = tl.zeros([BLOCK], tl.float32)
        unit = 1.0
        for half in tl.static_range(SIGNS):
            phi = features(x, 1 - 2 * half, FEATURE_SCALE, D, WIDTH, FEATURE_MAP)
            if FEATURE_MAP == "elu" and u.dtype == tl.float16:
                # A row's features may all be too small for fp16. A power of two brings the largest between 1 and 2.
                unit = floor_power(tl.max(phi, axis=1))
                phi /= unit[:, None]
            if Z_BY_DOT:
                den = tl.sum(tl.dot(phi.to(u.dtype), z, input_precision=PRECISION), axis=1) * power
            elif NORMALIZE:
                den += tl.sum(phi * tl.load(stats_ptr + half * WIDTH + cols)[None, :], axis=1)
            acc = times(phi.to(u.dtype), state if half == 0 else state2, acc, False, WIDTH, PRECISION)
        if NORMALIZE:
            den *= unit / FEATURE_SCALE
            if den_ptr is not None:
                tl.store(den_ptr + (batch * HEADS + head).to(tl.int64) * N + first + n, den, valid)
            a = 1.0 / (den + eps)
            center = tl.load(stats_ptr + 2 * SIGNS * WIDTH + cols)
            # o = c + (phi T - eps c) a, written so that it is exactly 0 if the query shares no feature with any key
            acc = acc * (a * factor * unit)[:, None] + center[None, :] * (den * a)[:, None]
        else:
            acc *= (tl.zeros([BLOCK], tl.float32) + factor * unit)[:, None]
        if keep_ptr is not None:
            acc = tl.where(kept(keep_ptr, batch, N, first + n, valid)[:, None], acc, 0.0)
        if mix_ptr is not None:
            softmax_out = load_rows(mix_ptr, batch, head, row, length, None, stride_mn, D, WIDTH, BLOCK, False)
            acc = r * softmax_out.to(tl.float32) + (1.0 - r) * acc
        store_rows(out_ptr, acc, row, valid, stride_on, D, WIDTH, BLOCK)


def apply(side: Side, state, stats, *, normalize, eps=0.0, scale=1.0, softmax_out=None, r=None, den=None):
    """Return the output, like side.u. state and stats come from `prepare`; several heads of u may share a key head.

    If given, den [B, H, N] in fp32 receives the denominator phi z of each row, without eps.
    """
    u = side.u
    _, length, heads, dim = u.shape
    out = side.new_rows()
    softmax_out = None if softmax_out is None else aligned(softmax_out)
    tile = side.tile("apply_state", mix=softmax_out is not None, expanded=expanded(u), normalizer=den is not None)
    work = side.work(tile)
    width = state.shape[-1]
    launch(
        apply_state, work.items * heads, tile, u.device,
        u_ptr=descriptor(u, tile, width) if tile.tma else u, w_ptr=side.weight, state_ptr=state, stats_ptr=stats,
        cos_ptr=side.cos, sin_ptr=side.sin, keep_ptr=side.keep, mix_ptr=softmax_out, r_ptr=r, cu_ptr=side.cu_seqlens,
        out_ptr=out, den_ptr=den, **strides("u", u), **strides("m", softmax_out), **strides("o", out),
        SEQUENCES=work.sequences, HEADS=heads, N=length, splits=work.splits, rows=work.rows, scale=scale, eps=eps,
        D=dim, WIDTH=width, SIGNS=side.signs, GROUP=heads // state.shape[1], BLOCK=tile.block,
        FEATURE_MAP=side.feature_map, FEATURE_SCALE=configs.feature_scale(side.feature_map), NORMALIZE=normalize,
        KEEP=tile.keeps, TMA=tile.tma, PRECISION=side.precision,
    )  # fmt: skip
    return out
