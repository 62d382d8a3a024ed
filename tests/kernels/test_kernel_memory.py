"""The memory that a forward and backward of the kernels allocate and keep."""

import dataclasses
import re

import pytest
import torch
from cases import Case, make_inputs
from numerics import call

from linvideo.ops import linear_attn

CASE = Case(head_dim=16, nq=2400, nk=2400, dtype="fp32", batch=1, heads=2)  # rows >> splits on any GPU
# name: (option, the tensors of q's size that are kept for the backward, whether they are inputs or not)
OPTIONS = {
    "plain": ({}, {"q", "k", "v"}),
    "joint": ({"map": ("hedgehog_joint", True)}, {"q", "k", "v"}),
    "rope": ({"rope": True}, {"q rotated", "k rotated", "v"}),
    "mask": ({"mask": "some"}, {"q", "k", "v"}),
    "packed": ({"packed": "rows"}, {"q", "k", "v"}),
    "mix": ({"mix": 0.3}, {"q", "k", "v", "softmax_out"}),
    "raw": ({"map": ("elu", False)}, {"q", "k", "v"}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_memory_holds_no_features(name, set_tiles, device):
    """A forward and backward allocate nothing of size N x F, and keep nothing but rows and sums."""
    set_tiles(block=512)  # fewer steps in the interpreter; the number of splits does not change
    changes, rows = OPTIONS[name]
    case = dataclasses.replace(CASE, **changes)
    inputs, grad = make_inputs(case, device)
    limit = inputs["q"].numel() * inputs["q"].element_size()  # an N x F tensor is twice that; without weights, as large
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x
        return x

    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = call(linear_attn, inputs, case.options)
        torch.autograd.grad(out, list(inputs.values()), grad)
    own = [event for event in profile.events() if re.match(r"aten::(empty|zeros|new_)", event.name)]
    sizes = [max(event.self_cpu_memory_usage, getattr(event, "self_device_memory_usage", 0)) for event in own]
    assert max(sizes) > 0 and max(sizes) <= limit + 64
    large = [x for x in kept.values() if x.numel() * x.element_size() > limit // 8]
    tables = 2 * (name == "rope")  # cos and sin, inputs
    assert {x.shape for x in large if x.dim() == 4} == {inputs["q"].shape}
    assert len(large) == len(rows) + tables
