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
from linvideo.ops.library import differentiate_never, fake, operator, tensors, without_autocast


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
    with without_autocast(k):
        dstate, dz = chunked.new_state(k, cu_seqlens, feature_map)
        weights = [chunked.rounded(w, k) for w in (weight, dweight)]
        for part in chunked.slices(k, cu_seqlens, feature_map):
            phi, dphi = _features(part, k, dk, *weights, feature_map)
            values, dvalues = (None if x is None else part.take(x) for x in (v, dv))
            if key_mask is not None:
                phi, dphi, values, dvalues = (
                    None if x is None else part.masked(x, key_mask) for x in (phi, dphi, values, dvalues)
                )
            if dphi is not None:
                part.sums(dstate).baddbmm_(dphi.mT, values)
                part.sums(dz).add_(dphi.sum(-2))
            if dvalues is not None:
                part.sums(dstate).baddbmm_(phi.mT, dvalues)
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
    with without_autocast(q):
        weights = [chunked.rounded(w, q) for w in (weight, dweight)]
        dstate, dz = (torch.zeros_like(x) if dx is None else dx for x, dx in ((state, dstate), (z, dz)))
        center = chunked.mean(state, z, feature_map, normalize)
        # As in `chunked`. Then the tangent of den is multiplied by o - c.
        state, dstate = (chunked.centered(x, mass, center) for x, mass in ((state, z), (dstate, dz)))
        state, dstate, z, dz, center = (chunked.over_group(x, group) for x in (state, dstate, z, dz, center))
        for part in chunked.slices(q, cu_seqlens, feature_map):
            phi, dphi = _features(part, q, dq, *weights, feature_map)
            s, ds, mass, dmass = (part.sums(x) for x in (state, dstate, z, dz))
            out = phi @ ds if dphi is None else dphi @ s + phi @ ds
            if normalize:
                mass, dmass = mass.unsqueeze(-1), dmass.unsqueeze(-1)
                den, change = phi @ mass + eps, phi @ dmass if dphi is None else dphi @ mass + phi @ dmass
                rest = phi @ s if center is None else phi @ s - eps * part.sums(center)
                out = (out - change * rest / den) / den
                if dden is not None:
                    part.put_numbers(dden, change)
            else:
                out = out * scale
            part.put(do, out)
    return do, *tensors(state, dden)


def _features(part: chunked.Slice, u, du, weight, dweight, feature_map: str) -> tuple[Tensor, Tensor | None]:
    """Return phi [B H, n, F] of a slice of rows u and its tangent, or None if that is 0."""
    rows, weight, dweight = part.take(u), part.weight(weight), part.weight(dweight)
    phi = chunked.features(part, rows, weight, feature_map)
    terms = []
    if du is not None:
        terms.append(part.take(du) if weight is None else part.take(du) @ weight)
    if dweight is not None:
        terms.append(rows @ dweight)
    dx = sum(terms[1:], terms[0].clone()) if terms else None
    dphi = torch.cat(chunked.activate_tangent(part, phi, dx, feature_map), -1) if terms else None
    return torch.cat(phi, -1), dphi


@fake(state_tangent_op)
def _(k, v, weight, dk, dv, dweight, key_mask, cu_seqlens, feature_map):
    return chunked.empty_state(k, cu_seqlens, feature_map)


@fake(apply_tangent_op)
def _(q, state, z, weight, dq, dstate, dz, dweight, cu_seqlens, *settings):
    batch, length, heads, _ = q.shape
    return q.new_empty(q.shape), state.new_empty((batch, heads, length) if settings[-1] else 0)


differentiate_never(state_tangent_op, (2, 2, 0, 2, 2, 0, None, None), (1, 1))
differentiate_never(apply_tangent_op, (2, 1, 1, 0, 2, 1, 1, 0, None), (2, 1))
