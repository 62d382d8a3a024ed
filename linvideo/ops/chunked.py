"""Linear attention in plain PyTorch, for CPU tensors. It works in fp32, or float64 for float64 rows, on one slice of
rows at a time, so that nothing of size N F is ever in memory.

These are the functions of the kernels (linvideo_kernels/linear_attn/passes.py) without the rotary embedding and
the mixture, which unfused.py computes with plain operations when no kernel runs:
    state           S = sum_m phi(k_m)^T v_m [B, Hk, F, D], z = sum_m phi(k_m) [B, Hk, F]
    apply           o = phi(q) S / den with den = phi(q) z + eps
    apply_backward  with a = 1 / den, delta = do.o: dphi(q) = a (do S^T - delta z), dS = sum a phi(q)^T do,
                    dz = -sum a delta phi(q)
    part_backward   the same with a and do.o from outside: o is one part of a sum with another normaliser
    state_backward  dv = phi(k) dS, dphi(k) = v dS^T + dz
The backward functions compute phi again instead of keeping it.

As in the kernels, T = S - z c^T takes the place of S, so that a mean in v costs no precision; c = sum_f S_f / sum_f z_f
is the overall mean of v. Then o = c + (phi T - eps c) / den, dphi(q) = a (do T^T - delta' z) with
delta' = delta - do.c, and dphi(k) = (v - c) dS^T + (dz + dS c).
"""

from collections.abc import Iterator

import torch

from linvideo.ops.reference import WEIGHTED_MAPS, activate, spans, sum_dtype

CHUNK_ELEMENTS = 1 << 20  # features in memory at a time: 4 MB, so that a slice stays in the cache


def state(k, v, weight, key_mask, cu_seqlens, feature_map: str):
    """Return S and z. B is the number of sequences if they are packed."""
    state, z = new_state(k, cu_seqlens, feature_map)
    for at, rows in slices(k, cu_seqlens, feature_map):
        _, phi = features(k[:, rows], weight, feature_map)
        values = heads_first(v[:, rows])
        if key_mask is not None:
            phi, values = (masked(x, key_mask[:, rows]) for x in (phi, values))
        state[at] += phi.mT @ values
        z[at] += phi.sum(-2)
    return state, z


def state_backward(dstate, dz, k, v, weight, key_mask, cu_seqlens, state, z, feature_map: str):
    """Return dk and dv in the dtypes of k and v, and dweight in the sums' dtype (None without a weight)."""
    dk, dv, dweight = new_rows(k, cu_seqlens), new_rows(v, cu_seqlens), _new_weight_grad(k, weight)
    center = mean(state, z, feature_map != "identity")
    if center is not None:
        dz = dz + (dstate * center).sum(-1)
    for at, rows in slices(k, cu_seqlens, feature_map):
        x, phi = features(k[:, rows], weight, feature_map)
        u, values = k[:, rows], heads_first(v[:, rows])
        if center is not None:
            values = values - center[at]
        dphi = values @ dstate[at].mT + dz[at].unsqueeze(-2)
        dvalues, dx = phi @ dstate[at], _activate_grad(x, phi, dphi, feature_map)
        if key_mask is not None:
            dvalues, dx = (masked(grad, key_mask[:, rows]) for grad in (dvalues, dx))
            u = torch.where(key_mask[:, rows, None, None], u, 0.0)
        dv[:, rows] = dvalues.transpose(1, 2)
        _store_input_grad(dk[:, rows], dweight, dx, u, weight)
    return dk, dv, dweight


def apply(
    q, state, z, weight, cu_seqlens, feature_map: str, scale: float, normalize: bool, eps: float,
    return_normalizer: bool = False,
):  # fmt: skip
    """Return o in q's dtype and, with return_normalizer, phi(q) z [B, H, N] (else None)."""
    group = q.shape[2] // state.shape[1]
    o, den = new_rows(q, cu_seqlens), new_numbers(q, cu_seqlens) if return_normalizer else None
    center = mean(state, z, normalize)
    state = centered(state, z, center)
    for at, rows in slices(q, cu_seqlens, feature_map):
        _, phi = features(q[:, rows], weight, feature_map)
        out = phi @ over_group(state[at], group)
        if normalize:
            mass, c = phi @ over_group(z[at], group).unsqueeze(-1), over_group(center[at], group)
            a = 1 / (mass + eps)
            # o = c + (phi T - eps c) a, written so that it is exactly 0 if the query shares no feature with any key
            out = out * a + c * (mass * a)
            if den is not None:
                den[..., rows] = mass.squeeze(-1)
        else:
            out = out * scale
        o[:, rows] = out.transpose(1, 2)
    return o, den


def apply_backward(
    do, q, state, z, weight, cu_seqlens, feature_map: str, scale: float, normalize: bool, eps: float, den_grad=None
):  # fmt: skip
    """Return dq in q's dtype, and dstate, dz and dweight in the sums' dtype (dweight is None without a weight).

    den_grad [B, H, N] is the gradient of the denominator phi(q) z, if it was returned.
    """

    def pull(rows, phi, g, dphi, z_rows, g_center):
        if not normalize:
            return scale * g, scale * dphi, None
        den = phi @ z_rows.unsqueeze(-1) + eps
        delta = ((phi * dphi).sum(-1, keepdim=True) - eps * g_center) / den
        if den_grad is not None:
            delta = delta - den_grad[..., rows].unsqueeze(-1) * den
        return g / den, (dphi - delta * z_rows.unsqueeze(-2)) / den, delta / den

    settings = {"cu_seqlens": cu_seqlens, "feature_map": feature_map, "normalize": normalize}
    return _queries_backward(pull, do, q, state, z, weight, **settings)


def part_backward(do, dot, a, q, state, z, weight, feature_map: str):
    """Return dq, dstate, dz, dweight and the gradients [B, H, N] of log G, if o is one part of a sum.

    As in window attention, o = (G sum_f phi_f S_f + other terms) / total, where `a` is G / total and `dot` is do.o,
    both [B, H, N].
    """
    gains = new_numbers(q, None)

    def pull(rows, phi, g, dphi, z_rows, g_center):
        weight, delta = (x[..., rows].unsqueeze(-1) for x in (a, dot))
        delta = delta - g_center
        dphi = weight * (dphi - delta * z_rows.unsqueeze(-2))
        gains[..., rows] = (phi * dphi).sum(-1)
        return weight * g, dphi, weight * delta

    settings = {"cu_seqlens": None, "feature_map": feature_map, "normalize": True}
    return *_queries_backward(pull, do, q, state, z, weight, **settings), gains


def _queries_backward(pull, do, q, state, z, weight, *, cu_seqlens, feature_map: str, normalize: bool):
    """Return dq, dstate, dz and dweight.

    pull(rows, phi, g, g T^T, z, g.c) returns the rows' gradient of phi T, that of phi, and minus that of phi z (or
    None).
    """
    group = q.shape[2] // state.shape[1]
    dq, dweight = new_rows(q, cu_seqlens), _new_weight_grad(q, weight)
    dstate, dz = torch.zeros_like(state), torch.zeros_like(z)
    center = mean(state, z, normalize)
    state = centered(state, z, center)
    for at, rows in slices(q, cu_seqlens, feature_map):
        x, phi = features(q[:, rows], weight, feature_map)
        g = heads_first(do[:, rows])
        dphi = g @ over_group(state[at], group).mT
        g_center = None if center is None else g @ over_group(center[at], group).mT
        g, dphi, mass = pull(rows, phi, g, dphi, over_group(z[at], group), g_center)
        if mass is not None:
            dz[at] -= _sum_of_group((phi.mT @ mass).squeeze(-1), group)
        dstate[at] += _sum_of_group(phi.mT @ g, group)
        _store_input_grad(dq[:, rows], dweight, _activate_grad(x, phi, dphi, feature_map), q[:, rows], weight)
    if center is not None:
        dz -= (dstate * center).sum(-1)
    return dq, dstate, dz, dweight


def state_shapes(k, cu_seqlens, feature_map: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of S and z."""
    heads, dim = k.shape[2:]
    sequences = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    z = sequences, heads, 2 * dim if feature_map in WEIGHTED_MAPS else dim
    return (*z, dim), z


def new_state(k, cu_seqlens, feature_map: str):
    """Allocate S and z, which start at 0."""
    return tuple(
        torch.zeros(shape, dtype=sum_dtype(k), device=k.device) for shape in state_shapes(k, cu_seqlens, feature_map)
    )


def new_rows(x, cu_seqlens):
    """Allocate rows like x [B, N, H, D]; they start at 0 if packed, since sequences may not cover all of them."""
    make = torch.empty if cu_seqlens is None else torch.zeros
    return make(x.shape, dtype=x.dtype, device=x.device)


def new_numbers(q, cu_seqlens):
    """Allocate numbers [B, H, N], one for each row of q [B, N, H, D]; they start at 0 as in `new_rows`."""
    batch, length, heads, _ = q.shape
    make = torch.empty if cu_seqlens is None else torch.zeros
    return make(batch, heads, length, dtype=sum_dtype(q), device=q.device)


def _new_weight_grad(x, weight):
    return None if weight is None else torch.zeros(weight.shape, dtype=sum_dtype(x), device=x.device)


def mean(state, z, normalize: bool = True):
    """Return c [B, Hk, 1, D], the mean of v over all keys, weighted by their features; None if not normalised."""
    if not normalize:
        return None
    return state.sum(-2, keepdim=True) / z.sum(-1).clamp(min=1e-25)[..., None, None]


def centered(state, z, center):
    """Return T = S - z c^T."""
    return state if center is None else torch.addcmul(state, z.unsqueeze(-1), center, value=-1)


def over_group(x, group: int):
    """Repeat x [B, Hk, ...] for the query heads of each key head."""
    return x if group == 1 else x.repeat_interleave(group, 1)


def _sum_of_group(x, group: int):
    """Sum x [B, H, ...] over the query heads of each key head."""
    return x if group == 1 else x.unflatten(1, (-1, group)).sum(2)


def masked(x, mask):
    """Set x [B, H, n, .] to 0 where mask [B, n] is False. A factor 0 would not do: a masked key may hold NaN."""
    return torch.where(mask[:, None, :, None], x, 0.0)


def logits(x, weight):
    """Return x W [B, H, n, D] of rows x [B, n, H, D]; W is rounded to their dtype."""
    rows = heads_first(x)
    return rows if weight is None else rows @ weight.to(x.dtype).to(rows.dtype)


def features(x, weight, feature_map: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits and features [B, H, n, .] of rows x [B, n, H, D]."""
    x = logits(x, weight)
    return x, activate(x, feature_map)


def _activate_grad(x, phi, dphi, feature_map: str) -> torch.Tensor:
    """Return the gradient with respect to the logits x, given that of phi = activate(x)."""
    if feature_map == "hedgehog":
        (p, m), (dp, dm) = phi.chunk(2, -1), dphi.chunk(2, -1)
        return _softmax_grad(p, dp) - _softmax_grad(m, dm)
    if feature_map == "hedgehog_joint":
        plus, minus = _softmax_grad(phi, dphi).chunk(2, -1)
        return 2 * (plus - minus)
    return _map_grad(x, phi, dphi, feature_map)


def activate_tangent(x, phi, dx, feature_map: str) -> torch.Tensor:
    """Return the tangent of phi = activate(x), given that of the logits x."""
    if feature_map == "hedgehog":
        p, m = phi.chunk(2, -1)
        return torch.cat([_softmax_grad(p, dx), -_softmax_grad(m, dx)], -1)
    if feature_map == "hedgehog_joint":
        return _softmax_grad(phi, torch.cat([2 * dx, -2 * dx], -1))
    return _map_grad(x, phi, dx, feature_map)


def _map_grad(x, phi, g, feature_map: str) -> torch.Tensor:
    """Multiply g by the Jacobian of a map with one half, which is symmetric."""
    if feature_map == "elu":
        return g * phi.clamp(max=1)  # the slope is 1 above 0 and exp(x) = phi below
    if feature_map == "relu":
        return torch.where(x > 0, g, 0.0)
    if feature_map == "softmax":
        return _softmax_grad(phi, g)
    return g


def _softmax_grad(p, dp) -> torch.Tensor:
    return p * (dp - (p * dp).sum(-1, keepdim=True))


def _store_input_grad(out, dweight, dx, u, weight) -> None:
    """For x = u W, write du = dx W^T into out [B, n, H, D] and add u^T dx to dweight [H, D, D]."""
    if weight is not None:
        dweight += (heads_first(u).mT @ dx).sum(0)
        dx = dx @ weight.to(u.dtype).to(dx.dtype).mT
    out.copy_(dx.transpose(1, 2))


def heads_first(x) -> torch.Tensor:
    return x.transpose(1, 2).to(sum_dtype(x))


def slices(x, cu_seqlens, feature_map: str) -> Iterator[tuple[slice, slice]]:
    """Yield (states, rows): a slice of rows, and the states that it belongs to.

    These are the states of all batch entries, or that of one packed sequence.
    """
    batch, _, heads, dim = x.shape
    features = 2 * dim if feature_map in WEIGHTED_MAPS else dim
    step = max(64, CHUNK_ELEMENTS // max(1, batch * heads * features))
    for sequence, span in enumerate(spans(x, cu_seqlens)):
        at = slice(None) if cu_seqlens is None else slice(sequence, sequence + 1)
        for start in range(span.start, span.stop, step):
            yield at, slice(start, min(start + step, span.stop))
