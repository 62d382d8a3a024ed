"""linear_attn_state and linear_attn_apply on the CPU path, each on its own, against float64."""

import pytest
from cases import DTYPES, GRAD_LAYOUTS, LAYOUTS, MAPS, OPTIONS, Case, make_inputs
from halves import apply_reference, check_apply, check_state, state_reference
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import truth

from linvideo.ops import chunked

AXES = OPTIONS | {
    "map": MAPS,
    "dtype": list(DTYPES),
    "head_dim": [8, 24, 64],
    "layout": list(LAYOUTS),
    "grad_layout": list(GRAD_LAYOUTS),
    "v_mean": [0.0, 3.0],
}
CASES = st.builds(
    Case,
    nq=st.integers(1, 150),
    nk=st.integers(1, 150),
    **{name: st.sampled_from(values) for name, values in AXES.items()},
)


@pytest.fixture(autouse=True)
def short_slices(monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 1)


@given(case=CASES)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_state(case):
    check_state(case, "cpu")


@given(case=CASES)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_apply(case):
    check_apply(case, "cpu", rounds_gradient=True)


@given(case=CASES)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_the_references_of_the_halves_agree_with_the_whole_reference(case):
    inputs, grad = make_inputs(case, "cpu")
    exact = {name: x.detach().double() for name, x in inputs.items()}
    keys = {name: exact.pop(name) for name in ("k", "v", "k_weight") if name in exact}
    state, z = state_reference(options=case.options, dtype=DTYPES[case.dtype], **keys)
    out = apply_reference(state=state, z=z, options=case.options, dtype=DTYPES[case.dtype], **exact)
    whole = truth(inputs, grad, case.options)["o"]
    assert (out - whole).norm() <= 1e-12 * whole.norm()
