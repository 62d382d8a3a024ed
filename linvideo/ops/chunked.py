"""`linear_attn` in plain PyTorch, a slice of rows at a time: what CPU tensors run. fp32 inside; nothing of size N F.

forward : S = sum_m phi(k_m)^T v_m [B, H, F, D], z = sum_m phi(k_m) [B, H, F], o = phi(q) S / (phi(q) z + eps).
backward: with a = 1 / den and delta = do.o, dS = sum a phi(q)^T do, dz = -sum a delta phi(q), dv = phi(k) dS,
          dphi(q) = a (do S^T - delta z), dphi(k) = v dS^T + dz; every phi is computed again.
"""

from collections.abc import Iterator

import torch

from linvideo.ops.reference import activate

CHUNK_ELEMENTS = 1 << 20  # features alive at a time: 4 MB, so that a slice stays in the cache


def forward(q, k, v, q_weight, k_weight, feature_map: str, scale: float, normalize: bool, eps: float):
    """Returns o in q's dtype and the fp32 sums S [B, H, F, D] and z [B, H, F] that the backward needs."""
    state, z = _state(k, v, k_weight, feature_map)
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for rows in _slices(q, feature_map):
        _, phi = _features(q[:, rows], q_weight, feature_map)
        if normalize:
            out = (phi @ state) / _denominator(phi, z, eps)
        else:
            out = (phi @ state) * scale
        o[:, rows] = out.transpose(1, 2)
    return o, state, z


def backward(do, q, k, v, q_weight, k_weight, state, z, feature_map: str, scale: float, normalize: bool, eps: float):
    """Returns dq, dk, dv in the inputs' dtypes and dq_weight, dk_weight in the weights' (None for None)."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dq_weight, dk_weight = (
        None if w is None else w.new_zeros(w.shape, dtype=torch.float32) for w in (q_weight, k_weight)
    )
    dstate, dz = torch.zeros_like(state), torch.zeros_like(z)
    for rows in _slices(q, feature_map):
        x, phi = _features(q[:, rows], q_weight, feature_map)
        g = _heads_first(do[:, rows])
        dphi = g @ state.mT
        if normalize:
            den = _denominator(phi, z, eps)
            g = g / den
            delta = (phi * dphi).sum(-1, keepdim=True) / den
            dphi = (dphi - delta * z.unsqueeze(-2)) / den
            dz -= (phi.mT @ (delta / den)).squeeze(-1)
        else:
            g, dphi = g * scale, dphi * scale
        dstate += phi.mT @ g
        _store_input_grad(dq[:, rows], dq_weight, _activate_grad(x, phi, dphi, feature_map), q[:, rows], q_weight)
    for rows in _slices(k, feature_map):
        x, phi = _features(k[:, rows], k_weight, feature_map)
        dv[:, rows] = (phi @ dstate).transpose(1, 2)
        dphi = _heads_first(v[:, rows]) @ dstate.mT + dz.unsqueeze(-2)
        _store_input_grad(dk[:, rows], dk_weight, _activate_grad(x, phi, dphi, feature_map), k[:, rows], k_weight)
    if q_weight is not None:
        dq_weight, dk_weight = dq_weight.to(q_weight.dtype), dk_weight.to(k_weight.dtype)
    return dq, dk, dv, dq_weight, dk_weight


def _state(k, v, k_weight, feature_map: str) -> tuple[torch.Tensor, torch.Tensor]:
    batch, _, heads, dim = k.shape
    features = 2 * dim if feature_map == "hedgehog" else dim
    state = torch.zeros(batch, heads, features, dim, dtype=torch.float32, device=k.device)
    z = torch.zeros(batch, heads, features, dtype=torch.float32, device=k.device)
    for rows in _slices(k, feature_map):
        _, phi = _features(k[:, rows], k_weight, feature_map)
        state += phi.mT @ _heads_first(v[:, rows])
        z += phi.sum(-2)
    return state, z


def _denominator(phi, z, eps: float):
    return phi @ z.unsqueeze(-1) + eps  # [B, H, n, 1]


def _features(x, weight, feature_map: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and features [B, H, n, .] in fp32 of rows x [B, n, H, D]."""
    x = _heads_first(x)
    if weight is not None:
        x = x @ weight.float()
    return x, activate(x, feature_map)


def _activate_grad(x, phi, dphi, feature_map: str) -> torch.Tensor:
    """Gradient with respect to the logits x of `activate`."""
    if feature_map == "hedgehog":
        (p, m), (dp, dm) = phi.chunk(2, -1), dphi.chunk(2, -1)
        return _softmax_grad(p, dp) - _softmax_grad(m, dm)
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
    """x = u W: writes du = dx W^T into out [B, n, H, D] and adds u^T dx to dweight [H, D, D]."""
    if weight is not None:
        dweight += (_heads_first(u).mT @ dx).sum(0)
        dx = dx @ weight.float().mT
    out.copy_(dx.transpose(1, 2))


def _heads_first(x) -> torch.Tensor:
    return x.transpose(1, 2).float()


def _slices(x, feature_map: str) -> Iterator[slice]:
    batch, length, heads, dim = x.shape
    features = 2 * dim if feature_map == "hedgehog" else dim
    step = max(64, CHUNK_ELEMENTS // (batch * heads * features))
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
