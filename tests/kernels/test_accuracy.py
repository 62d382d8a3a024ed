"""Forward and every gradient of the kernels against float64: each axis alone, a pairwise sample; `full`: products."""

import dataclasses
import itertools

import pytest
from cases import DTYPES, GRAD_LAYOUTS, LAYOUTS, MAPS, Case, make_inputs, pairwise
from numerics import check, run

from linvideo.ops import linear_attn

AXES = {
    "head_dim": [16, 24, 32, 64, 96, 128],
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
    # what goes wrong in 16 bits and what goes wrong in fp32 are different things
    cases += [dataclasses.replace(case, dtype="fp32") for case in cases if case.dtype == "bf16"]
    return list(dict.fromkeys(cases))


def product(**fixed) -> list[Case]:
    axes = {name: [fixed[name]] if name in fixed else values for name, values in AXES.items()}
    return [Case(**dict(zip(axes, row, strict=True))) for row in itertools.product(*axes.values())]


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
@pytest.mark.parametrize(
    "case", product(layout="packed_qkv", grad_layout="contiguous", input_scale=1.0, v_mean=1.0), ids=str
)
def test_product_of_shapes_maps_and_dtypes(case, device):
    assert_accurate(case, device)


@pytest.mark.full
@pytest.mark.parametrize("case", product(head_dim=64, nq=17, nk=63), ids=str)
def test_product_of_values_and_layouts(case, device):
    assert_accurate(case, device)
