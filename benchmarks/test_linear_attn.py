"""Speed regression tests of the op with pytest-benchmark; --benchmark-save and --benchmark-compare compare runs."""

import pytest
import torch

from linvideo.ops import linear_attn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS = 32760 if DEVICE == "cuda" else 1024
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def make_inputs(feature_map: str):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, TOKENS, 4, 64, device=DEVICE, dtype=DTYPE, requires_grad=True) for _ in "qkv")
    weights = {}
    if feature_map == "hedgehog":
        eye = torch.eye(64, device=DEVICE, dtype=DTYPE).repeat(4, 1, 1)
        weights = {"q_weight": eye.clone().requires_grad_(), "k_weight": eye.clone().requires_grad_()}
    return (q, k, v), weights


def synchronise() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize("feature_map", ["hedgehog", "elu"])
def test_forward(benchmark, feature_map):
    inputs, weights = make_inputs(feature_map)

    def run():
        with torch.no_grad():
            out = linear_attn(*inputs, feature_map=feature_map, **weights)
        synchronise()
        return out

    assert benchmark(run).isfinite().all()


@pytest.mark.parametrize("feature_map", ["hedgehog", "elu"])
def test_forward_backward(benchmark, feature_map):
    inputs, weights = make_inputs(feature_map)
    leaves = [*inputs, *weights.values()]

    def run():
        gradients = torch.autograd.grad(linear_attn(*inputs, feature_map=feature_map, **weights).sum(), leaves)
        synchronise()
        return gradients

    assert all(gradient.isfinite().all() for gradient in benchmark(run))
