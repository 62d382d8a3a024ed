"""The ops as functions of all their tensors, with a reference each, for tests of PyTorch's transforms."""

import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from cases import MAPS, OPTIONS, Case, make_inputs
from claims import APPLY_OPTIONS, STATE_OPTIONS, taken
from halves import apply_reference, state_reference
from numerics import call
from torch.autograd import forward_ad
from torch.func import jvp, linearize
from torch.testing import assert_close
from window_cases import WindowCase, make_window_inputs

from linvideo.ops import linear_attn, linear_attn_apply, linear_attn_state, window_attn
from linvideo.ops.reference import linear_attn_reference, rotate, sum_dtype
from linvideo.ops.window_reference import window_attn_reference

OPS = ("linear_attn", "linear_attn_state", "linear_attn_apply", "normalizer", "halves", "window_attn")
SMALL = Case(head_dim=8, nq=6, nk=9, dtype="fp32")
ALL = {"rope": True, "mix": 0.3, "mask": "some", "packed": "rows", "group": 3}
OPTION_SETS = [{}, *({name: x} for name, values in OPTIONS.items() if name != "map" for x in values[1:])]
OPTION_SETS += [ALL, ALL | {"packed": "no"}]
EVERY_MAP = [*MAPS, ("identity", True)]
WINDOW = WindowCase(frames=4, frame_tokens=2, chunk=1, overlap=0, head_dim=8, batch=1)
FORWARD = [op for op in OPS if op not in ("halves", "window_attn")]
WINDOW_OPTIONS = {"prefix": 2, "suffix": 1, "masked": True, "rope": True, "heads": 1, "group": 2, "batch": 2}
TINY = {"nq": 3, "nk": 4, "batch": 1, "heads": 1}


@dataclass(frozen=True)
class Problem:
    """An op and its reference, which take `leaves`, the differentiable tensors, and `others` by name."""

    leaves: dict[str, torch.Tensor]
    others: dict[str, torch.Tensor]
    op: Callable[..., tuple[torch.Tensor, ...]]
    reference: Callable[..., tuple[torch.Tensor, ...]]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return self.leaves | self.others

    def of(self, function: Callable, *names: str) -> tuple[Callable, tuple[torch.Tensor, ...]]:
        """Return `function` as one of the named leaves (default: all), and these."""
        names = names or tuple(self.leaves)
        return lambda *x: function(**self.tensors | dict(zip(names, x, strict=True))), tuple(
            self.leaves[name] for name in names
        )


def problem(op: str, case: Case | WindowCase | None = None, dtype: torch.dtype = torch.float64) -> Problem:
    """Return one of OPS for a case, with its floating-point tensors in `dtype`; "normalizer" returns den as well."""
    if op == "window_attn":
        return _window_problem(case or WINDOW, dtype)
    case = case or SMALL
    leaves, _ = make_inputs(case, "cpu")
    leaves = {name: x.detach().to(dtype) for name, x in leaves.items()}
    if case.map == ("identity", True):  # a denominator of either sign could vanish
        leaves |= {name: leaves[name].abs() for name in "qk"}
    options = case.options
    cos, sin = options.pop("rope", (None, None))
    others = {name: options.pop(name) for name in list(options) if torch.is_tensor(options[name])}
    others |= {} if cos is None else {"cos": cos.to(dtype), "sin": sin.to(dtype)}

    def split(tensors: dict) -> tuple[dict, dict]:
        given = {name: x for name, x in tensors.items() if name not in others and name not in ("cos", "sin")}
        rest = {name: x for name, x in tensors.items() if name in others}
        rope = {"rope": (rest.pop("cos"), rest.pop("sin"))} if "cos" in rest else {}
        return given, options | rest | rope

    def whole(function):
        def apply(**tensors):
            return (call(function, *split(tensors)),)

        return apply

    if op == "linear_attn":
        return Problem(leaves, others, whole(linear_attn), whole(linear_attn_reference))
    if op == "halves":
        return Problem(leaves, others, whole(_halves), whole(linear_attn_reference))
    return _half_problem(op, leaves, others, split)


def _halves(q, k, v, **options):
    state = linear_attn_state(k, v, **taken(options, STATE_OPTIONS))
    return linear_attn_apply(q, *state, **taken(options, APPLY_OPTIONS))


def _half_problem(op: str, leaves: dict, others: dict, split: Callable) -> Problem:
    def reference_of(function, rows: str):
        def apply(**tensors):
            given, options = split(tensors)
            if "rope" in options:
                given[rows] = rotate(given[rows], *options.pop("rope"))
            return function(options=options, **given)

        return apply

    def state(**tensors):
        given, options = split(tensors)
        return linear_attn_state(given.pop("k"), given.pop("v"), **given, **taken(options, STATE_OPTIONS))

    keys = {name: x for name, x in leaves.items() if name in ("k", "v", "k_weight")}
    of_keys = {name: x for name, x in others.items() if name in ("key_mask", "cu_seqlens_k", "cos", "sin")}
    sums = reference_of(state_reference, "k")
    if op == "linear_attn_state":
        return Problem(keys, of_keys, state, sums)
    S, z = (x.to(sum_dtype(x)) for x in sums(**keys, **of_keys))
    queries = {name: x for name, x in leaves.items() if name not in keys} | {"S": S, "z": z}
    of_queries = {name: x for name, x in others.items() if name in ("cu_seqlens_q", "cos", "sin")}
    normalizer = op == "normalizer"

    def apply(**tensors):
        given, options = split(tensors)
        mix = {"mix": (given.pop("softmax_out"), given.pop("r"))} if "r" in given else {}
        out = linear_attn_apply(**given, **mix, **taken(options, APPLY_OPTIONS), return_normalizer=normalizer)
        return out if normalizer else (out,)

    def apply_whole(q, S, z, options, **given):
        out = apply_reference(q, S, z, options, **given)
        if not normalizer:
            return (out,)
        ones = torch.ones_like(S)  # phi(q) z is the output without normalisation for S = z 1^T
        raw = options | {"normalize": False, "scale": 1.0}
        den = apply_reference(q, z.unsqueeze(-1) * ones, z, raw, **given)[..., 0]
        return out, den.transpose(1, 2)

    return Problem(queries, of_queries, apply, reference_of(apply_whole, "q"))


def _window_problem(case: WindowCase, dtype: torch.dtype) -> Problem:
    leaves, _ = make_window_inputs(case)
    leaves = {name: x.detach().to(dtype) for name, x in leaves.items()}
    options = case.options
    cos, sin = options.pop("rope", (None, None))
    others = {"key_mask": options.pop("key_mask")} if "key_mask" in options else {}
    others |= {} if cos is None else {"cos": cos.to(dtype), "sin": sin.to(dtype)}

    def of(function):
        def apply(cos=None, sin=None, **tensors):
            return (function(**tensors, **options, **({} if cos is None else {"rope": (cos, sin)})),)

        return apply

    return Problem(leaves, others, of(window_attn), of(window_attn_reference))


def random_like(tensors, seed: int = 5):
    """Return normal random numbers like the tensors, a tuple or dict of them; NaN where these are not finite."""
    rng = torch.Generator().manual_seed(seed)

    def normal(x: torch.Tensor) -> torch.Tensor:
        numbers = torch.randn(x.shape, generator=rng, dtype=torch.float64).to(x.dtype)
        return torch.where(x.isfinite(), numbers, float("nan"))

    if isinstance(tensors, dict):
        return {name: normal(x) for name, x in tensors.items()}
    return tuple(normal(x) for x in tensors)


def random_samples(tensors: dict, size: int, rng: random.Random) -> tuple[dict, dict]:
    """Return tensors with an axis of samples at a random place, some without, and these places (at least one).

    Samples differ by random factors, and masks by random values. Those of cu_seqlens keep the ends, and have axis 0.
    """
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    batched = {name for name in tensors if rng.random() < 0.5} or {rng.choice(sorted(tensors))}
    dims = {
        name: (rng.randrange(x.dim() + 1) if x.dtype != torch.int32 else 0) if name in batched else None
        for name, x in tensors.items()
    }

    def sample(x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.bool:
            return x & (torch.rand(x.shape, generator=generator) < 0.8)
        if x.is_floating_point():
            return x * (0.5 + torch.rand(x.shape, generator=generator)).to(x.dtype)
        inner = torch.randint(int(x.min()), int(x.max()) + 1, x[..., 1:-1].shape, generator=generator).sort()[0]
        return torch.cat([x[..., :1], inner.to(x.dtype), x[..., -1:]], -1)

    return {
        name: x if dims[name] is None else torch.stack([sample(x) for _ in range(size)], dims[name])
        for name, x in tensors.items()
    }, dims


def one_by_one(function: Callable, dims: dict) -> Callable:
    """Return what torch.vmap(function, dims) means, for a function of named tensors, written as a loop."""

    def loop(tensors: dict):
        size = next(x.shape[dims[name]] for name, x in tensors.items() if dims[name] is not None)
        samples = (
            {name: x if dims[name] is None else x.select(dims[name], i) for name, x in tensors.items()}
            for i in range(size)
        )
        results = [function(sample) for sample in samples]
        return torch.utils._pytree.tree_map(lambda *x: torch.stack(x), *results)

    return loop


def waves(tensors) -> tuple[torch.Tensor, ...]:
    """Return fixed numbers of the shapes of tensors, without random numbers, which torch.vmap refuses."""
    return tuple(torch.arange(x.numel(), dtype=x.dtype, device=x.device).sin().view(x.shape) for x in tensors)


def named(function: Callable) -> Callable:
    """Return `function` of one dict of tensors, as torch.vmap with a dict of in_dims takes it."""
    return lambda tensors: function(**tensors)


def pulled(problem: Problem, function: Callable) -> Callable:
    """Return the function of a dict of tensors that gives the leaves' gradients, for fixed ones of the outputs."""

    def gradients(tensors: dict) -> tuple[torch.Tensor, ...]:
        names = tuple(problem.leaves)
        out, pull = torch.func.vjp(
            lambda *x: function(**tensors | dict(zip(names, x, strict=True))), *(tensors[name] for name in names)
        )
        return pull(waves(out))

    return gradients


def forward_over(problem: Problem, function: Callable) -> Callable:
    """Return the function of a dict of tensors that gives the outputs and their tangents, for fixed ones of leaves."""

    def tangents(tensors: dict) -> tuple:
        names = tuple(problem.leaves)
        rows = tuple(tensors[name] for name in names)
        return torch.func.jvp(lambda *x: function(**tensors | dict(zip(names, x, strict=True))), rows, waves(rows))

    return tangents


def close(actual, expected) -> None:
    assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def of(op: str, kind: torch.dtype = torch.float64, **options):
    """Return the problem of an op with options of its case, or skip where the op has no such option."""
    if op == "window_attn":
        return problem(op, dataclasses.replace(WINDOW, **options), kind)
    if op == "normalizer":
        options |= {"mix": None}
    case = dataclasses.replace(SMALL, **options)
    if op == "normalizer" and not case.map[1]:
        pytest.skip("return_normalizer needs normalize=True")
    if case.packed == "flat" and op not in ("linear_attn", "halves"):
        pytest.skip("the references of the halves take rows with a batch axis")
    return problem(op, case, kind)


def compiled(function, backend: str = "aot_eager", **settings):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=backend, **settings)


def by_dual_tensors(function, primals: tuple, tangents: tuple) -> tuple:
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, dx) for x, dx in zip(primals, tangents, strict=True)]
        parts = [forward_ad.unpack_dual(x) for x in function(*duals)]
        return tuple(x.primal for x in parts), tuple(x.tangent for x in parts)


def by_linearize(function, primals: tuple, tangents: tuple) -> tuple:
    out, push = linearize(function, *primals)
    return out, push(*tangents)


def inside_compile(route, backend: str = "aot_eager"):
    def compiled_route(function, primals: tuple, tangents: tuple) -> tuple:
        return compiled(lambda x, dx: route(function, x, dx), backend)(primals, tangents)

    return compiled_route


def without_grad_mode(route):
    return torch.no_grad()(route)


ROUTES = {
    "jvp": jvp,
    "jvp without grad mode": without_grad_mode(jvp),
    "linearize": by_linearize,
    "linearize without grad mode": without_grad_mode(by_linearize),
    "dual tensors": by_dual_tensors,
    "dual tensors without grad mode": without_grad_mode(by_dual_tensors),
    "jvp inside compile": inside_compile(jvp),
    "dual tensors inside compile": inside_compile(by_dual_tensors),
    "dual tensors through a compiled function": lambda f, x, dx: by_dual_tensors(compiled(f), x, dx),
}


def check_tangents(p, route=jvp, *names: str) -> None:
    """Compare the outputs and the tangents that come from those of the named leaves (default: all)."""
    (op, primals), (reference, _) = p.of(p.op, *names), p.of(p.reference, *names)
    tangents = random_like(primals)
    close(route(op, primals, tangents), jvp(reference, primals, tangents))
