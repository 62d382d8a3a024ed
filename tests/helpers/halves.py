"""The float64 truth and error bounds for linear_attn_state and linear_attn_apply on their own; they share S and z.

The error model is that of numerics. S and z are sums of features that were rounded once, so their errors are u/2 times
the root of the sum of squared terms; they are fp32 and not rounded again. The same holds for dS and dz of the queries'
half: dz_f = -sum a delta phi_f, with delta = do.(o - c) + do.c, changes by a (delta + do.c) with phi. The rounding of S
changes all of dz together, so the norm of dz varies like a single number. Like dr it gets 4 deviations instead of 2.
"""

import torch
from cases import DTYPES, Case, make_inputs
from numerics import _features, _moved, clean, key_terms, query_terms, rotated, sum_of, unit_roundoff

from linvideo.ops import linear_attn_apply, linear_attn_state
from linvideo.ops.reference import features, spans


def state_reference(k, v, options: dict, k_weight=None, dtype=None):
    """Return S and z in k's (float64) precision; with rope, k is rotated and rounded to `dtype` first."""
    if "rope" in options:
        k = rotated(k, options["rope"], dtype)
    keep = options.get("key_mask")
    if keep is not None:
        keep = keep.to(k.device)[..., None, None]
        k, v = (torch.where(keep, x, 0.0) for x in (k, v))
    phi = features(k, k_weight, None, options["feature_map"])
    phi = phi if keep is None else phi * keep
    parts = [(phi[:, keys], v[:, keys]) for keys in spans(k, options.get("cu_seqlens_k"))]
    state = torch.cat([torch.einsum("bmhf,bmhd->bhfd", phi, v) for phi, v in parts])
    return state, torch.cat([phi.sum(1) for phi, _ in parts])


def apply_reference(q, state, z, options: dict, q_weight=None, softmax_out=None, r=None, dtype=None):
    """Return the output in q's (float64) precision; with rope, q is rotated and rounded to `dtype` first."""
    if "rope" in options:
        q = rotated(q, options["rope"], dtype)
    phi = features(q, q_weight, None, options["feature_map"])
    group = q.shape[2] // state.shape[1]
    state, z = (x.repeat_interleave(group, 1) for x in (state, z))
    outputs = []
    for i, queries in enumerate(spans(q, options.get("cu_seqlens_q"))):
        at = slice(i, i + 1) if "cu_seqlens_q" in options else slice(None)
        out = torch.einsum("bnhf,bhfd->bnhd", phi[:, queries], state[at])
        if options["normalize"]:
            out = out / (torch.einsum("bnhf,bhf->bnh", phi[:, queries], z[at]) + options["eps"])[..., None]
        else:
            out = out * options["scale"]
        outputs.append(out)
    out = torch.cat(outputs, 1)
    return out if r is None else r * softmax_out + (1 - r) * out


def _grads(outputs, inputs: dict, grads) -> dict[str, torch.Tensor]:
    found = torch.autograd.grad(outputs, list(inputs.values()), grads, allow_unused=True)
    named = zip(inputs, found, strict=True)
    return {f"d{name}": torch.zeros_like(inputs[name]) if x is None else x.double() for name, x in named}


def _double(inputs: dict) -> dict[str, torch.Tensor]:
    return {name: x.detach().double().requires_grad_() for name, x in inputs.items()}


def _assert_close(case: Case, actual: dict, exact: dict, squares: dict, absolutes: dict, exempt=("S", "z")) -> None:
    """Assert bound 2 of numerics.check. The results in `exempt` are not rounded to the inputs' dtype."""
    fp32, u = unit_roundoff(torch.float32), unit_roundoff(DTYPES[case.dtype])
    lines = []
    for name, true in exact.items():
        error = (actual[name] - true).norm().item()
        size = (true.norm().item() ** 2 * (name not in exempt) + squares[name] ** 2) ** 0.5
        subnormal = u * torch.finfo(DTYPES[case.dtype]).tiny * true.numel() ** 0.5
        bound = u * size + 4 * fp32 * absolutes[name] + 8 * case.logits * fp32 * size + subnormal
        if name in ("dr", "dz"):
            bound += u * size
        if not error <= bound:
            lines.append(f"{name}: error {error:.2e} of {true.norm().item():.2e}, bound {bound:.2e}")
    assert not lines, "\n".join([str(case), *lines])


def _norms(terms: dict, power: int) -> dict[str, float]:
    return {name: (x ** (1 / power)).norm().item() for name, x in terms.items() if x is not None}


def check_state(case: Case, device: str) -> None:
    """Check S and z and, for random gradients of S and z, the gradients of k, v and the weight."""
    inputs, _ = make_inputs(case, device)
    inputs = {name: inputs[name] for name in ("k", "v", "k_weight") if name in inputs}
    taken = ("feature_map", "rope", "key_mask", "cu_seqlens_k")
    options = {name: x for name, x in case.options.items() if name in taken}
    exact_inputs = _double(inputs)
    exact = state_reference(options=options, dtype=DTYPES[case.dtype], **exact_inputs)
    rng = torch.Generator().manual_seed(3)
    grads = [torch.randn(x.shape, generator=rng).to(device) for x in exact]
    actual = linear_attn_state(**inputs, **{name: _moved(x, torch.device(device)) for name, x in options.items()})
    assert all(x.dtype == torch.float32 and x.shape == y.shape for x, y in zip(actual, exact, strict=True))
    terms = [_state_terms(case, inputs, options, *(g.double() for g in grads), power) for power in (2, 1)]
    exact_grads = _grads(exact, exact_inputs, [g.double() for g in grads])
    actual_grads = _grads(actual, inputs, grads)
    named = [dict(zip(("S", "z"), (x.detach().double() for x in pair), strict=True)) for pair in (actual, exact)]
    _assert_close(case, named[0] | actual_grads, named[1] | exact_grads, *terms)


@torch.no_grad()
def _state_terms(case: Case, inputs: dict, options: dict, ds, dz, power: int) -> dict[str, float]:
    u = clean(inputs, options)
    phi, pull = _features(case.map[0], u["k"], u.get("k_weight"), power)
    keep = torch.ones_like(phi[..., :1, :1])
    if "key_mask" in options:
        keep = options["key_mask"].to(keep)[..., None, None]
    phi, v = phi * keep, u["v"]
    state_terms, z_terms, dphi, dv = [], [], [], []
    for i, keys in enumerate(spans(phi, options.get("cu_seqlens_k"))):
        at = slice(i, i + 1) if "cu_seqlens_k" in options else slice(None)
        state_terms.append(sum_of("bnhf,bnhd->bhfd", power, phi[:, keys], v[:, keys]))
        z_terms.append((phi[:, keys].abs() ** power).sum(1))
        parts = key_terms(phi[:, keys], v[:, keys], ds[at].abs() ** power, dz[at].abs() ** power, power)
        dphi.append(parts[0])
        dv.append(parts[1])
    dk, dweight = pull(torch.cat(dphi, 1) * keep)
    terms = {"S": torch.cat(state_terms), "z": torch.cat(z_terms), "dk": dk, "dv": torch.cat(dv, 1)}
    return _norms(terms | {"dk_weight": dweight}, power)


def check_apply(case: Case, device: str, rounds_gradient: bool = False) -> None:
    """Check o and the gradients of q, S, z, the weight and the mixture; S and z are fp32 inputs of their own.

    rounds_gradient: Whether (1 - r) do is rounded before dS and dz are computed from it; if do is constant, so is that
    error.
    """
    inputs, grad = make_inputs(case, device)
    keys = {name: inputs[name] for name in ("k", "v", "k_weight") if name in inputs}
    state = state_reference(options=case.options, dtype=DTYPES[case.dtype], **_double(keys))
    leaves = dict(zip(("S", "z"), (x.detach().float().requires_grad_() for x in state), strict=True))
    inputs = {name: x for name, x in inputs.items() if name not in keys}
    taken = ("feature_map", "rope", "cu_seqlens_q", "scale", "normalize", "eps")
    options = {name: _moved(x, torch.device(device)) for name, x in case.options.items() if name in taken}
    exact_inputs = _double(inputs | leaves)
    named = {"state" if name == "S" else name: x for name, x in exact_inputs.items()}
    exact = apply_reference(options=options, dtype=DTYPES[case.dtype], **named)
    arguments = dict(inputs)
    mix = {"mix": (arguments.pop("softmax_out"), arguments.pop("r"))} if "r" in inputs else {}
    actual = linear_attn_apply(**arguments, **leaves, **mix, **options)
    terms = [_apply_terms(inputs | leaves, grad.double(), options, power) for power in (2, 1)]
    results = {"o": actual.detach().double()} | _grads(actual, inputs | leaves, grad)
    truths = {"o": exact.detach()} | _grads(exact, exact_inputs, grad.double())
    if case.dtype == "fp16":  # where no key has the feature, the gradient may be 0, by contract, or the right one
        nobody = leaves["z"] == 0
        for name in ("dS", "dz"):
            at = nobody if name == "dz" else nobody[..., None]
            allowed = torch.where(at, 0.0, truths[name])
            truths[name] = torch.where(at & (results[name] != 0), truths[name], allowed)
    _assert_close(case, results, truths, *terms, () if rounds_gradient and "r" in inputs else ("dS", "dz"))


@torch.no_grad()
def _apply_terms(inputs: dict, do, options: dict, power: int) -> dict[str, float]:
    u = clean({name: x for name, x in inputs.items() if name not in ("S", "z")}, options)
    phi, pull = _features(options["feature_map"], u["q"], u.get("q_weight"), power)
    state, mass = inputs["S"].detach().double(), inputs["z"].detach().double()
    parts: dict[str, list] = {name: [] for name in ("o", "dphi", "dS", "dz")}
    dr = torch.zeros((), dtype=torch.float64, device=do.device)
    for i, queries in enumerate(spans(phi, options.get("cu_seqlens_q"))):
        at = slice(i, i + 1) if "cu_seqlens_q" in options else slice(None)
        s, z, g = state[at], mass[at], do[:, queries]
        center = torch.zeros_like(s[:, :, 0])
        if options["normalize"] and power == 2:
            center = s.sum(2) / z.sum(-1, keepdim=True).clamp(min=1e-300)
            s = s - z[..., None] * center[:, :, None]
        half = query_terms(phi[:, queries], g, s, z, s.abs() ** power, center, options, power)
        parts["o"].append(half["o_terms"])
        parts["dphi"].append(half["dphi_terms"])
        parts["dS"].append(half["ds_terms"])
        parts["dz"].append(half["dz_terms"] + _shared_terms(phi[:, queries], g, s, z, center, options, power))
        out = half["o"] + center.repeat_interleave(g.shape[2] // center.shape[1], 1)[:, None]
        dr += sum((x.abs() ** power).sum() for x in (half["ds"] * s, g * out))
    o, dphi, ds, dz = (torch.cat(parts[name], 0 if name[1:] in ("S", "z") else 1) for name in parts)
    if "cu_seqlens_q" not in options:
        ds, dz = ds[: state.shape[0]], dz[: state.shape[0]]
    dq, dweight = pull(dphi)
    terms = {"o": o, "dq": dq, "dq_weight": dweight, "dS": ds, "dz": dz}
    if "r" in inputs:
        r = u["r"]
        terms = {name: x * (1 - r).abs() ** power for name, x in terms.items() if x is not None}
        terms |= {"dsoftmax_out": (r * do).abs() ** power, "dr": dr}
        if power == 1:
            terms["dr"] = dr + (do * u["softmax_out"]).abs().sum()
    return _norms(terms, power)


def _shared_terms(phi, do, s, z, center, options: dict, power: int):
    """Return the terms of dz that add up along the rows.

    These are sum_n |a phi do.c|^power for a mean c of v, and the error of the one rounding of S, which all rows share
    in delta: |S_gd sum_n a^2 phi_f phi_g do_d|^power over g and d.
    """
    if not options["normalize"]:
        return 0.0
    group = phi.shape[2] // z.shape[1]
    mass, mean = (x.repeat_interleave(group, 1) for x in (z, center))
    shares = phi / (torch.einsum("bnhf,bhf->bnh", phi, mass) + options["eps"])[..., None]
    along = torch.einsum("bnhd,bhd->bnh", do, mean)[..., None] * shares
    moves = torch.einsum("bnhf,bnhg,bnhd->bhfgd", shares, shares, do).unflatten(1, (-1, group)).sum(2)
    rounding = (moves * s[:, :, None]).abs().pow(power).sum((-1, -2))
    return along.abs().pow(power).sum(1).unflatten(1, (-1, group)).sum(2) + rounding
