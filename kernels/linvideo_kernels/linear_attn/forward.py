"""Forward of linear attention: o = phi(q) S / (phi(q) z + eps), S = sum_m phi(k_m)^T v_m, z = sum_m phi(k_m).

Passes: accumulate_state (partial S and z per split of N), reduce_state (fixed order, cast to q's dtype), apply_state.

So that 16 bits hold the state whatever N and the mean of v are, it is kept as each feature's own mean of v, about an
overall mean c = sum_f S_f / sum_f z_f. With w_f = phi(q)_f z_f, den = sum_f w_f + eps, hence w_f / den <= 1:
    state_f = S_f / z_f - c,    o = c + (sum_f w_f state_f - c eps) / den;    not normalised: o = factor phi(q) state.

Shapes: state [B, H, SIGNS, d, f] in q's dtype; stats [B, H, 2 SIGNS + 2, WIDTH] fp32: each half's gain (what phi is
multiplied by: z, in the backward 1 / z, up to powers of two that suit fp16), each half's dz (backward), c, the factor
that undoes those powers. WIDTH is D padded to a power of two; SIGNS is 2 for "hedgehog", 1 otherwise.
"""

import torch
import triton
import triton.language as tl

from linvideo_kernels.linear_attn import configs
from linvideo_kernels.linear_attn.feature_maps import features, load_weight, logits, matmul, split
from linvideo_kernels.linear_attn.launch import launch, target_of

SIZES = ["BATCH", "HEADS", "N", "blocks_per_split", "splits"]  # run-time sizes: no recompilation when they change


@triton.jit(do_not_specialize=SIZES)
def accumulate_state(
    u_ptr, w_ptr, y_ptr, rows_ptr, stats_ptr, partial_ptr, z_partial_ptr,
    stride_ub, stride_un, stride_uh, stride_yb, stride_yn, stride_yh,
    BATCH, HEADS, N, blocks_per_split,
    D: tl.constexpr, WIDTH: tl.constexpr, SIGNS: tl.constexpr, BLOCK: tl.constexpr,
    FEATURE_MAP: tl.constexpr, ROW_FACTORS: tl.constexpr,
):  # fmt: skip
    """Partial S^T = sum_n y_n phi(u_n) of one head, half and split, and z: row 0 is sum_n phi, row 1 is 0.

    ROW_FACTORS (backward): phi becomes the shares phi_n gain / den_n, and row 1 -sum_n delta_n phi; 1 / den and delta
    are read from rows_ptr [2, B, H, N], the gain from the forward's stats.
    """
    pid = tl.program_id(0)  # the two halves of a head side by side: the second finds its rows in L2
    head = pid // SIGNS % (BATCH * HEADS)
    batch = (head // HEADS).to(tl.int64)
    sign = 1.0 - 2.0 * (pid % SIGNS)
    start = (pid // SIGNS // (BATCH * HEADS)) * blocks_per_split * BLOCK
    cols = tl.arange(0, WIDTH)
    lanes = tl.arange(0, BLOCK)
    real = (cols < D)[None, :]
    u_ptr += batch * stride_ub + (head % HEADS).to(tl.int64) * stride_uh + start.to(tl.int64) * stride_un
    y_ptr += batch * stride_yb + (head % HEADS).to(tl.int64) * stride_yh + start.to(tl.int64) * stride_yn
    if FEATURE_MAP == "hedgehog":
        w_ptr += head % HEADS * WIDTH * WIDTH
    w = load_weight(w_ptr, u_ptr.dtype.element_ty, WIDTH, FEATURE_MAP)
    if ROW_FACTORS:
        stats_ptr += (head.to(tl.int64) * (2 * SIGNS + 2) + pid % SIGNS) * WIDTH
    state = tl.zeros([WIDTH, WIDTH], tl.float32)  # [d, f]
    sums = tl.zeros([16, WIDTH], tl.float32)
    row = tl.arange(0, 16)[:, None]
    for _ in range(blocks_per_split):
        valid = start + lanes < N
        mask = valid[:, None] & real
        u = tl.load(u_ptr + lanes[:, None] * stride_un + cols[None, :], mask, 0.0)
        y = tl.load(y_ptr + lanes[:, None] * stride_yn + cols[None, :], mask, 0.0)
        phi = features(logits(u, w, w_ptr, WIDTH, FEATURE_MAP), sign, D, WIDTH, FEATURE_MAP)
        # Rows past N: phi is finite, y and the multipliers of z are 0.
        multipliers = tl.where((row == 0) & valid[None, :], 1.0, 0.0).to(u.dtype)  # [16, BLOCK]
        if ROW_FACTORS:  # shares of the features in o, which sum to at most 1
            a = tl.load(rows_ptr + head.to(tl.int64) * N + start + lanes, valid, 0.0)
            delta = tl.load(rows_ptr + (BATCH * HEADS + head).to(tl.int64) * N + start + lanes, valid, 0.0)
            phi *= (a * 32768.0)[:, None]  # keeps small shares in fp16's range
            phi *= tl.load(stats_ptr + cols)[None, :]
            high, low = split(-delta, u.dtype)
            multipliers = tl.where(row == 1, high[None, :], tl.where(row == 2, low[None, :], multipliers))
        elif FEATURE_MAP == "hedgehog" or FEATURE_MAP == "softmax":
            phi *= 32768.0
        phi = phi.to(u.dtype)
        state = tl.dot(tl.trans(y), phi, state, input_precision="ieee")
        sums = tl.dot(multipliers, phi, sums, input_precision="ieee")  # z of the same rounded phi as S
        start += BLOCK
        u_ptr += BLOCK * stride_un
        y_ptr += BLOCK * stride_yn
    out = pid.to(tl.int64) * WIDTH
    tl.store(partial_ptr + out * WIDTH + cols[:, None] * WIDTH + cols[None, :], state)
    tl.store(z_partial_ptr + out * 2 + cols, tl.sum(tl.where(row == 0, sums, 0.0), axis=0))
    tl.store(z_partial_ptr + out * 2 + WIDTH + cols, tl.sum(tl.where(row > 0, sums, 0.0), axis=0))


@triton.jit(do_not_specialize=SIZES)
def reduce_state(
    partial_ptr, z_partial_ptr, forward_stats_ptr, state_ptr, stats_ptr,
    BATCH, HEADS, N, splits, scale, room,
    WIDTH: tl.constexpr, SIGNS: tl.constexpr, COLS: tl.constexpr,
    SIGNED: tl.constexpr, NORMALIZE: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Sums the partials of COLS value columns of one head in order; writes state and stats as the module says."""
    pid = tl.program_id(0)
    head = (pid // (WIDTH // COLS)).to(tl.int64)
    first = pid % (WIDTH // COLS) * COLS
    f = tl.arange(0, SIGNS * WIDTH)
    d = first + tl.arange(0, COLS)
    at = (f // WIDTH * WIDTH * WIDTH + f % WIDTH)[None, :] + d[:, None] * WIDTH  # [COLS, F] within a head
    z_at = f // WIDTH * 2 * WIDTH + f % WIDTH
    state = tl.zeros([COLS, SIGNS * WIDTH], tl.float32)
    mass = tl.zeros([SIGNS * WIDTH], tl.float32)
    z = tl.zeros([SIGNS * WIDTH], tl.float32)
    partial_ptr += head * SIGNS * WIDTH * WIDTH
    z_partial_ptr += head * SIGNS * 2 * WIDTH
    for _ in range(splits):
        state += tl.load(partial_ptr + at)
        mass += tl.load(z_partial_ptr + z_at)
        z += tl.load(z_partial_ptr + WIDTH + z_at)
        partial_ptr += (BATCH * HEADS).to(tl.int64) * SIGNS * WIDTH * WIDTH
        z_partial_ptr += (BATCH * HEADS).to(tl.int64) * SIGNS * 2 * WIDTH
    stats_ptr += head * (2 * SIGNS + 2) * WIDTH
    if SIGNED:
        bound = N.to(tl.float32)
    else:
        bound = tl.max(mass, axis=0)
    power = bound.to(tl.int32, bitcast=True) & 0x7F800000  # 2^floor(log2(bound))
    power = tl.where(bound > 1e-25, power.to(tl.float32, bitcast=True), 1.0)
    center = tl.zeros([COLS], tl.float32)
    if NORMALIZE and BACKWARD:
        forward_stats_ptr += head * (2 * SIGNS + 2) * WIDTH
        z_forward = tl.load(forward_stats_ptr + f) * tl.load(forward_stats_ptr + (2 * SIGNS + 1) * WIDTH)
        gain = tl.where(z_forward > 0.0, 32768.0 / tl.where(z_forward > 0.0, z_forward, 1.0), 0.0)
        factor = power / (room * 32768.0)
        state /= power
        z /= power
    elif NORMALIZE:
        used = mass > 1e-25  # else its share of any output is 0 beside eps
        center = tl.sum(state, axis=1) / tl.maximum(tl.sum(mass, axis=0), 1e-25)
        state = tl.where(used[None, :], state / tl.where(used, mass, 1.0)[None, :] - center[:, None], 0.0)
        top = tl.where(room > 1.0, 16384.0, 0.5)  # the gain of an unbounded feature stays below 1
        gain = tl.where(used, mass * (top / power), 0.0)
        factor = power / (room * top)
    else:
        gain = mass
        factor = scale * power / room
        state /= power
    tl.store(state_ptr + head * SIGNS * WIDTH * WIDTH + at, state.to(state_ptr.dtype.element_ty))
    tl.store(stats_ptr + 2 * SIGNS * WIDTH + d, center)
    tl.store(stats_ptr + (2 * SIGNS + 1) * WIDTH + d, tl.zeros([COLS], tl.float32) + factor)
    if first == 0:
        tl.store(stats_ptr + f, gain)
        tl.store(stats_ptr + SIGNS * WIDTH + f, z)


@triton.jit(do_not_specialize=SIZES)
def apply_state(
    u_ptr, w_ptr, state_ptr, stats_ptr, do_ptr, out_ptr,
    stride_ub, stride_un, stride_uh, stride_gb, stride_gn, stride_gh, stride_ob, stride_on, stride_oh,
    BATCH, HEADS, N, blocks_per_split, eps,
    D: tl.constexpr, WIDTH: tl.constexpr, SIGNS: tl.constexpr, BLOCK: tl.constexpr,
    FEATURE_MAP: tl.constexpr, GAIN: tl.constexpr, NORMALIZE: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    """out = phi(u) state, normalised or times the factor in stats.

    DELTA writes instead the row factors of the backward, out [2, B, H, N]: a = 1 / den and delta = do.(o - c).
    """
    pid = tl.program_id(0)
    head = pid % (BATCH * HEADS)
    batch = (head // HEADS).to(tl.int64)
    start = pid // (BATCH * HEADS) * blocks_per_split * BLOCK
    cols = tl.arange(0, WIDTH)
    lanes = tl.arange(0, BLOCK)
    real = (cols < D)[None, :]
    u_ptr += batch * stride_ub + (head % HEADS).to(tl.int64) * stride_uh + start.to(tl.int64) * stride_un
    state_ptr += head.to(tl.int64) * SIGNS * WIDTH * WIDTH
    stats_ptr += head.to(tl.int64) * (2 * SIGNS + 2) * WIDTH
    if DELTA:
        do_ptr += batch * stride_gb + (head % HEADS).to(tl.int64) * stride_gh + start.to(tl.int64) * stride_gn
        out_ptr += head.to(tl.int64) * N
    else:
        out_ptr += batch * stride_ob + (head % HEADS).to(tl.int64) * stride_oh + start.to(tl.int64) * stride_on
    if FEATURE_MAP == "hedgehog":
        w_ptr += head % HEADS * WIDTH * WIDTH
    w = load_weight(w_ptr, u_ptr.dtype.element_ty, WIDTH, FEATURE_MAP)
    factor = tl.load(stats_ptr + (2 * SIGNS + 1) * WIDTH)
    for _ in range(blocks_per_split):
        valid = start + lanes < N
        mask = valid[:, None] & real
        u = tl.load(u_ptr + lanes[:, None] * stride_un + cols[None, :], mask, 0.0)
        x = logits(u, w, w_ptr, WIDTH, FEATURE_MAP)
        acc = tl.zeros([BLOCK, WIDTH], tl.float32)
        den = tl.zeros([BLOCK], tl.float32)
        for half in tl.static_range(SIGNS):
            phi = features(x, 1.0 - 2.0 * half, D, WIDTH, FEATURE_MAP)
            if GAIN:
                if not NORMALIZE:  # 1 / z of a key's feature is no bound for the rows past N
                    phi = tl.where(valid[:, None], phi, 0.0)
                phi *= tl.load(stats_ptr + half * WIDTH + cols)[None, :]
            if NORMALIZE:
                den += tl.sum(phi, axis=1)
            acc = matmul(phi.to(u.dtype), state_ptr + half * WIDTH * WIDTH, 1, WIDTH, acc, WIDTH)
        if NORMALIZE:
            a = 1.0 / (den + eps / factor)
            center = tl.load(stats_ptr + 2 * SIGNS * WIDTH + cols)[None, :]
            if DELTA:  # o - c
                acc = (acc - center * (eps / factor)) * a[:, None]
            else:  # exactly 0 where the query shares no feature with any key
                acc = (acc + center * den[:, None]) * a[:, None]
        else:
            acc *= factor
        if DELTA:
            do = tl.load(do_ptr + lanes[:, None] * stride_gn + cols[None, :], mask, 0.0).to(tl.float32)
            tl.store(out_ptr + start + lanes, a, valid)
            tl.store(out_ptr + (BATCH * HEADS).to(tl.int64) * N + start + lanes, tl.sum(acc * do, axis=1), valid)
            do_ptr += BLOCK * stride_gn
        else:
            tl.store(out_ptr + lanes[:, None] * stride_on + cols[None, :], acc.to(out_ptr.dtype.element_ty), mask)
            out_ptr += BLOCK * stride_on
        start += BLOCK
        u_ptr += BLOCK * stride_un


def forward(q, k, v, q_weight, k_weight, feature_map: str, scale: float, normalize: bool, eps: float):
    """Returns o, state, stats. q, k, v [B, N, H, D] with any strides; weights [H, D, D] or None."""
    q, k, v = (unit_stride(x) for x in (q, k, v))
    q_weight, k_weight = tile_weight(q_weight, q), tile_weight(k_weight, q)
    state, stats = make_state(k, k_weight, v, feature_map, scale, normalize)
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    apply(q, q_weight, state, stats, o, feature_map, eps, gain=normalize, normalize=normalize)
    return o, state, stats


def make_state(u, w, y, feature_map, scale, normalize, rows=None, forward_stats=None):
    """accumulate_state and reduce_state. The backward passes rows and forward_stats if the forward was normalised."""
    batch, length, heads, dim = u.shape
    signs = 2 if feature_map == "hedgehog" else 1
    room = 32768.0 if feature_map in ("hedgehog", "softmax") or rows is not None else 1.0
    target = target_of(u)
    tile = configs.tile("accumulate_state", dim, u.element_size(), target.capability)
    splits, blocks = configs.split_rows(length, tile.block, batch * heads * signs, target.sm_count)
    state_shape, stats_shape = configs.saved_shapes(batch, heads, dim, signs)
    width = state_shape[-1]
    float32 = {"dtype": torch.float32, "device": u.device}
    partial = torch.empty((splits, *state_shape), **float32)
    z_partial = torch.empty((splits, batch, heads, signs, 2, width), **float32)
    launch(
        accumulate_state, splits * batch * heads * signs, tile,
        u, w, y, rows, forward_stats, partial, z_partial, *u.stride()[:3], *y.stride()[:3],
        batch, heads, length, blocks,
        D=dim, WIDTH=width, SIGNS=signs, BLOCK=tile.block, FEATURE_MAP=feature_map, ROW_FACTORS=rows is not None,
    )  # fmt: skip
    state = torch.empty(state_shape, dtype=u.dtype, device=u.device)
    stats = torch.empty(stats_shape, **float32)
    tile = configs.tile("reduce_state", dim, u.element_size(), target.capability)
    launch(
        reduce_state, batch * heads * (width // tile.block), tile,
        partial, z_partial, forward_stats, state, stats, batch, heads, length, splits, scale, room,
        WIDTH=width, SIGNS=signs, COLS=tile.block,
        SIGNED=feature_map == "identity", NORMALIZE=normalize, BACKWARD=forward_stats is not None,
    )  # fmt: skip
    return state, stats


def apply(u, w, state, stats, out, feature_map, eps, gain, normalize, do=None):
    """apply_state; with do, out [2, B, H, N] receives the row factors of the backward."""
    batch, length, heads, dim = u.shape
    target = target_of(u)
    tile = configs.tile("apply_state", dim, u.element_size(), target.capability)
    splits, blocks = configs.split_rows(length, tile.block, batch * heads, target.sm_count)
    do_strides = (0, 0, 0) if do is None else do.stride()[:3]
    out_strides = out.stride()[:3] if do is None else (0, 0, 0)
    launch(
        apply_state, splits * batch * heads, tile,
        u, w, state, stats, do, out, *u.stride()[:3], *do_strides, *out_strides, batch, heads, length, blocks, eps,
        D=dim, WIDTH=state.shape[-1], SIGNS=state.shape[2], BLOCK=tile.block,
        FEATURE_MAP=feature_map, GAIN=gain, NORMALIZE=normalize, DELTA=do is not None,
    )  # fmt: skip


def unit_stride(x):
    """x, or a copy: kernels need the last stride to be 1, and offsets within a tile of rows in 32 bits."""
    return x if x.stride(-1) == 1 and x.stride(1) < 2**24 else x.contiguous()


def tile_weight(weight, like):
    """[H, WIDTH, WIDTH] in like's dtype, padded with zeros."""
    if weight is None:
        return None
    missing = configs.padded(weight.shape[-1]) - weight.shape[-1]
    return torch.nn.functional.pad(weight.to(like.dtype), (0, missing, 0, missing)).contiguous()
