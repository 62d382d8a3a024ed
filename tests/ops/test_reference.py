"""The reference against the definition written as attention, one N x N matrix, and its own derivatives."""

import pytest
import torch
from cases import MAPS, Case, make_inputs
from numerics import truth

from linvideo.ops.reference import linear_attn_reference


def phi(x: torch.Tensor, feature_map: str, weight: torch.Tensor | None) -> torch.Tensor:
    """Features of x [B, H, N, D], from the papers' formulas."""
    if feature_map == "hedgehog":
        up, down = torch.exp(x @ weight), torch.exp(-(x @ weight))
        return torch.cat([up / up.sum(-1, keepdim=True), down / down.sum(-1, keepdim=True)], -1)
    if feature_map == "softmax":
        return torch.exp(x) / torch.exp(x).sum(-1, keepdim=True)
    return {"elu": lambda: torch.nn.functional.elu(x) + 1, "relu": x.relu, "identity": lambda: x}[feature_map]()


def quadratic(q, k, v, *, feature_map, q_weight=None, k_weight=None, scale=1.0, normalize=True, eps=1e-6):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = phi(q, feature_map, q_weight) @ phi(k, feature_map, k_weight).mT
    scores = scores / (scores.sum(-1, keepdim=True) + eps) if normalize else scale * scores
    return (scores @ v).transpose(1, 2)


def double(case: Case) -> dict[str, torch.Tensor]:
    inputs, _ = make_inputs(case, "cpu")
    return {name: x.detach().double().requires_grad_() for name, x in inputs.items()}


@pytest.mark.parametrize("eps", [1e-6, 0.5])
@pytest.mark.parametrize("map", MAPS)
def test_is_the_definition(map, eps):
    case = Case(head_dim=16, nq=5, nk=7, map=map, dtype="fp32", eps=eps)
    inputs = double(case)
    torch.testing.assert_close(
        linear_attn_reference(**inputs, **case.options), quadratic(**inputs, **case.options), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("map", MAPS)
def test_gradcheck(map):
    case = Case(head_dim=8, nq=3, nk=4, map=map, dtype="fp32", batch=1)
    inputs = double(case)
    names = list(inputs)

    def function(*tensors):
        return linear_attn_reference(**dict(zip(names, tensors, strict=True)), **case.options)

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


def test_one_key_gives_its_value():
    case = Case(head_dim=16, nq=5, nk=1, dtype="fp32")
    inputs, grad = make_inputs(case, "cpu")
    exact = truth(inputs, grad, case.options)
    torch.testing.assert_close(exact["o"], inputs["v"].double().expand(-1, 5, -1, -1), rtol=1e-4, atol=1e-4)
    assert exact["dq"].norm() < 1e-4


def test_elu_keeps_small_features_in_bf16():
    """elu(-8) + 1 = exp(-8) = 3e-4; subtracting 1 first in bf16 would leave 0."""
    k = torch.full((1, 1, 1, 8), -8.0, dtype=torch.bfloat16)
    o = linear_attn_reference(torch.zeros_like(k), k, torch.ones_like(k), feature_map="elu", normalize=False)
    assert abs(o.double() / (8 * torch.tensor(-8.0).double().exp()) - 1).max() < 0.01


def test_scale_acts_only_without_the_denominator():
    inputs = double(Case(head_dim=8, nq=3, nk=4, map=("elu", True), dtype="fp32"))
    plain = linear_attn_reference(**inputs, feature_map="elu")
    assert torch.equal(plain, linear_attn_reference(**inputs, feature_map="elu", scale=3.0))
    raw = linear_attn_reference(**inputs, feature_map="elu", normalize=False)
    torch.testing.assert_close(
        linear_attn_reference(**inputs, feature_map="elu", normalize=False, scale=-3.0), -3 * raw
    )
