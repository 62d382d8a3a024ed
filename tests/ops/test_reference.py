"""The reference against the definition written with an N x N attention matrix, and against its own derivatives."""

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
    if feature_map == "hedgehog_joint":
        both = torch.exp(torch.cat([2 * (x @ weight), -2 * (x @ weight)], -1))
        return both / both.sum(-1, keepdim=True)
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
    """elu(-8) + 1 = exp(-8) = 3e-4, but 0 if bf16 first computes exp(-8) - 1."""
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


def reference(case: Case, inputs: dict, **options) -> torch.Tensor:
    return linear_attn_reference(**inputs, **case.options, **options)


def test_key_mask_is_fewer_keys():
    case = Case(head_dim=8, nq=5, nk=7, dtype="fp32", batch=1)
    inputs = double(case)
    keep = torch.tensor([True, False, True, True, False, False, True])
    kept = inputs | {name: inputs[name][:, keep] for name in "kv"}
    inputs |= {name: torch.where(keep[:, None, None], inputs[name], torch.nan) for name in "kv"}
    torch.testing.assert_close(reference(case, inputs, key_mask=keep[None]), reference(case, kept), rtol=1e-12, atol=0)


def test_packed_sequences_are_calls_of_their_own():
    case = Case(head_dim=8, nq=9, nk=7, dtype="fp32", batch=1)
    inputs = double(case)
    cu_seqlens_q, cu_seqlens_k = (torch.tensor(ends, dtype=torch.int32) for ends in ([0, 4, 4, 9], [0, 1, 7, 7]))
    packed = reference(case, inputs, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    first = inputs | {"q": inputs["q"][:, :4], "k": inputs["k"][:, :1], "v": inputs["v"][:, :1]}
    torch.testing.assert_close(packed[:, :4], reference(case, first), rtol=1e-12, atol=0)
    assert not packed[:, 4:].any()  # a sequence without keys


def test_rope_is_a_complex_product():
    case = Case(head_dim=8, nq=6, nk=6, dtype="fp32")
    inputs = double(case)
    angles = torch.randn(6, 4, dtype=torch.float64)

    def rotated(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (4, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(-2)

    inside = reference(case, inputs, rope=(angles.cos(), angles.sin()))
    before = inputs | {name: rotated(inputs[name]) for name in "qk"}
    torch.testing.assert_close(inside, reference(case, before), rtol=1e-12, atol=0)


def test_groups_are_repeated_keys():
    case = Case(head_dim=8, nq=5, nk=7, dtype="fp32", group=3)
    inputs = double(case)
    each = {name: inputs[name].repeat_interleave(3, 2) for name in "kv"}
    each["k_weight"] = inputs["k_weight"].repeat_interleave(3, 0)
    torch.testing.assert_close(reference(case, inputs), reference(case, inputs | each), rtol=1e-12, atol=0)


def test_mix_is_a_weighted_mean():
    case = Case(head_dim=8, nq=5, nk=7, dtype="fp32")
    inputs = double(case)
    softmax_out = torch.randn_like(inputs["q"])
    mixed = reference(case, inputs, mix=(softmax_out, torch.tensor(0.3, dtype=torch.float64)))
    expected = 0.3 * softmax_out + 0.7 * reference(case, inputs)
    torch.testing.assert_close(mixed, expected, rtol=1e-12, atol=1e-12)
