"""The kernels under PyTorch's transforms, and on empty inputs, against the reference in float64."""

import random

import pytest
import torch
from torch.func import vmap
from torch.utils._pytree import tree_leaves
from transforms import forward_over, named, of, one_by_one, pulled, random_samples

FUSED = {"rope": True, "mix": 0.3, "heads": 1, "group": 2}
OPS = ("linear_attn", "linear_attn_state", "linear_attn_apply")
EMPTY = [{"batch": 0}, {"nq": 0, "nk": 0}, {"nk": 0}, {"nq": 0, "rope": True, "mix": 0.3}]
EMPTY += [{"packed": "rows", "lengths": ends} for ends in (((0, 3), (4, 0), (2, 3)), ((0, 0), (0, 0)))]


def plain(_, function):
    """The outputs themselves, in the form of `pulled` and `forward_over`."""
    return named(function)


def small(op: str, option: dict):
    return of(op, torch.float32, **{"heads": 1} | option)


def check(actual, exact, tensors: dict, device: str) -> None:
    """Compare two functions of tensors; `exact` is called in float64. Errors are relative to each largest value."""
    results = tree_leaves(actual({name: x.to(device) for name, x in tensors.items()}))
    doubles = {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}
    for x, true in zip(results, tree_leaves(exact(doubles)), strict=True):
        assert x.shape == true.shape and x.dtype == torch.float32
        assert not x.numel() or (x.cpu() - true).abs().max() <= 1e-5 * true.abs().max()


@pytest.mark.parametrize("option", [{}, FUSED], ids=["plain", "fused"])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("derivative", [forward_over, pulled])
def test_derivatives(derivative, op, option, device):
    p = small(op, option)
    check(derivative(p, p.op), derivative(p, p.reference), p.tensors, device)


@pytest.mark.parametrize("option", [{}, FUSED | {"mask": "some"}], ids=["plain", "fused"])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("derivative", [plain, forward_over, pulled])
def test_vmap(derivative, op, option, device):
    p = small(op, option)
    tensors, dims = random_samples(p.tensors, 2, random.Random(op))
    actual = vmap(derivative(p, p.op), in_dims=(dims,))
    check(actual, one_by_one(derivative(p, p.reference), dims), tensors, device)


@pytest.mark.parametrize("option", EMPTY, ids=str)
@pytest.mark.parametrize("map", [("hedgehog", True), ("elu", False)])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("derivative", [plain, forward_over, pulled])
def test_empty_inputs(derivative, op, map, option, device):
    p = small(op, option | {"map": map})
    check(derivative(p, p.op), derivative(p, p.reference), p.tensors, device)
