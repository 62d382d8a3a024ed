"""Forward-mode derivatives of linear attention, in plain PyTorch on every device, one slice of rows at a time.

With x = u W and dx = du W + u dW, the tangent of phi is J dx, where the Jacobian J of every feature map is symmetric in
the logits. Then, with den = phi(q) z + eps,
    state   dS = sum_m dphi(k_m)^T v_m + phi(k_m)^T dv_m, dz = sum_m dphi(k_m)
    apply   do = (dphi(q) S + phi(q) dS - o (dphi(q) z + phi(q) dz)) / den
A tangent that is None is 0. The kernels have no such pass: on CUDA a slice holds more rows, and its products are
PyTorch's.
"""

import torch
from torch import Tensor

from linvideo.ops import chunked
from linvideo.ops.library import differentiate_never, fake, operator, tensors
from linvideo.ops.reference import sum_dtype


@operator("linear_attn_state_tangent")
def state_tangent_op(
    k: Tensor,
    v: Tensor,
    weight: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dweight: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    feature_map: str,
) -> tuple[Tensor, Tensor]:
    """Return the tangents of S and z."""
    with torch.autocast(k.device.type, enabled=False):
        dstate, dz = chunked.new_state(k, cu_seqlens, feature_map)
        for at, rows in chunked.slices(k, cu_seqlens, feature_map):
            phi, dphi = _features(k, weight, dk, dweight, rows, feature_map)
            values = chunked.heads_first(v[:, rows])
            dvalues = None if dv is None else chunked.heads_first(dv[:, rows])
            if key_mask is not None:
                keep = key_mask[:, rows]
                phi, dphi, values, dvalues = (chunked.masked(x, keep) for x in (phi, dphi, values, dvalues))
            if dphi is not None:
                dstate[at] += dphi.mT @ values
                dz[at] += dphi.sum(-2)
            if dvalues is not None:
                dstate[at] += phi.mT @ dvalues
    return dstate, dz


@operator("linear_attn_apply_tangent")
def apply_tangent_op(
    q: Tensor,
    state: Tensor,
    z: Tensor,
    weight: Tensor | None,
    dq: Tensor | None,
    dstate: Tensor | None,
    dz: Tensor | None,
    dweight: Tensor | None,
    cu_seqlens: Tensor | None,
    feature_map: str,
    scale: float,
    normalize: bool,
    eps: float,
    return_normalizer: bool,
) -> tuple[Tensor, Tensor]:
    """Return the tangents of o and, if `return_normalizer`, of phi(q) z."""
    group = q.shape[2] // state.shape[1]
    do, dden = chunked.new_rows(q, cu_seqlens), chunked.new_numbers(q, cu_seqlens) if return_normalizer else None
    with torch.autocast(q.device.type, enabled=False):
        dstate, dz = (torch.zeros_like(x) if dx is None else dx for x, dx in ((state, dstate), (z, dz)))
        if normalize:  # as in `chunked`; then the tangent of den is multiplied by o - c
            center = chunked.mean(state, z)
            state, dstate = (chunked.centered(x, mass, center) for x, mass in ((state, z), (dstate, dz)))
        for at, rows in chunked.slices(q, cu_seqlens, feature_map):
            phi, dphi = _features(q, weight, dq, dweight, rows, feature_map)
            s, ds, mass, dmass = (chunked.over_group(x[at], group) for x in (state, dstate, z, dz))
            out = phi @ ds if dphi is None else dphi @ s + phi @ ds
            if normalize:
                mass, dmass = mass.unsqueeze(-1), dmass.unsqueeze(-1)
                den, change = phi @ mass + eps, phi @ dmass if dphi is None else dphi @ mass + phi @ dmass
                rest = (phi @ s - eps * chunked.over_group(center[at], group)) / den  # o - c
                out = (out - change * rest) / den
                if dden is not None:
                    dden[..., rows] = change.squeeze(-1)
            else:
                out = out * scale
            do[:, rows] = out.transpose(1, 2)
    return do, *tensors(state, dden)


def _features(u, weight, du, dweight, rows: slice, feature_map: str) -> tuple[Tensor, Tensor | None]:
    """Return phi of some rows of u and its tangent, or None if that is 0."""
    x, phi = chunked.features(u[:, rows], weight, feature_map)
    terms = []
    if du is not None:
        terms.append(chunked.logits(du[:, rows], weight))
    if dweight is not None:
        terms.append(chunked.logits(u[:, rows], dweight))
    return phi, chunked.activate_tangent(x, phi, sum(terms), feature_map) if terms else None


@fake(state_tangent_op)
def _(k, v, weight, dk, dv, dweight, key_mask, cu_seqlens, feature_map):
    return tuple(k.new_empty(x, dtype=sum_dtype(k)) for x in chunked.state_shapes(k, cu_seqlens, feature_map))


@fake(apply_tangent_op)
def _(q, state, z, weight, dq, dstate, dz, dweight, cu_seqlens, *settings):
    batch, length, heads, _ = q.shape
    return q.new_empty(q.shape), state.new_empty((batch, heads, length) if settings[-1] else 0)


differentiate_never(state_tangent_op, (2, 2, 0, 2, 2, 0, None, None), (1, 1))
differentiate_never(apply_tangent_op, (2, 1, 1, 0, 2, 1, 1, 0, None), (2, 1))
