"""Float64 truth and derived error bounds for the tests of linear attention.

Error model. A kernel rounds its factors (phi, S, dS, dx, ...) to the inputs' dtype, once each, and sums in fp32.
Independent roundings add in quadrature: the error is about u/2 (u: the unit roundoff, u/2: the usual size of one
rounding) times the root of the sum of the squared terms, propagated through the formulas, v taken about its mean:
`term_sizes(..., power=2)`. Where terms cancel this is more than u times the result: at Nk = 1 the gradients of q, k
and the weights vanish, but their terms do not. fp32 sums, and taking off v's mean, are bounded by the sum of the
terms' absolute values: `term_sizes(..., power=1)`.
"""

import torch
from cases import DTYPES, Case

from linvideo.ops.reference import linear_attn_reference


def run(op, inputs: dict[str, torch.Tensor], grad: torch.Tensor, options: dict) -> dict[str, torch.Tensor]:
    """Output and every gradient of `op`, in float64: {"o", "dq", "dk", "dv"[, "dq_weight", "dk_weight"]}."""
    out = op(**inputs, **options)
    assert out.dtype == grad.dtype, f"output is {out.dtype}, inputs are {grad.dtype}"
    grads = torch.autograd.grad(out, list(inputs.values()), grad)
    named = {"o": out.detach()} | {f"d{name}": g for name, g in zip(inputs, grads, strict=True)}
    for (name, x), like in zip(named.items(), (grad, *inputs.values()), strict=True):
        assert x.shape == like.shape and x.dtype == like.dtype, f"{name}: {x.shape} {x.dtype}"
    return {name: x.double() for name, x in named.items()}


def truth(inputs: dict[str, torch.Tensor], grad: torch.Tensor, options: dict) -> dict[str, torch.Tensor]:
    """`run` of the reference in float64 on the same (rounded) values."""
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    return run(linear_attn_reference, exact, grad.double(), options)


def _features(name: str, u: torch.Tensor, weight: torch.Tensor | None, power: int):
    """(phi, pull) of u [B, N, H, D]; pull takes the terms' sizes of phi's gradient, to `power`, to those of u and W."""

    def softmax_pull(p: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        return p**power * (g + (p**power * g).sum(-1, keepdim=True))

    if name == "hedgehog":
        x = torch.einsum("bnhd,hde->bnhe", u, weight)
        p, m = x.softmax(-1), (-x).softmax(-1)

        def pull(g: torch.Tensor):
            g_p, g_m = g.chunk(2, -1)
            dx = softmax_pull(p, g_p) + softmax_pull(m, g_m)
            dw = torch.einsum("bnhd,bnhe->hde", u.abs() ** power, dx)
            return torch.einsum("bnhe,hde->bnhd", dx, weight.abs() ** power), dw

        return torch.cat([p, m], -1), pull
    if name == "softmax":
        return u.softmax(-1), lambda g: (softmax_pull(u.softmax(-1), g), None)
    if name == "elu":
        return torch.where(u > 0, u + 1, u.exp()), lambda g: (g * u.clamp(max=0).exp() ** power, None)
    if name == "relu":
        return u.relu(), lambda g: (g * (u > 0), None)
    return u, lambda g: (g, None)


@torch.no_grad()
def term_sizes(inputs: dict, grad: torch.Tensor, options: dict, power: int) -> dict[str, float]:
    """Norm over each result of (sum |term|^power)^(1/power), the terms of every sum on the way to it.

    With S = sum phi_k^T v, z = sum phi_k, a = 1 / den, delta = do . o, dS = sum a phi_q^T do, dz = -sum a delta phi_q:
    dphi_q = a (do S^T - delta z), dv = phi_k dS, dphi_k = v dS^T + dz. At power 2 v is taken about
    c = sum_f S_f / sum_f z_f.
    """
    u = {name: x.detach().double() for name, x in inputs.items()}
    name, normalize = options["feature_map"], options["normalize"]
    phi_q, pull_q = _features(name, u["q"], u.get("q_weight"), power)
    phi_k, pull_k = _features(name, u["k"], u.get("k_weight"), power)
    v, do = u["v"], grad.double()

    def sum_of(equation: str, *factors: torch.Tensor) -> torch.Tensor:
        return torch.einsum(equation, *(x.abs() ** power for x in factors))

    s, z = torch.einsum("bnhf,bnhd->bhfd", phi_k, v), phi_k.sum(1)
    a = torch.full_like(v[:, :1, :, :1], options.get("scale", 1.0)).expand(-1, do.shape[1], -1, -1)
    center = torch.zeros_like(v[:, 0])
    if normalize:
        a = 1 / (torch.einsum("bnhf,bhf->bnh", phi_q, z) + options["eps"])[..., None]
        if power == 2:
            center = s.sum(2) / z.sum(-1, keepdim=True).clamp(min=1e-300)
            v, s = v - center[:, None], s - z[..., None] * center[:, :, None]
    o = a * (torch.einsum("bnhf,bhfd->bnhd", phi_q, s) - options["eps"] * normalize * center[:, None])
    delta = (do * o).sum(-1, keepdim=True) * normalize
    ds = torch.einsum("bnhf,bnhd->bhfd", a * phi_q, do)
    dz = (a * delta * phi_q).sum(1)

    s_terms = s.abs() ** power + sum_of("bnhf,bnhd->bhfd", phi_k, v)
    o_terms = a.abs() ** power * torch.einsum("bnhf,bhfd->bnhd", phi_q.abs() ** power, s_terms)
    delta_terms = (do.abs() ** power * o_terms).sum(-1, keepdim=True) * normalize + delta.abs() ** power
    dphi_q = torch.einsum("bnhd,bhfd->bnhf", do.abs() ** power, s_terms) + delta_terms * (z.abs() ** power)[:, None]
    ds_terms = ds.abs() ** power + sum_of("bnhf,bnhd->bhfd", a * phi_q, do)
    dz_terms = dz.abs() ** power + ((a * phi_q).abs() ** power * delta_terms).sum(1)
    dphi_k = torch.einsum("bnhd,bhfd->bnhf", v.abs() ** power, ds_terms) + dz_terms[:, None]
    dv = torch.einsum("bnhf,bhfd->bnhd", phi_k.abs() ** power, ds_terms)
    (dq, dq_weight), (dk, dk_weight) = pull_q(a.abs() ** power * dphi_q), pull_k(dphi_k)
    sizes = {"o": o_terms, "dq": dq, "dk": dk, "dv": dv, "dq_weight": dq_weight, "dk_weight": dk_weight}
    return {name: (x ** (1 / power)).norm().item() for name, x in sizes.items() if x is not None}


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of rounding to nearest: 2^-24, 2^-11, 2^-8 for fp32, fp16, bf16."""
    return torch.finfo(dtype).eps / 2


def check(case: Case, inputs: dict, grad: torch.Tensor, actual: dict[str, torch.Tensor]) -> None:
    """Assert that every result is finite and its error, a norm over the tensor, within two bounds.

    1. Twice the error of eager PyTorch in the same dtype, plus u/2 of the terms before cancellation, plus fp32's error.
    2. Whatever eager does: u times the result and the terms before cancellation in quadrature, plus fp32's error.
    fp32's error: 4 roundoffs of the sum of absolute terms; logits of size x carry about x roundoffs, which exp makes
    relative.
    """
    exact = truth(inputs, grad, case.options)
    eager = run(linear_attn_reference, inputs, grad, case.options)
    squares = term_sizes(inputs, grad, case.options, 2)
    absolutes = term_sizes(inputs, grad, case.options, 1)
    fp32, u = unit_roundoff(torch.float32), unit_roundoff(DTYPES[case.dtype])
    subnormal = u * torch.finfo(DTYPES[case.dtype]).tiny  # half a step between subnormal results
    lines = []
    for name, true in exact.items():
        error, theirs = (actual[name] - true).norm().item(), (eager[name] - true).norm().item()
        theirs = theirs if theirs == theirs else float("inf")  # eager fp16 may overflow; bound 2 still holds us
        size = (true.norm().item() ** 2 + squares[name] ** 2) ** 0.5
        floor = 4 * fp32 * absolutes[name] + 8 * case.input_scale * fp32 * size + subnormal * true.numel() ** 0.5
        first, second = 2 * theirs + u / 2 * squares[name] + floor, u * size + floor
        numbers = (
            f"error {error:.2e} of {true.norm().item():.2e}, eager {theirs:.2e}, bounds {first:.2e} and {second:.2e}"
        )
        if not torch.isfinite(actual[name]).all():
            lines.append(f"{name}: {(~torch.isfinite(actual[name])).sum()} of {true.numel()} values are not finite")
        elif error > min(first, second):
            lines.append(f"{name}: {numbers}")
    assert not lines, "\n".join([str(case), *lines])
