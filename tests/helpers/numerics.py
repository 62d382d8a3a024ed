"""The float64 truth and derived error bounds for the tests of linear attention.

The error model: a kernel rounds its factors (phi, S, dS, dx, ...) to the inputs' dtype, once each, and sums in fp32.
Independent roundings add in quadrature. So the error is about u/2 (u is the unit roundoff, u/2 the usual size of one
rounding) times the root of the sum of the squared terms, which are propagated through the formulas with v's mean
subtracted: `term_sizes(..., power=2)`. Where terms cancel, this is more than u times the result: at Nk = 1 the
gradients of q, k and the weights vanish, but their terms do not. The errors of fp32 sums, and of subtracting v's mean,
are bounded by the sum of the terms' absolute values: `term_sizes(..., power=1)`.

The options in this model:
    key_mask     A masked key is a row of zeros.
    cu_seqlens   Each sequence counts separately, and the gradients of the weights add up.
    groups       A key head has one S; dS and dz are sums over its query heads before they are rounded.
    rope         By the op's contract the rotated rows are rounded to the inputs' dtype. The truth rounds them, too, and
                 passes the gradient straight through. Rotating a gradient back keeps the norm of its error. A path that
                 rounds the gradient both before and after makes one more error of u/2 times the result, which bound 2
                 allows for.
    mix          Scales both the output of linear attention and its gradient by 1 - r; d softmax_out = r do is rounded
                 once.
    dr           A single number, whose error in eager may be small by chance, so the bound follows from the terms
                 alone. L = sum do.o changes by dphi_k with phi_k, by dS with S, and by do with o, each of which is
                 rounded once: sum phi_k^2 dphi_k^2 + sum dS^2 S^2 (v's mean subtracted) + sum do^2 o^2. A sum of many
                 independent roundings is normal, with a deviation of u/2 times the root of that. Since thousands of
                 cases are tested, the bound is 5 deviations.
"""

import torch
from cases import DTYPES, WEIGHTED, Case

from linvideo.ops.reference import linear_attn_reference, rotate, spans


def call(op, inputs: dict[str, torch.Tensor], options: dict) -> torch.Tensor:
    """Call `op` with what make_inputs and Case.options return; with "flat", rows have no batch axis inside `op`."""
    device = inputs["q"].device
    arguments, settings = dict(inputs), {name: _moved(x, device) for name, x in options.items() if name != "flat"}
    flat = options.get("flat", False) and op is not linear_attn_reference
    if flat:
        arguments |= {name: x.squeeze(0) for name, x in arguments.items() if x.dim() == 4}
    if "r" in arguments:
        settings["mix"] = arguments.pop("softmax_out"), arguments.pop("r")
    out = op(**arguments, **settings)
    return out.unsqueeze(0) if flat else out


def _moved(x, device):
    if isinstance(x, tuple):
        return tuple(part.to(device) for part in x)
    return x.to(device) if torch.is_tensor(x) else x


def run(op, inputs: dict[str, torch.Tensor], grad: torch.Tensor, options: dict) -> dict[str, torch.Tensor]:
    """Return the output and all gradients of `op` in float64: {"o", "dq", "dk", "dv"[, "dq_weight", ...]}."""
    out = call(op, inputs, options)
    assert out.dtype == grad.dtype, f"output is {out.dtype}, inputs are {grad.dtype}"
    grads = torch.autograd.grad(out, list(inputs.values()), grad)
    named = {"o": out.detach()} | {f"d{name}": g for name, g in zip(inputs, grads, strict=True)}
    for (name, x), like in zip(named.items(), (grad, *inputs.values()), strict=True):
        assert x.shape == like.shape and x.dtype == like.dtype, f"{name}: {x.shape} {x.dtype}"
    return {name: x.double() for name, x in named.items()}


def truth(inputs: dict[str, torch.Tensor], grad: torch.Tensor, options: dict) -> dict[str, torch.Tensor]:
    """Run the reference in float64 on the same (rounded) values."""
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    options = dict(options)
    rope, dtype = options.pop("rope", None), inputs["q"].dtype

    def reference(**arguments):
        if rope is not None:
            arguments |= {name: rotated(arguments[name], rope, dtype) for name in "qk"}
        return linear_attn_reference(**arguments)

    return run(reference, exact, grad.double(), options | {"flat": False})


def rotated(x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Rotate float64 x in float32 and round it to `dtype`, as the op does; the gradient ignores the rounding."""
    cos, sin = (table.to(x.device) for table in rope)
    exact = rotate(x, cos.double(), sin.double())
    rounded = rotate(x.detach().float(), cos.float(), sin.float()).to(dtype)
    return exact + (rounded - exact).detach()


def _features(name: str, u: torch.Tensor, weight: torch.Tensor | None, power: int):
    """Return phi of u [B, N, H, D], and a function `pull` for its backward.

    pull maps the sizes of the terms of phi's gradient, to `power`, to those of the gradients of u and W.
    """

    def softmax_pull(p: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        return p**power * (g + (p**power * g).sum(-1, keepdim=True))

    if name in WEIGHTED:
        x = torch.einsum("bnhd,hde->bnhe", u, weight)
        phi = [x.softmax(-1), (-x).softmax(-1)] if name == "hedgehog" else [torch.cat([2 * x, -2 * x], -1).softmax(-1)]

        def pull(g: torch.Tensor):
            if name == "hedgehog":
                dx = sum(softmax_pull(p, part) for p, part in zip(phi, g.chunk(2, -1), strict=True))
            else:
                dx = sum((2**power * softmax_pull(phi[0], g)).chunk(2, -1))
            dw = torch.einsum("bnhd,bnhe->hde", u.abs() ** power, dx)
            return torch.einsum("bnhe,hde->bnhd", dx, weight.abs() ** power), dw

        return torch.cat(phi, -1), pull
    if name == "softmax":
        return u.softmax(-1), lambda g: (softmax_pull(u.softmax(-1), g), None)
    if name == "elu":
        return torch.where(u > 0, u + 1, u.exp()), lambda g: (g * u.clamp(max=0).exp() ** power, None)
    if name == "relu":
        return u.relu(), lambda g: (g * (u > 0), None)
    return u, lambda g: (g, None)


def sum_of(equation: str, power: int, *factors: torch.Tensor) -> torch.Tensor:
    return torch.einsum(equation, *(x.abs() ** power for x in factors))


def query_terms(phi_q, do, s, z, s_terms, center, options: dict, power: int) -> dict[str, torch.Tensor]:
    """Return the values and terms of the queries' half, o = phi_q S / den; s, z, s_terms, center are per key head.

    With a = 1 / den, delta = do . o, dS = sum a phi_q^T do and dz = -sum a delta phi_q, dphi_q = a (do S^T - delta z).
    """
    group = phi_q.shape[2] // s.shape[1]
    eps, normalize = options.get("eps", 0.0), options["normalize"]

    def each(x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(group, 1)

    def over_group(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(1, (-1, group)).sum(2)

    a = torch.full_like(do[..., :1], options.get("scale", 1.0))
    if normalize:
        a = 1 / (torch.einsum("bnhf,bhf->bnh", phi_q, each(z)) + eps)[..., None]
    o = a * (torch.einsum("bnhf,bhfd->bnhd", phi_q, each(s)) - eps * normalize * each(center)[:, None])
    delta = (do * o).sum(-1, keepdim=True) * normalize
    ds = over_group(torch.einsum("bnhf,bnhd->bhfd", a * phi_q, do))
    dz = -over_group((a * delta * phi_q).sum(1))
    o_terms = a.abs() ** power * torch.einsum("bnhf,bhfd->bnhd", phi_q.abs() ** power, each(s_terms))
    delta_terms = (do.abs() ** power * o_terms).sum(-1, keepdim=True) * normalize + delta.abs() ** power
    dphi_q = torch.einsum("bnhd,bhfd->bnhf", do.abs() ** power, each(s_terms))
    dphi_q += delta_terms * (each(z).abs() ** power)[:, None]
    ds_terms = over_group(sum_of("bnhf,bnhd->bhfd", power, a * phi_q, do))
    dz_terms = over_group(((a * phi_q).abs() ** power * delta_terms).sum(1))
    return {
        "o": o,
        "ds": ds,
        "dz": dz,
        "o_terms": o_terms,
        "dphi_terms": a.abs() ** power * dphi_q,
        "ds_terms": ds_terms,
        "dz_terms": dz_terms,
    }


def key_terms(phi_k, v, ds_terms, dz_terms, power: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the terms of the keys' half: dphi_k = v dS^T + dz and dv = phi_k dS."""
    dphi = torch.einsum("bnhd,bhfd->bnhf", v.abs() ** power, ds_terms) + dz_terms[:, None]
    return dphi, torch.einsum("bnhf,bhfd->bnhd", phi_k.abs() ** power, ds_terms)


def clean(inputs: dict, options: dict) -> dict[str, torch.Tensor]:
    """Return the inputs in float64, with rows rotated and masked keys set to 0."""
    u = {name: x.detach().double() for name, x in inputs.items()}
    for name in "qk":
        if "rope" in options and name in u:
            u[name] = rotated(u[name], options["rope"], inputs[name].dtype)
    if "key_mask" in options:
        keep = options["key_mask"].to(u["k"].device)[..., None, None]
        u |= {name: torch.where(keep, u[name], 0.0) for name in "kv"}
    return u


@torch.no_grad()
def term_sizes(
    inputs: dict, grad: torch.Tensor, options: dict, power: int, about_mean: bool = True
) -> dict[str, float]:
    """Return, for each result, the norm of (sum |term|^power)^(1/power) over the terms of all sums that lead to it.

    At power 2, c = sum_f S_f / sum_f z_f is subtracted from v if `about_mean`.
    """
    u, name = clean(inputs, options), options["feature_map"]
    phi_q, pull_q = _features(name, u["q"], u.get("q_weight"), power)
    phi_k, pull_k = _features(name, u["k"], u.get("k_weight"), power)
    keep = torch.ones_like(phi_k[..., :1, :1])
    if "key_mask" in options:
        keep = options["key_mask"].to(keep)[..., None, None]
    phi_k, v, do = phi_k * keep, u["v"], grad.double()
    rows: dict[str, list[torch.Tensor]] = {"o": [], "dphi_q": [], "dphi_k": [], "dv": []}
    dr = torch.zeros((), dtype=torch.float64, device=v.device)
    sequences = zip(spans(phi_q, options.get("cu_seqlens_q")), spans(phi_k, options.get("cu_seqlens_k")), strict=True)
    for queries, keys in sequences:
        values, g = v[:, keys], do[:, queries]
        s, z = torch.einsum("bnhf,bnhd->bhfd", phi_k[:, keys], values), phi_k[:, keys].sum(1)
        center = torch.zeros_like(s[:, :, 0])
        if options["normalize"] and power == 2 and about_mean:
            center = s.sum(2) / z.sum(-1, keepdim=True).clamp(min=1e-300)
            values, s = values - center[:, None], s - z[..., None] * center[:, :, None]
        s_terms = s.abs() ** power + sum_of("bnhf,bnhd->bhfd", power, phi_k[:, keys], values)
        half = query_terms(phi_q[:, queries], g, s, z, s_terms, center, options, power)
        ds_terms, dz_terms = (half[x].abs() ** power + half[f"{x}_terms"] for x in ("ds", "dz"))
        dphi_k, dv = key_terms(phi_k[:, keys], values, ds_terms, dz_terms, power)
        for part, x in zip(rows.values(), (half["o_terms"], half["dphi_terms"], dphi_k, dv), strict=True):
            part.append(x)
        out = half["o"] + center.repeat_interleave(g.shape[2] // center.shape[1], 1)[:, None]
        moves = torch.einsum("bnhd,bhfd->bnhf", values, half["ds"]) + half["dz"][:, None]
        dr += sum((x.abs() ** power).sum() for x in (phi_k[:, keys] * moves, half["ds"] * s, g * out))
    o, dphi_q, dphi_k, dv = (torch.cat(parts, 1) for parts in rows.values())
    (dq, dq_weight), (dk, dk_weight) = pull_q(dphi_q), pull_k(dphi_k * keep)
    sizes = {"o": o, "dq": dq, "dk": dk, "dv": dv, "dq_weight": dq_weight, "dk_weight": dk_weight}
    if "r" in u:
        r = u["r"]
        sizes = {name: x * (1 - r).abs() ** power for name, x in sizes.items() if x is not None}
        sizes |= {"dsoftmax_out": (r * do).abs() ** power, "dr": dr}
        if power == 1:
            sizes["dr"] = dr + (do * u["softmax_out"]).abs().sum()
    return {name: (x ** (1 / power)).norm().item() for name, x in sizes.items() if x is not None}


def unit_roundoff(dtype: torch.dtype) -> float:
    """Return the largest relative error of rounding to nearest: 2^-24, 2^-11 and 2^-8 for fp32, fp16 and bf16."""
    return torch.finfo(dtype).eps / 2


def check(case: Case, inputs: dict, grad: torch.Tensor, actual: dict[str, torch.Tensor], either: bool = False) -> None:
    """Assert that every result is finite and that its error, a norm over the tensor, is within two bounds.

    1. Twice the error of eager PyTorch in the same dtype, plus u/2 of the terms before cancellation, plus fp32's error.
    2. Independent of eager: u times the result and the terms before cancellation, added in quadrature, plus fp32's
       error.
    dr has a single bound: 2.5u times its terms, plus fp32's error.

    With `either`, one of the two bounds is enough, and v's mean is not subtracted. This is for randomly combined
    options: few rows, masks of whole sequences and RoPE in one case lead to errors that are rounded several times, in
    eager as in the kernels. dr then gets three times its bound, because all outputs of a sequence with one key are the
    same row, whose roundings add up. Where eager's fp16 overflows, the result then only has to be finite.

    fp32's error is 4 roundoffs of the sum of absolute terms, plus the error of the logits. Logits of size x carry about
    x roundoffs (2x for hedgehog_joint), which exp turns into a relative error; 8 times that is allowed. If logits are
    products with a weight, the sums over D are rounded, too, in an order that depends on the processor. In quadrature
    these are sqrt(D) roundoffs of x, for q and for k; 6 sqrt(D) is four deviations of both together.
    """
    exact = truth(inputs, grad, case.options)
    eager = run(linear_attn_reference, inputs, grad, case.options)
    squares = term_sizes(inputs, grad, case.options, 2, about_mean=not either)
    absolutes = term_sizes(inputs, grad, case.options, 1)
    fp32, u = unit_roundoff(torch.float32), unit_roundoff(DTYPES[case.dtype])
    roundings = 6 * case.head_dim**0.5 if case.map[0] in WEIGHTED else 8
    subnormal = u * torch.finfo(DTYPES[case.dtype]).tiny  # half a step between subnormal results
    lines = []
    for name, true in exact.items():
        error, theirs = (actual[name] - true).norm().item(), (eager[name] - true).norm().item()
        theirs = theirs if theirs == theirs else float("inf")  # eager fp16 may overflow; bound 2 still applies
        size = (true.norm().item() ** 2 + squares[name] ** 2) ** 0.5
        floor = 4 * fp32 * absolutes[name] + roundings * case.logits * fp32 * size + subnormal * true.numel() ** 0.5
        first, second = 2 * theirs + u / 2 * squares[name] + floor, u * size + floor
        if name == "dr":
            second = (7.5 if either else 2.5) * u * squares[name] + floor
            first = first if either else second
        bound = max(first, second) if either else min(first, second)
        numbers = (
            f"error {error:.2e} of {true.norm().item():.2e}, eager {theirs:.2e}, bounds {first:.2e} and {second:.2e}"
        )
        if not torch.isfinite(actual[name]).all():
            lines.append(f"{name}: {(~torch.isfinite(actual[name])).sum()} of {true.numel()} values are not finite")
        elif error > bound:
            lines.append(f"{name}: {numbers}")
    assert not lines, "\n".join([str(case), *lines])
