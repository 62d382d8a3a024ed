"""Backward of linear attention; the features are computed again, nothing of size N F is stored.

In forward.py's terms (w, c, state), with den and delta = do.(o - c) one fp32 number per row each:
    z_f dS_f = sum_n w_nf do_n / den_n    dz_f = -sum_n delta_n w_nf / den_n    accumulate_state, reduce_state
    dv = sum_f phi(k)_f dS_f                                                    apply_state, no division
    dphi(q)_f = z_f (state_f.do - delta) / den                                  map_grad, on to the logits: dx
    dphi(k)_f = (z_f dS_f.(v - c) + dz_f) / z_f                                 map_grad
    du = dx W^T    dW = sum_n u^T dx    (u = q or k, x = u W)                   project_grad
First of all apply_state writes the rows' 1 / den and delta. Without normalisation delta, dz and c are 0 and z, den 1.
dx lives in the dq or dk buffer until project_grad overwrites it with du.
"""

import torch
import triton
import triton.language as tl

from linvideo_kernels.linear_attn import configs
from linvideo_kernels.linear_attn.feature_maps import features, features_grad, load_weight, logits, matmul
from linvideo_kernels.linear_attn.forward import SIZES, apply, make_state, tile_weight, unit_stride
from linvideo_kernels.linear_attn.launch import launch, target_of


@triton.jit(do_not_specialize=SIZES)
def map_grad(
    u_ptr, w_ptr, y_ptr, state_ptr, stats_ptr, center_ptr, rows_ptr, dx_ptr,
    stride_ub, stride_un, stride_uh, stride_yb, stride_yn, stride_yh, stride_ob, stride_on, stride_oh,
    BATCH, HEADS, N, blocks_per_split,
    D: tl.constexpr, WIDTH: tl.constexpr, SIGNS: tl.constexpr, BLOCK: tl.constexpr,
    FEATURE_MAP: tl.constexpr, NORMALIZE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dx of the logits of u. Queries: y = do, the forward's state. KEYS: y = v, z dS, c of the stats at center_ptr."""
    pid = tl.program_id(0)
    head = pid % (BATCH * HEADS)
    batch = (head // HEADS).to(tl.int64)
    start = pid // (BATCH * HEADS) * blocks_per_split * BLOCK
    cols = tl.arange(0, WIDTH)
    lanes = tl.arange(0, BLOCK)
    real = (cols < D)[None, :]
    u_ptr += batch * stride_ub + (head % HEADS).to(tl.int64) * stride_uh + start.to(tl.int64) * stride_un
    y_ptr += batch * stride_yb + (head % HEADS).to(tl.int64) * stride_yh + start.to(tl.int64) * stride_yn
    dx_ptr += batch * stride_ob + (head % HEADS).to(tl.int64) * stride_oh + start.to(tl.int64) * stride_on
    state_ptr += head.to(tl.int64) * SIGNS * WIDTH * WIDTH
    stats_ptr += head.to(tl.int64) * (2 * SIGNS + 2) * WIDTH
    if FEATURE_MAP == "hedgehog":
        w_ptr += head % HEADS * WIDTH * WIDTH
    w = load_weight(w_ptr, u_ptr.dtype.element_ty, WIDTH, FEATURE_MAP)
    factor = tl.load(stats_ptr + (2 * SIGNS + 1) * WIDTH)
    for _ in range(blocks_per_split):
        valid = start + lanes < N
        mask = valid[:, None] & real
        u = tl.load(u_ptr + lanes[:, None] * stride_un + cols[None, :], mask, 0.0)
        y = tl.load(y_ptr + lanes[:, None] * stride_yn + cols[None, :], mask, 0.0)
        if NORMALIZE:
            if KEYS:
                center = tl.load(center_ptr + (head.to(tl.int64) * (2 * SIGNS + 2) + 2 * SIGNS) * WIDTH + cols)
                y = (y.to(tl.float32) - center[None, :]).to(u.dtype)
            else:
                delta = tl.load(rows_ptr + (BATCH * HEADS + head).to(tl.int64) * N + start + lanes, valid, 0.0)
        dx = tl.zeros([BLOCK, WIDTH], tl.float32)
        for half in range(SIGNS):
            x = logits(u, w, w_ptr, WIDTH, FEATURE_MAP)
            sign = 1.0 - 2.0 * half
            phi = features(x, sign, D, WIDTH, FEATURE_MAP)
            dphi = tl.zeros([BLOCK, WIDTH], tl.float32)
            dphi = matmul(y, state_ptr + half * WIDTH * WIDTH, WIDTH, 1, dphi, WIDTH)
            if NORMALIZE:
                if KEYS:
                    dphi += tl.load(stats_ptr + (SIGNS + half) * WIDTH + cols)[None, :]
                else:
                    dphi -= delta[:, None]
                dphi *= tl.load(stats_ptr + half * WIDTH + cols)[None, :]
            dx += features_grad(x, phi, dphi, sign, FEATURE_MAP)
        if NORMALIZE and not KEYS:
            dx *= tl.load(rows_ptr + head.to(tl.int64) * N + start + lanes, valid, 0.0)[:, None]
        else:
            dx *= factor
        tl.store(dx_ptr + lanes[:, None] * stride_on + cols[None, :], dx.to(dx_ptr.dtype.element_ty), mask)
        start += BLOCK
        u_ptr += BLOCK * stride_un
        y_ptr += BLOCK * stride_yn
        dx_ptr += BLOCK * stride_on


@triton.jit(do_not_specialize=SIZES)
def project_grad(
    u_ptr, w_ptr, dx_ptr, dw_partial_ptr,
    stride_ub, stride_un, stride_uh, stride_ob, stride_on, stride_oh,
    BATCH, HEADS, N, blocks_per_split,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Overwrites dx by du = dx W^T and writes one partial dW = sum_n u^T dx per split."""
    pid = tl.program_id(0)
    head = pid % (BATCH * HEADS)
    batch = (head // HEADS).to(tl.int64)
    start = pid // (BATCH * HEADS) * blocks_per_split * BLOCK
    cols = tl.arange(0, WIDTH)
    lanes = tl.arange(0, BLOCK)
    real = (cols < D)[None, :]
    u_ptr += batch * stride_ub + (head % HEADS).to(tl.int64) * stride_uh + start.to(tl.int64) * stride_un
    dx_ptr += batch * stride_ob + (head % HEADS).to(tl.int64) * stride_oh + start.to(tl.int64) * stride_on
    w_ptr += head % HEADS * WIDTH * WIDTH
    w = tl.load(w_ptr + cols[:, None] * WIDTH + cols[None, :])  # [in, out]
    dw = tl.zeros([WIDTH, WIDTH], tl.float32)  # [in, out]
    for _ in range(blocks_per_split):
        mask = (start + lanes < N)[:, None] & real
        u = tl.load(u_ptr + lanes[:, None] * stride_un + cols[None, :], mask, 0.0)
        at = dx_ptr + lanes[:, None] * stride_on + cols[None, :]
        dx = tl.load(at, mask, 0.0)
        dw = tl.dot(tl.trans(u), dx, dw, input_precision="ieee")
        du = tl.dot(dx, tl.trans(w), input_precision="ieee")
        tl.store(at, du.to(dx.dtype), mask)
        start += BLOCK
        u_ptr += BLOCK * stride_un
        dx_ptr += BLOCK * stride_on
    at = dw_partial_ptr + pid.to(tl.int64) * D * D + cols[:, None] * D + cols[None, :]
    tl.store(at, dw, (cols < D)[:, None] & real)


def backward(
    do, q, k, v, q_weight, k_weight, state, stats, feature_map: str, scale: float, normalize: bool, eps: float
):
    """Returns dq, dk, dv, dq_weight, dk_weight (None without weights); state and stats are the forward's."""
    weight_dtypes = [None if w is None else w.dtype for w in (q_weight, k_weight)]
    do, q, k, v = (unit_stride(x) for x in (do, q, k, v))
    q_weight, k_weight = tile_weight(q_weight, q), tile_weight(k_weight, q)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    rows = None
    if normalize:
        batch, length, heads, _ = q.shape
        rows = torch.empty((2, batch, heads, length), dtype=torch.float32, device=q.device)
        apply(q, q_weight, state, stats, rows, feature_map, eps, gain=True, normalize=True, do=do)
    dstate, dstats = make_state(q, q_weight, do, feature_map, scale, normalize, rows, stats if normalize else None)
    apply(k, k_weight, dstate, dstats, dv, feature_map, eps, gain=normalize, normalize=False)
    _map_grad(q, q_weight, do, state, stats, stats, rows, dq, feature_map, normalize, keys=False)
    _map_grad(k, k_weight, v, dstate, dstats, stats, rows, dk, feature_map, normalize, keys=True)
    if q_weight is None:
        return dq, dk, dv, None, None
    dq_weight, dk_weight = _project_grad(q, q_weight, dq), _project_grad(k, k_weight, dk)
    return dq, dk, dv, dq_weight.to(weight_dtypes[0]), dk_weight.to(weight_dtypes[1])


def _map_grad(u, w, y, state, stats, center, rows, dx, feature_map, normalize, keys):
    batch, length, heads, dim = u.shape
    target = target_of(u)
    tile = configs.tile("map_grad", dim, u.element_size(), target.capability)
    splits, blocks = configs.split_rows(length, tile.block, batch * heads, target.sm_count)
    launch(
        map_grad, splits * batch * heads, tile,
        u, w, y, state, stats, center, rows, dx, *u.stride()[:3], *y.stride()[:3], *dx.stride()[:3],
        batch, heads, length, blocks,
        D=dim, WIDTH=state.shape[-1], SIGNS=state.shape[2], BLOCK=tile.block,
        FEATURE_MAP=feature_map, NORMALIZE=normalize, KEYS=keys,
    )  # fmt: skip


def _project_grad(u, w, dx):
    """Turns dx into du in place and returns dW [H, D, D] in fp32."""
    batch, length, heads, dim = u.shape
    target = target_of(u)
    tile = configs.tile("project_grad", dim, u.element_size(), target.capability)
    splits, blocks = configs.split_rows(length, tile.block, batch * heads, target.sm_count)
    partial = torch.empty((splits * batch, heads, dim, dim), dtype=torch.float32, device=u.device)
    launch(
        project_grad, splits * batch * heads, tile,
        u, w, dx, partial, *u.stride()[:3], *dx.stride()[:3], batch, heads, length, blocks,
        D=dim, WIDTH=configs.padded(dim), BLOCK=tile.block,
    )  # fmt: skip
    return partial.sum(0)  # a plain sum over one axis: the same order every run
