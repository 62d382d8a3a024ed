"""Forward and every gradient of the kernels with the op's options, against float64: each option alone, a pairwise
sample together with shapes, dtypes, layouts and tiles and, marked `full`, a larger random sample.
"""

import dataclasses

import pytest
from cases import DTYPES, GRAD_LAYOUTS, LAYOUTS, MAPS, OPTIONS, Case, make_inputs, of_many_terms, pairwise, sample
from numerics import check, run

from linvideo.ops import linear_attn

BASE = Case(head_dim=16, nq=67, nk=70)
TILES = {
    "block": [16, 32, 64],
    "tma": [False, True],  # the interpreter can read through descriptors, too, if nothing is packed or masked
    "value_first": [False, True],
    "keeps": [False, True],
}
AXES = OPTIONS | TILES
AXES |= {
    "dtype": list(DTYPES),
    "head_dim": [8, 16, 24, 64],
    "nq": [1, 33, 130],
    "nk": [1, 33, 130],
    "layout": list(LAYOUTS),
    "grad_layout": list(GRAD_LAYOUTS),
    "v_mean": [0.0, 3.0],
}


def alone() -> list[Case]:
    """Return a case for every value of every option and for every map, in each dtype."""
    changes = [{name: value} for name, values in (OPTIONS | {"map": MAPS}).items() for value in values]
    cases = [dataclasses.replace(BASE, dtype=dtype, **change) for dtype in DTYPES for change in changes]
    return list(dict.fromkeys(cases))


def assert_accurate(case: Case, device: str) -> None:
    inputs, grad = make_inputs(case, device)
    check(case, inputs, grad, run(linear_attn, inputs, grad, case.options))


def assert_row(row: dict, set_tiles, device: str, rows: int) -> None:
    set_tiles(**{name: row[name] for name in TILES})
    case = Case(**{name: value for name, value in row.items() if name not in TILES})
    assert_accurate(of_many_terms(case, rows), device)


def name_of(row: dict) -> str:
    return "-".join(f"{value}" for value in row.values())


@pytest.mark.parametrize("case", alone(), ids=str)
def test_alone(case, device):
    assert_accurate(case, device)


@pytest.mark.parametrize("row", list(pairwise(AXES)), ids=name_of)
def test_pairwise(row, set_tiles, device):
    assert_row(row, set_tiles, device, rows=1)


@pytest.mark.parametrize("map", [("hedgehog", True), ("elu", False)], ids=str)
def test_tf32x3(map, device):
    """Three TF32 products are as accurate as one in fp32; the option does not affect other dtypes."""
    for dtype in DTYPES:
        case = dataclasses.replace(BASE, map=map, dtype=dtype, head_dim=24)
        inputs, grad = make_inputs(case, device)
        check(case, inputs, grad, run(linear_attn, inputs, grad, case.options | {"fp32_precision": "tf32x3"}))


@pytest.mark.full
@pytest.mark.parametrize("row", sample(AXES, 300), ids=name_of)
def test_sample(row, set_tiles, device):
    assert_row(row, set_tiles, device, rows=15)
