"""Results stay accurate and finite when features are peaky, equal or nearly disjoint, and when v is far from 0."""

import dataclasses

import pytest
import torch
from cases import DTYPES, MAPS, Case, make_inputs
from numerics import check, run, truth

from linvideo.ops import linear_attn
from linvideo.ops.reference import linear_attn_reference

BASE = Case(head_dim=32, nq=70, nk=67, heads=1)
SOFTMAXES = [("hedgehog", True), ("hedgehog_joint", True), ("softmax", True)]


def assert_accurate(case: Case, device: str) -> dict:
    inputs, grad = make_inputs(case, device)
    actual = run(linear_attn, inputs, grad, case.options)
    check(case, inputs, grad, actual)
    return actual


def eager_in_fp32(inputs: dict, grad: torch.Tensor, options: dict) -> dict:
    wide = {name: x.detach().float().requires_grad_() for name, x in inputs.items()}
    return run(linear_attn_reference, wide, grad.float(), options)


def assert_finite_where_eager_is(case: Case, inputs: dict, grad: torch.Tensor) -> None:
    """Assert that there is no NaN or infinity where float32 eager has a number that fits the dtype of the result."""
    actual = run(linear_attn, inputs, grad, case.options)
    largest = torch.finfo(DTYPES[case.dtype]).max
    for name, x in eager_in_fp32(inputs, grad, case.options).items():
        expected = x.isfinite() & (x.abs() < largest)
        broken = expected & ~actual[name].isfinite()
        assert not broken.any(), f"{case} {name}: {broken.sum()} of {x.numel()}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("map", SOFTMAXES[:2], ids=str)
@pytest.mark.parametrize("scale", [30.0, 2500.0])
def test_peaky_features(scale, map, dtype, device):
    """With |qW| up to 1e4 features are one-hot, and exponentials would overflow."""
    case = dataclasses.replace(BASE, map=map, dtype=dtype, weight_scale=scale, v_mean=1.0)
    inputs, grad = make_inputs(case, device)
    largest = torch.einsum("bnhd,hde->bnhe", *(inputs[x].detach().double() for x in ("q", "q_weight"))).abs().max()
    assert largest > 3.5 * scale
    check(case, inputs, grad, run(linear_attn, inputs, grad, case.options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("map", [map for map in MAPS if map[1]], ids=str)
def test_all_inputs_equal(map, dtype, device):
    """With all keys, values and queries equal, the gradients cancel."""
    case = dataclasses.replace(BASE, map=map, dtype=dtype)
    inputs, grad = make_inputs(case, device)
    with torch.no_grad():
        for name in "qkv":
            inputs[name].fill_(0.75)
    check(case, inputs, grad, run(linear_attn, inputs, grad, case.options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("map", SOFTMAXES, ids=str)
def test_mean_of_v(map, dtype, device):
    """The bounds subtract v's mean, so a mean of 100 must not make gradients less accurate."""
    assert_accurate(dataclasses.replace(BASE, map=map, dtype=dtype, v_mean=100.0), device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_v(dtype, device):
    """If v is constant, o is that constant, and nothing depends on q and k."""
    inputs, grad = make_inputs(dataclasses.replace(BASE, dtype=dtype), device)
    with torch.no_grad():
        inputs["v"].fill_(3.0)
    actual = run(linear_attn, inputs, grad, BASE.options)
    u = torch.finfo(DTYPES[dtype]).eps
    assert (actual["o"] - 3).abs().max() <= 3 * u + 1e-5
    exact = truth(inputs, grad, BASE.options)
    for name in ("dq", "dk", "dq_weight", "dk_weight"):
        assert (actual[name] - exact[name]).norm() < 1e-5 * grad.double().norm(), name


@pytest.mark.parametrize("eps", [1e-6, 1e-35])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("map", SOFTMAXES, ids=str)
def test_tiny_denominators(map, dtype, eps, device):
    """Where keys hardly have the queries' features (exp(-10) to exp(-80) and less), no NaN or infinity is added."""
    case = dataclasses.replace(BASE, map=map, dtype=dtype, eps=eps)
    inputs, grad = make_inputs(case, device)
    with torch.no_grad():
        for name, hot in (("q", 3), ("k", 5)):
            inputs[name].zero_()
            inputs[name][..., hot] = torch.linspace(10, 80, inputs[name].shape[1], device=device)[:, None]
        for name in ("q_weight", "k_weight"):
            if name in inputs:
                inputs[name].copy_(torch.eye(32))
    assert_finite_where_eager_is(case, inputs, grad)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("map", MAPS, ids=str)
def test_largest_inputs(map, dtype, device):
    """Rows near the largest fp16 number and, in bf16, rows whose logits `features` still accepts on a GPU."""
    case = dataclasses.replace(BASE, map=map, dtype=dtype)
    inputs, grad = make_inputs(case, device)
    with torch.no_grad():
        for name in "qk":
            x = inputs[name]
            x.mul_(0.2 * min(torch.finfo(x.dtype).max, 1e8) / x.abs().max())
    assert_finite_where_eager_is(case, inputs, grad)


OPTIONS = [{"rope": True}, {"mask": "some"}, {"packed": "rows"}, {"group": 3}, {"map": ("elu", True)}]
MEANS = [{"map": map, "v_mean": mean} for map in SOFTMAXES[:2] for mean in (0.0, 1.0, 3.0, 100.0)]


@pytest.mark.parametrize("option", [*OPTIONS, *MEANS], ids=str)
def test_fixed_gates_of_bf16(option, device):
    """Independent of the error model, with W near the identity: o and dv within 0.4%, other gradients within 0.8%."""
    case = dataclasses.replace(BASE, **{"head_dim": 64, "nq": 130, "nk": 130, "batch": 1} | option)
    inputs, grad = make_inputs(case, device)
    actual, exact = run(linear_attn, inputs, grad, case.options), truth(inputs, grad, case.options)
    for name, true in exact.items():
        error = ((actual[name] - true).norm() / true.norm()).item()
        assert error < (4e-3 if name in ("o", "dv") else 8e-3), f"{name}: {error:.1e}"
