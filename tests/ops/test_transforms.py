"""The ops under PyTorch's transforms: forward-mode AD, torch.func, torch.vmap, torch.compile; and on empty inputs.

`PYTHONPATH=.:kernels:tests/helpers python tests/ops/test_transforms.py` prints the table of docs/op.md.
"""

import dataclasses
import random
import warnings
from pathlib import Path

import pytest
import torch
from cases import DTYPES
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad, gradcheck
from torch.autograd.functional import hessian, hvp, jacobian, vhp
from torch.func import grad, jacfwd, jacrev, jvp, vmap
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from transforms import (
    ALL,
    EVERY_MAP,
    FORWARD,
    OPTION_SETS,
    ROUTES,
    SMALL,
    TINY,
    WINDOW,
    WINDOW_OPTIONS,
    by_dual_tensors,
    by_linearize,
    check_tangents,
    close,
    compiled,
    forward_over,
    inside_compile,
    named,
    of,
    one_by_one,
    pulled,
    random_like,
    random_samples,
    waves,
)

from linvideo.ops import chunked

ONCE = "differentiable once"
NO_FORWARD = "no forward-mode derivative"


@pytest.fixture(autouse=True)
def strict_vmap():
    """Have torch.vmap raise where it would compute an operator sample by sample, with a warning."""
    torch._C._functorch._set_vmap_fallback_enabled(False)
    yield
    torch._C._functorch._set_vmap_fallback_enabled(True)


# Forward mode


@pytest.mark.parametrize("map", EVERY_MAP)
@pytest.mark.parametrize("op", FORWARD)
def test_tangents_of_every_map(op, map):
    check_tangents(of(op, map=map))


@pytest.mark.parametrize("option", OPTION_SETS, ids=str)
@pytest.mark.parametrize("op", FORWARD)
def test_tangents_of_options(op, option):
    """Of all leaves together, and of each alone: the other tangents are None then."""
    p = of(op, **option)
    check_tangents(p)
    for name in p.leaves:
        check_tangents(p, jvp, name)


@pytest.mark.parametrize("op", FORWARD)
def test_tangents_over_several_slices(op, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 1)
    check_tangents(of(op, nq=150, nk=200, mask="some"))
    check_tangents(of(op, **ALL | {"nq": 150}))


@pytest.mark.parametrize("option", [{}, ALL], ids=["plain", "all"])
@pytest.mark.parametrize("op", FORWARD)
@pytest.mark.parametrize("route", ROUTES)
def test_routes_of_forward_mode(route, op, option):
    check_tangents(of(op, **option), ROUTES[route])


def test_forward_mode_inside_inductor():
    check_tangents(of("linear_attn"), inside_compile(jvp, "inductor"))


@pytest.mark.parametrize("op", FORWARD + ["window_attn"])
@pytest.mark.parametrize("option", [{}, {"group": 2, "packed": "rows"}], ids=["plain", "packed"])
def test_jacobians(op, option):
    """By jacrev and jacfwd, and by torch.autograd.functional.jacobian with vmap."""
    p = of(op, **({"heads": 1} if op == "window_attn" else option | TINY))
    for name in p.leaves:
        (f, x), (reference, _) = p.of(p.op, name), p.of(p.reference, name)
        expected = jacrev(reference)(*x)
        close(jacrev(f)(*x), expected)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*vmap.*")
            close(jacobian(f, *x, vectorize=True), tuple(expected))
            if op != "window_attn":
                close(jacfwd(f)(*x), expected)
                close(jacobian(f, *x, vectorize=True, strategy="forward-mode"), tuple(expected))


@pytest.mark.parametrize("op", FORWARD)
def test_tangents_are_finite_differences(op):
    f, x = of(op).of(of(op).op)
    dx, step = random_like(x), 1e-5
    above, below = (f(*(a + sign * step * b for a, b in zip(x, dx, strict=True))) for sign in (1, -1))
    expected = tuple((a - b) / (2 * step) for a, b in zip(above, below, strict=True))
    assert_close(jvp(f, x, dx)[1], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("v_mean", [0.0, 3.0])
@pytest.mark.parametrize("map", EVERY_MAP)
@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy_of_tangents(dtype, map, v_mean):
    """At most twice the error of the reference in this dtype.

    And at most twice that of the reference in float32, plus u for the one rounding of 16-bit results.
    """
    p = of("linear_attn", DTYPES[dtype], map=map, dtype=dtype, nq=40, nk=60, head_dim=16, v_mean=v_mean)
    f, x = p.of(p.op)
    reference, dx = p.of(p.reference)[0], random_like(x)

    def tangent(function, dtype) -> torch.Tensor:
        return jvp(function, *(tuple(y.to(dtype) for y in parts) for parts in (x, dx)))[1][0].double()

    true = tangent(reference, torch.float64)
    error = (tangent(f, DTYPES[dtype]) - true).norm()
    in_dtype, in_float32 = ((tangent(reference, x) - true).norm() for x in (DTYPES[dtype], torch.float32))
    rounding = 0 if dtype == "fp32" else torch.finfo(DTYPES[dtype]).eps / 2 * true.norm()
    assert error <= 2 * in_dtype and error <= 2 * in_float32 + rounding


@pytest.mark.parametrize("route", ["dual tensors", "jvp", "jvp inside compile"])
@pytest.mark.parametrize("op", FORWARD)
def test_primal_outputs_keep_their_gradient(op, route):
    """By backward after the level has ended; under torch.compile with tangents that need none."""
    p = of(op, **ALL)
    f, x = p.of(p.op)
    leaves = tuple(y.clone().requires_grad_() for y in x)

    def detached(function, primals, tangents):
        out, tangent = jvp(function, primals, tangents)
        return out, tuple(y.detach() for y in tangent)

    routes = ROUTES | {"jvp inside compile": inside_compile(detached)}
    out, _ = routes[route](f, leaves, random_like(x))
    gradients = torch.autograd.grad(out, leaves, waves(out))
    close(gradients, torch.autograd.grad(f(*leaves), leaves, waves(out)))


# Reverse mode and vmap


@pytest.mark.parametrize("option", OPTION_SETS, ids=str)
@pytest.mark.parametrize("op", FORWARD)
def test_gradients(op, option):
    """By torch.func.vjp and grad, torch.autograd, and torch.autograd with a batch of gradients of the output."""
    check_gradients(of(op, **option))


@pytest.mark.parametrize(
    ("op", "option"),
    [("linear_attn", {}), ("linear_attn", ALL), ("linear_attn_state", ALL), ("normalizer", {})],
    ids=["plain", "all", "state", "normalizer"],
)
@pytest.mark.parametrize("derivative", [pulled, forward_over])
def test_vmap_inside_compile(derivative, op, option):
    p = of(op, **option)
    dims = dict.fromkeys(p.tensors, None) | dict.fromkeys(p.leaves, -1)
    samples = p.tensors | {name: torch.stack([x, 2 * x], -1) for name, x in p.leaves.items()}
    expected = one_by_one(derivative(p, p.reference), dims)(samples)
    close(compiled(vmap(derivative(p, p.op), in_dims=(dims,)))(samples), expected)


@pytest.mark.parametrize("option", [{}, WINDOW_OPTIONS], ids=["plain", "all"])
def test_gradients_of_window_attn(option):
    p = of("window_attn", **option)
    check_gradients(p)
    close(compiled(pulled(p, p.op))(p.tensors), pulled(p, p.reference)(p.tensors))


def check_gradients(p) -> None:
    (f, x), (reference, _) = p.of(p.op), p.of(p.reference)
    leaves = tuple(y.clone().requires_grad_() for y in x)
    out, expected_out = f(*leaves), reference(*leaves)
    batch = tuple(torch.stack([y, y.cos(), 2 * y]) for y in waves(out))
    expected = pulled(p, p.reference)(p.tensors)
    close(pulled(p, p.op)(p.tensors), expected)
    by_grad = grad(lambda *x: sum((a * b).sum() for a, b in zip(f(*x), waves(out), strict=True)), tuple(range(len(x))))
    close(by_grad(*x), expected)
    close(torch.autograd.functional.vjp(f, x, waves(out))[1], expected)
    settings = {"is_grads_batched": True, "materialize_grads": True}
    batched = torch.autograd.grad(out, leaves, batch, **settings)
    close(batched, torch.autograd.grad(expected_out, leaves, batch, **settings))


SAMPLED = [(op, option) for op in FORWARD for option in OPTION_SETS]
SAMPLED += [("window_attn", {}), ("window_attn", WINDOW_OPTIONS), ("window_attn", {"frames": 2, "overlap": 2})]


@pytest.mark.parametrize("seed", [0, *(pytest.param(i, marks=pytest.mark.full) for i in range(1, 10))])
@pytest.mark.parametrize(("op", "option"), SAMPLED, ids=str)
def test_vmap(op, option, seed):
    """Samples of random tensors, weights, masks, tables and boundaries, at random axes, nested up to three times."""
    rng = random.Random(f"{op} {option} {seed}")
    p = of(op, **option)
    tensors, f, loop = p.tensors, named(p.op), named(p.reference)
    for _ in range(rng.choice([1, 2, 3])):
        tensors, dims = random_samples(tensors, rng.choice([1, 2, 3]), rng)
        f, loop = vmap(f, in_dims=(dims,)), one_by_one(loop, dims)
    close(f(tensors), loop(tensors))


@pytest.mark.parametrize("seed", [0, *(pytest.param(i, marks=pytest.mark.full) for i in range(1, 10))])
@pytest.mark.parametrize(("op", "option"), SAMPLED, ids=str)
def test_vmap_of_derivatives_and_derivatives_of_vmap(op, option, seed):
    rng = random.Random(f"{op} {option} {seed}")
    p = of(op, **option)
    tensors, dims = random_samples(p.tensors, rng.choice([1, 2]), rng)

    def batched(function):
        return lambda **x: vmap(named(function), in_dims=(dims,))(x)

    def in_turn(function):
        return lambda **x: one_by_one(named(function), dims)(x)

    for derivative in (pulled, forward_over)[: 1 if op == "window_attn" else 2]:
        close(
            vmap(derivative(p, p.op), in_dims=(dims,))(tensors),
            one_by_one(derivative(p, p.reference), dims)(tensors),
        )
        close(derivative(p, batched(p.op))(tensors), derivative(p, in_turn(p.reference))(tensors))


# Second derivatives, and those that window_attn lacks


def backward_twice(loss, x):
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    return torch.autograd.grad(gradient.sum(), leaf, allow_unused=True)


def reverse_over_dual(loss, x):
    leaf = x.clone().requires_grad_()
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(loss(forward_ad.make_dual(leaf, x))).tangent
    return torch.autograd.grad(tangent, leaf, allow_unused=True)


def dual_over_reverse(loss, x):
    leaf = x.clone().requires_grad_()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(leaf, x)
        return torch.autograd.grad(loss(dual), dual)


SECOND = {
    "torch.func.hessian": lambda loss, x: torch.func.hessian(loss)(x),
    "jacrev of jacrev": lambda loss, x: jacrev(jacrev(loss))(x),
    "grad of grad": lambda loss, x: grad(lambda y: grad(loss)(y).sum())(x),
    "vmap of grad of grad": lambda loss, x: vmap(grad(lambda y: grad(loss)(y).sum()))(x[None]),
    "jvp of grad": lambda loss, x: jvp(grad(loss), (x,), (x,)),
    "grad of jvp": lambda loss, x: grad(lambda y: jvp(loss, (y,), (x,))[1])(x),
    "jvp of jvp": lambda loss, x: jvp(lambda y: jvp(loss, (y,), (x,))[1], (x,), (x,)),
    "autograd twice": backward_twice,
    "autograd over dual tensors": reverse_over_dual,
    "dual tensors over autograd": dual_over_reverse,
    "autograd.functional.hessian": hessian,
    "autograd.functional.hessian with vmap": lambda loss, x: hessian(loss, x, vectorize=True),
    "autograd.functional.hvp": lambda loss, x: hvp(loss, x, torch.ones_like(x)),
    "autograd.functional.vhp": lambda loss, x: vhp(loss, x, torch.ones_like(x)),
    # which differentiates the backward
    "autograd.functional.jvp": lambda loss, x: torch.autograd.functional.jvp(loss, x, torch.ones_like(x)),
    "grad of grad inside compile": lambda loss, x: compiled(grad(lambda y: grad(loss)(y).sum()))(x),
    "grad of jvp inside compile": lambda loss, x: compiled(grad(lambda y: jvp(loss, (y,), (x,))[1]))(x),
}


@pytest.mark.parametrize("power", [1, 2], ids=["linear", "square"])
@pytest.mark.parametrize("op", FORWARD + ["window_attn"])
@pytest.mark.parametrize("route", SECOND)
def test_second_derivatives_are_refused(route, op, power):
    """Even with a linear loss, of which an output's gradient is a constant."""
    p = of(op)
    f, x = p.of(p.op, "q" if "q" in p.leaves else "k")
    with pytest.raises(RuntimeError, match=ONCE if op != "window_attn" else f"{ONCE}|{NO_FORWARD}"):
        SECOND[route](lambda y: sum((out**power).sum() for out in f(y)), *x)


@pytest.mark.parametrize("route", [*ROUTES])
def test_window_attn_refuses_forward_mode(route):
    p = of("window_attn", **WINDOW_OPTIONS)
    f, x = p.of(p.op)
    with pytest.raises(RuntimeError, match=NO_FORWARD):
        ROUTES[route](f, x, random_like(x))


# gradcheck


def check_by_gradcheck(p, **settings) -> None:
    p = dataclasses.replace(p, leaves={name: x.nan_to_num().requires_grad_() for name, x in p.leaves.items()})
    f, x = p.of(p.op)
    assert gradcheck(f, x, check_batched_grad=True, fast_mode=True, **settings)


@pytest.mark.parametrize(
    ("map", "option"), [(map, {}) for map in EVERY_MAP] + [(EVERY_MAP[0], x) for x in OPTION_SETS[1:]], ids=str
)
@pytest.mark.parametrize("op", FORWARD)
def test_gradcheck(op, map, option):
    p = of(op, map=map, **TINY | option)
    check_by_gradcheck(p, check_forward_ad=True, check_batched_forward_grad=True)


@pytest.mark.parametrize("option", [{}, WINDOW_OPTIONS], ids=["plain", "all"])
def test_gradcheck_of_window_attn(option):
    check_by_gradcheck(of("window_attn", **option))


# The table


def check_jvp(p) -> None:
    check_tangents(p, jvp)
    check_tangents(p, by_linearize)
    f, x = p.of(p.op, "q")
    close(jacfwd(f)(*x), jacrev(p.of(p.reference, "q")[0])(*x))


def check_gradient(p) -> None:
    close(p.op(**p.tensors), p.reference(**p.tensors))
    close(pulled(p, p.op)(p.tensors), pulled(p, p.reference)(p.tensors))


def check_func(p) -> None:
    check_gradient(p)
    (f, x), (reference, _) = p.of(p.op, "q"), p.of(p.reference, "q")
    close(jacrev(f)(*x), jacrev(reference)(*x))
    close(grad(lambda x: f(x)[0].sin().sum())(*x), grad(lambda x: reference(x)[0].sin().sum())(*x))


def over_samples(derivative):
    """Return a check of torch.vmap of derivative(problem, function)."""

    def check(p) -> None:
        tensors, dims = random_samples(p.tensors, 2, random.Random(0))
        actual = vmap(derivative(p, p.op), in_dims=(dims,))(tensors)
        close(actual, one_by_one(derivative(p, p.reference), dims)(tensors))

    return check


def check_compile(p, **settings) -> None:
    close(compiled(pulled(p, p.op), **settings)(p.tensors), pulled(p, p.reference)(p.tensors))


def check_export(p) -> None:
    class Module(torch.nn.Module):
        def forward(self, tensors: dict):
            return p.op(**tensors)

    close(torch.export.export(Module(), (p.tensors,)).module()(p.tensors), p.reference(**p.tensors))


def check_autocast(p) -> None:
    rows = {name: x.float() if x.is_floating_point() else x for name, x in p.tensors.items()}
    with torch.autocast("cpu", torch.bfloat16):
        out = p.op(**rows)[0]
    cast = {name: x.bfloat16() if name in (*"qkv", "softmax_out") else x for name, x in rows.items()}
    assert out.dtype == torch.bfloat16 and torch.equal(out, p.op(**cast)[0])


def check_checkpointing(p) -> None:
    f, x = p.of(p.op)
    leaves = tuple(y.clone().requires_grad_() for y in x)
    for reentrant in (False, True):
        out = checkpoint(f, *leaves, use_reentrant=reentrant)
        torch.autograd.backward(out, waves(out))
        close(tuple(y.grad for y in leaves), pulled(p, p.reference)(p.tensors))
        for y in leaves:
            y.grad = None


def check_without_values(p) -> None:
    expected = [x.shape for x in p.op(**p.tensors)]
    assert [x.shape for x in p.op(**{name: x.to("meta") for name, x in p.tensors.items()})] == expected
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(x) for name, x in p.tensors.items()}
        assert [x.shape for x in p.op(**fake)] == expected
        assert [x.shape for x in pulled(p, p.op)(fake)] == [x.shape for x in p.leaves.values()]


def check_second(p) -> None:
    f, x = p.of(p.op, "q")
    backward_twice(lambda y: f(y)[0].sum(), *x)


TRANSFORMS = [
    ("`torch.func.jvp`, `jacfwd`, `linearize`", check_jvp),
    ("dual tensors (`torch.autograd.forward_ad`)", lambda p: check_tangents(p, by_dual_tensors)),
    ("`torch.func.grad`, `vjp`, `jacrev`", check_func),
    ("`torch.vmap`", over_samples(lambda p, function: named(function))),
    ("`vmap` of `grad` or `vjp`", over_samples(pulled)),
    ("`vmap` of `jvp`", over_samples(forward_over)),
    ("second derivatives", check_second),
    ("`torch.compile`", check_compile),
    ("`torch.compile(dynamic=True)`", lambda p: check_compile(p, dynamic=True)),
    ("`torch.func.jvp` inside of `torch.compile`", lambda p: check_tangents(p, inside_compile(jvp))),
    ("`torch.export`", check_export),
    ("`torch.autocast`", check_autocast),
    ("activation checkpointing", check_checkpointing),
    ("meta tensors, `FakeTensorMode`", check_without_values),
    ("`gradcheck` in float64 (CPU)", check_by_gradcheck),
    ("an empty batch (B = 0)", check_gradient, {"batch": 0, "packed": "no", "masked": False}),
]
COLUMNS = {
    "`linear_attn`": ("linear_attn", {"packed": "rows"}),
    "its two halves": ("halves", {"packed": "rows"}),
    "`window_attn`": ("window_attn", WINDOW_OPTIONS),
}


def status(op: str, options: dict, check, changes=()) -> str:
    """Return "works" or the type of the error that the op promises; other errors are raised.

    changes: {option: value}, of which those count that the op has.
    """
    default = WINDOW if op == "window_attn" else SMALL
    options = options | {name: x for name, x in dict(changes).items() if hasattr(default, name)}
    try:
        check(of(op, **options))
    except RuntimeError as error:
        if ONCE not in str(error) and NO_FORWARD not in str(error):
            raise
        return "RuntimeError"
    return "works"


def table() -> str:
    rows = [["", *COLUMNS], ["---"] * (1 + len(COLUMNS))]
    rows += [[label, *(status(*column, *check) for column in COLUMNS.values())] for label, *check in TRANSFORMS]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def test_the_table_of_the_documentation():
    page = (Path(__file__).parents[2] / "docs" / "op.md").read_text()
    _, begin, rest = page.partition("<!-- transforms: begin -->\n")
    block, end, _ = rest.partition("\n<!-- transforms: end -->")
    assert begin and end and block == table()


if __name__ == "__main__":
    print(table())
