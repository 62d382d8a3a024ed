"""Preparation of the fp32 state for apply_state and map_grad, which multiply by it. It takes a few microseconds.

What is prepared:
    forward, normalised      T = S - z c^T with the overall mean c = sum_f S_f / sum_f z_f, so that a mean of v costs no
                             precision; then o = c + (phi T - eps c) / (phi z + eps)
    forward, not normalised  T = S and c = 0
    gradients of the state   T = dS, and c is subtracted from v: dphi(k)_f = T_f.(v - c) + (dz_f + T_f.c)
T is divided by a power of two that brings it to the top of fp16's range, and rounded to q's dtype.

Layout: T is [B, H, SIGNS, f, d]. stats is [B, H, 2 SIGNS + 2, WIDTH] in fp32 and holds, in this order, z of each half,
dz_f + T_f.c of each half, c, and the power of two to multiply by (the same in every column).
"""

import torch
import triton
import triton.language as tl

from linvideo_kernels.linear_attn import configs
from linvideo_kernels.linear_attn.launch import launch, target_of
from linvideo_kernels.linear_attn.products import floor_power


@triton.jit
def prepare_state(
    state_ptr, z_ptr, grad_ptr, z_grad_ptr, out_ptr, stats_ptr,
    D: tl.constexpr, WIDTH: tl.constexpr, SIGNS: tl.constexpr, ROWS: tl.constexpr, CENTER: tl.constexpr,
):  # fmt: skip
    """Write ROWS features of one head's T and their statistics; with grad_ptr and z_grad_ptr, prepare dS and dz.

    Each program reads the whole state of its head, since c and the power of two depend on all of it. At D = 128 four
    programs of 64 features each share a head, and no second launch is needed. The loops are unrolled so that their
    loads are in flight together.
    """
    chunks: tl.constexpr = WIDTH // ROWS
    head = (tl.program_id(0) // (SIGNS * chunks)).to(tl.int64)
    mine = tl.program_id(0) % (SIGNS * chunks)
    d = tl.arange(0, WIDTH)
    state_ptr += head * SIGNS * D * D
    z_ptr += head * SIGNS * D
    out_ptr += head * SIGNS * WIDTH * WIDTH
    stats_ptr += head * (2 * SIGNS + 2) * WIDTH
    center = tl.zeros([WIDTH], tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    if CENTER:  # c, from all features
        for chunk in tl.static_range(SIGNS * chunks):
            f = chunk % chunks * ROWS + tl.arange(0, ROWS)
            real = (f < D)[:, None] & (d < D)[None, :]
            at = chunk // chunks * D + f
            center += tl.sum(tl.load(state_ptr + at[:, None] * D + d[None, :], real, 0.0), axis=0)
            mass += tl.load(z_ptr + at, f < D, 0.0)
        center /= tl.maximum(tl.sum(mass, axis=0), 1e-25)
    source_ptr = state_ptr
    if grad_ptr is not None:
        source_ptr = grad_ptr + head * SIGNS * D * D
        z_grad_ptr += head * SIGNS * D
    top = tl.zeros([ROWS, WIDTH], tl.float32)
    for chunk in tl.static_range(SIGNS * chunks):  # the power of two, from the largest |T| over all features
        f = chunk % chunks * ROWS + tl.arange(0, ROWS)
        real = (f < D)[:, None] & (d < D)[None, :]
        at = chunk // chunks * D + f
        t = tl.load(source_ptr + at[:, None] * D + d[None, :], real, 0.0)
        if CENTER and grad_ptr is None:
            t -= tl.load(z_ptr + at, f < D, 0.0)[:, None] * center[None, :]
        top = tl.maximum(top, tl.abs(t))
    power = floor_power(tl.max(tl.max(top, axis=1), axis=0)) / 16384.0
    half, f = mine // chunks, mine % chunks * ROWS + tl.arange(0, ROWS)  # the features that this program writes
    real = (f < D)[:, None] & (d < D)[None, :]
    at = half * D + f
    t = tl.load(source_ptr + at[:, None] * D + d[None, :], real, 0.0)
    z = tl.load(z_ptr + at, f < D, 0.0)
    if grad_ptr is not None:
        offset = tl.load(z_grad_ptr + at, f < D, 0.0) + tl.sum(t * center[None, :], axis=1)
        tl.store(stats_ptr + (SIGNS + half) * WIDTH + f, offset / power)
    elif CENTER:
        t -= z[:, None] * center[None, :]
    tl.store(stats_ptr + half * WIDTH + f, z)
    t = (t / power).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (half * WIDTH + f)[:, None] * WIDTH + d[None, :], t)
    if mine == 0:
        tl.store(stats_ptr + 2 * SIGNS * WIDTH + d, center)
        tl.store(stats_ptr + (2 * SIGNS + 1) * WIDTH + d, tl.zeros([WIDTH], tl.float32) + power)


def prepare(state, z, dtype, feature_map: str, normalize: bool = True, grads=(None, None)):
    """Return T in `dtype` and the stats.

    Args:
        state, z: State [B, H, F, D] and z [B, H, F], both contiguous.
        dtype: Dtype of T, that of the rows.
        feature_map, normalize: Arguments of the op. The mean c is subtracted if the output is normalised, but not for
            "identity", whose features may be negative, so that their sum can vanish.
        grads: (dS, dz), both contiguous, to prepare instead of the state.
    """
    batch, heads, features, dim = state.shape
    signs = features // dim
    out_shape, stats_shape = configs.prepared_shapes(batch, heads, dim, signs)
    out = torch.empty(out_shape, dtype=dtype, device=state.device)
    stats = torch.empty(stats_shape, dtype=torch.float32, device=state.device)
    tile = configs.tile("prepare_state", dim, torch.float32, target_of(state).capability, "")
    width = out_shape[-1]
    rows = min(tile.block, width)
    launch(
        prepare_state, batch * heads * signs * (width // rows), tile, state.device,
        state_ptr=state, z_ptr=z, grad_ptr=grads[0], z_grad_ptr=grads[1], out_ptr=out, stats_ptr=stats,
        D=dim, WIDTH=width, SIGNS=signs, ROWS=rows, CENTER=normalize and feature_map != "identity",
    )  # fmt: skip
    return out, stats
