"""linear_attn_state and linear_attn_apply on the kernels, each on its own, against float64. S and z are inputs with
gradients of their own.
"""

import pytest
import torch
from cases import DTYPES, GRAD_LAYOUTS, MAPS, OPTIONS, Case, make_inputs, pairwise, sample
from halves import check_apply, check_state

from linvideo.ops import linear_attn_apply, linear_attn_state

AXES = OPTIONS | {
    "map": MAPS,
    "dtype": list(DTYPES),
    "head_dim": [16, 24],
    "nq": [17, 70],
    "nk": [15, 130],
    "layout": ["contiguous", "heads_first", "guarded"],
    "grad_layout": list(GRAD_LAYOUTS),
    "v_mean": [0.0, 3.0],
}


@pytest.mark.parametrize("case", [Case(heads=1, **row) for row in pairwise(AXES)], ids=str)
def test_pairwise(case, device):
    check_state(case, device)
    check_apply(case, device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_features_that_no_key_has(dtype, device):
    """Where z = 0, the gradients of S and z are 0 in float16, as documented, and the usual ones in other dtypes."""
    inputs, grad = make_inputs(Case(head_dim=16, map=("relu", True), dtype=dtype, heads=1), device)
    with torch.no_grad():
        inputs["k"][..., :4] = -1.0
        state = [x.requires_grad_() for x in linear_attn_state(inputs["k"], inputs["v"], feature_map="relu")]
    assert not state[1][..., :4].any() and state[1][..., 4:].all()
    sums = torch.autograd.grad(linear_attn_apply(inputs["q"], *state, feature_map="relu"), state, grad)
    for x in (sums[0][:, :, :4], sums[1][..., :4]):
        assert x.isfinite().all() and x.any() == (dtype != "fp16")


@pytest.mark.full
@pytest.mark.parametrize("case", [Case(**row) for row in sample(AXES, 100)], ids=str)
def test_sample(case, device):
    check_state(case, device)
    check_apply(case, device)
