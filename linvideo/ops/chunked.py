"""Linear attention in plain PyTorch, for CPU tensors. It works in fp32 on one slice of rows at a time, so that nothing
of size N F is ever in memory.

These are the functions of the kernels (linvideo_kernels/linear_attn/passes.py) without the rotary embedding and
the mixture, which linear_attn.py computes with plain operations when no kernel runs:
    state           S = sum_m phi(k_m)^T v_m [B, Hk, F, D], z = sum_m phi(k_m) [B, Hk, F]
    apply           o = phi(q) S / (phi(q) z + eps)
    apply_backward  with a = 1 / den, delta = do.o: dphi(q) = a (do S^T - delta z), dS = sum a phi(q)^T do,
                    dz = -sum a delta phi(q)
    part_backward   the same with a and do.o from outside: o is one part of a sum with another normaliser
    state_backward  dv = phi(k) dS, dphi(k) = v dS^T + dz
The backward functions compute phi again instead of keeping it.
"""

from collections.abc import Iterator

import torch

from linvideo.ops.reference import WEIGHTED_MAPS, activate, spans

CHUNK_ELEMENTS = 1 << 20  # features in memory at a time: 4 MB, so that a slice stays in the cache


def state(k, v, weight, key_mask, cu_seqlens, feature_map: str):
    """Return S and z in fp32. B is the number of sequences if they are packed."""
    heads, dim = k.shape[2:]
    sequences = k.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    features = 2 * dim if feature_map in WEIGHTED_MAPS else dim
    state = torch.zeros(sequences, heads, features, dim, dtype=torch.float32, device=k.device)
    z = torch.zeros(sequences, heads, features, dtype=torch.float32, device=k.device)
    for at, rows in _slices(k, cu_seqlens, feature_map):
        _, phi = _features(k[:, rows], weight, feature_map)
        values = _heads_first(v[:, rows])
        if key_mask is not None:
            phi, values = (_masked(x, key_mask[:, rows]) for x in (phi, values))
        state[at] += phi.mT @ values
        z[at] += phi.sum(-2)
    return state, z


def state_backward(dstate, dz, k, v, weight, key_mask, cu_seqlens, feature_map: str):
    """Return dk and dv in the dtypes of k and v, and dweight in fp32 (None without a weight)."""
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    dweight = None if weight is None else torch.zeros(weight.shape, dtype=torch.float32, device=k.device)
    for at, rows in _slices(k, cu_seqlens, feature_map):
        x, phi = _features(k[:, rows], weight, feature_map)
        u = k[:, rows]
        dphi = _heads_first(v[:, rows]) @ dstate[at].mT + dz[at].unsqueeze(-2)
        dvalues, dx = phi @ dstate[at], _activate_grad(x, phi, dphi, feature_map)
        if key_mask is not None:
            dvalues, dx = (_masked(grad, key_mask[:, rows]) for grad in (dvalues, dx))
            u = torch.where(key_mask[:, rows, None, None], u, 0.0)
        dv[:, rows] = dvalues.transpose(1, 2)
        _store_input_grad(dk[:, rows], dweight, dx, u, weight)
    return dk, dv, dweight


def apply(
    q, state, z, weight, cu_seqlens, feature_map: str, scale: float, normalize: bool, eps: float,
    return_normalizer: bool = False,
):  # fmt: skip
    """Return o in q's dtype and, with return_normalizer, phi(q) z [B, H, N] in fp32 (else None)."""
    group = q.shape[2] // state.shape[1]
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    den = _numbers(q, cu_seqlens) if return_normalizer else None
    for at, rows in _slices(q, cu_seqlens, feature_map):
        _, phi = _features(q[:, rows], weight, feature_map)
        out = phi @ state[at].repeat_interleave(group, 1)
        if normalize:
            mass = phi @ z[at].repeat_interleave(group, 1).unsqueeze(-1)
            out = out / (mass + eps)
            if den is not None:
                den[..., rows] = mass.squeeze(-1)
        else:
            out = out * scale
        o[:, rows] = out.transpose(1, 2)
    return o, den


def apply_backward(
    do, q, state, z, weight, cu_seqlens, feature_map: str, scale: float, normalize: bool, eps: float, den_grad=None
):  # fmt: skip
    """Return dq in q's dtype, and dstate, dz and dweight in fp32 (dweight is None without a weight).

    den_grad [B, H, N] is the gradient of the denominator phi(q) z, if it was returned.
    """

    def pull(rows, phi, g, dphi, z_rows):
        if not normalize:
            return scale * g, scale * dphi, None
        den = phi @ z_rows.unsqueeze(-1) + eps
        delta = (phi * dphi).sum(-1, keepdim=True) / den
        if den_grad is not None:
            delta = delta - den_grad[..., rows].unsqueeze(-1) * den
        return g / den, (dphi - delta * z_rows.unsqueeze(-2)) / den, delta / den

    return _queries_backward(do, q, state, z, weight, cu_seqlens, feature_map, pull)


def part_backward(do, dot, a, q, state, z, weight, feature_map: str):
    """Return dq, dstate, dz, dweight and the gradients [B, H, N] of log G, if o is one part of a sum.

    As in window attention, o = (G sum_f phi_f S_f + other terms) / total, where `a` is G / total and `dot` is do.o,
    both [B, H, N].
    """
    gains = _numbers(q, None)

    def pull(rows, phi, g, dphi, z_rows):
        weight, delta = (x[..., rows].unsqueeze(-1) for x in (a, dot))
        dphi = weight * (dphi - delta * z_rows.unsqueeze(-2))
        gains[..., rows] = (phi * dphi).sum(-1)
        return weight * g, dphi, weight * delta

    return *_queries_backward(do, q, state, z, weight, None, feature_map, pull), gains


def _queries_backward(do, q, state, z, weight, cu_seqlens, feature_map: str, pull):
    """Return dq, dstate, dz and dweight.

    pull(rows, phi, g, g S^T, z) returns the rows' gradient of phi S, that of phi, and minus that of phi z (or None).
    """
    group = q.shape[2] // state.shape[1]
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dweight = None if weight is None else torch.zeros(weight.shape, dtype=torch.float32, device=q.device)
    dstate, dz = torch.zeros_like(state), torch.zeros_like(z)
    for at, rows in _slices(q, cu_seqlens, feature_map):
        x, phi = _features(q[:, rows], weight, feature_map)
        g = _heads_first(do[:, rows])
        dphi = g @ state[at].repeat_interleave(group, 1).mT
        g, dphi, mass = pull(rows, phi, g, dphi, z[at].repeat_interleave(group, 1))
        if mass is not None:
            dz[at] -= _over_groups((phi.mT @ mass).squeeze(-1), group)
        dstate[at] += _over_groups(phi.mT @ g, group)
        _store_input_grad(dq[:, rows], dweight, _activate_grad(x, phi, dphi, feature_map), q[:, rows], weight)
    return dq, dstate, dz, dweight


def _numbers(q, cu_seqlens):
    """Allocate fp32 numbers [B, H, N], one for each row of q [B, N, H, D]; 0 where no sequence may cover a row."""
    batch, length, heads, _ = q.shape
    make = torch.empty if cu_seqlens is None else torch.zeros
    return make(batch, heads, length, dtype=torch.float32, device=q.device)


def _over_groups(x, group: int):
    """Sum x [B, H, ...] over the query heads of each key head."""
    return x.unflatten(1, (-1, group)).sum(2)


def _masked(x, mask):
    """Set x [B, H, n, .] to 0 where mask [B, n] is False. A factor 0 would not do: a masked key may hold NaN."""
    return torch.where(mask[:, None, :, None], x, 0.0)


def _features(x, weight, feature_map: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits and features [B, H, n, .] of rows x [B, n, H, D], in fp32."""
    x = _heads_first(x)
    if weight is not None:
        x = x @ weight.float()
    return x, activate(x, feature_map)


def _activate_grad(x, phi, dphi, feature_map: str) -> torch.Tensor:
    """Return the gradient with respect to the logits x, given that of phi = activate(x)."""
    if feature_map == "hedgehog":
        (p, m), (dp, dm) = phi.chunk(2, -1), dphi.chunk(2, -1)
        return _softmax_grad(p, dp) - _softmax_grad(m, dm)
    if feature_map == "hedgehog_joint":
        plus, minus = _softmax_grad(phi, dphi).chunk(2, -1)
        return 2 * (plus - minus)
    if feature_map == "elu":
        return dphi * phi.clamp(max=1)  # the slope is 1 above 0 and exp(x) = phi below
    if feature_map == "relu":
        return torch.where(x > 0, dphi, 0.0)
    if feature_map == "softmax":
        return _softmax_grad(phi, dphi)
    return dphi


def _softmax_grad(p, dp) -> torch.Tensor:
    return p * (dp - (p * dp).sum(-1, keepdim=True))


def _store_input_grad(out, dweight, dx, u, weight) -> None:
    """For x = u W, write du = dx W^T into out [B, n, H, D] and add u^T dx to dweight [H, D, D]."""
    if weight is not None:
        dweight += (_heads_first(u).mT @ dx).sum(0)
        dx = dx @ weight.float().mT
    out.copy_(dx.transpose(1, 2))


def _heads_first(x) -> torch.Tensor:
    return x.transpose(1, 2).float()


def _slices(x, cu_seqlens, feature_map: str) -> Iterator[tuple[slice, slice]]:
    """Yield (states, rows): a slice of rows, and the states that it belongs to.

    These are the states of all batch entries, or that of one packed sequence.
    """
    batch, _, heads, dim = x.shape
    features = 2 * dim if feature_map in WEIGHTED_MAPS else dim
    step = max(64, CHUNK_ELEMENTS // (batch * heads * features))
    for sequence, span in enumerate(spans(x, cu_seqlens)):
        at = slice(None) if cu_seqlens is None else slice(sequence, sequence + 1)
        for start in range(span.start, span.stop, step):
            yield at, slice(start, min(start + step, span.stop))
