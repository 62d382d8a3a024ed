"""Forward and every gradient of the kernels against float64: each axis alone, a pairwise sample and, marked `full`, a
larger random sample. The op's options are covered by test_options.
"""

import dataclasses

import pytest
from cases import DTYPES, GRAD_LAYOUTS, LAYOUTS, MAPS, Case, make_inputs, of_many_terms, pairwise, sample
from numerics import check, run

from linvideo.ops import linear_attn

AXES = {
    "head_dim": [8, 16, 24, 32, 64, 96, 128],
    "nq": [1, 15, 17, 63, 130],
    "nk": [1, 15, 17, 63, 130],
    "map": MAPS,
    "dtype": list(DTYPES),
    "layout": list(LAYOUTS),
    "grad_layout": list(GRAD_LAYOUTS),
    "input_scale": [1.0, 4.0, 16.0],
    "v_mean": [0.0, 1.0, 3.0],
}
BASE = Case()


def single_axis() -> list[Case]:
    cases = [dataclasses.replace(BASE, **{axis: value}) for axis, values in AXES.items() for value in values]
    # fp32 has faults of its own, which 16 bits do not show
    cases += [dataclasses.replace(case, dtype="fp32") for case in cases if case.dtype == "bf16"]
    return list(dict.fromkeys(cases))


def assert_accurate(case: Case, device: str) -> None:
    inputs, grad = make_inputs(case, device)
    check(case, inputs, grad, run(linear_attn, inputs, grad, case.options))


@pytest.mark.parametrize("case", single_axis(), ids=str)
def test_single_axis(case, device):
    assert_accurate(case, device)


@pytest.mark.parametrize("case", [Case(**row) for row in pairwise(AXES)], ids=str)
def test_pairwise(case, device):
    assert_accurate(case, device)


@pytest.mark.full
@pytest.mark.parametrize("case", [of_many_terms(Case(**row)) for row in sample(AXES, 300)], ids=str)
def test_sample(case, device):
    assert_accurate(case, device)
