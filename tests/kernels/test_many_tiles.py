"""Programs that loop over many tiles, with the tiles of a GPU and every option.

At the sizes of the other tests a GPU has enough multiprocessors to give each program one tile, so there is no second
stage of a pipeline, no second phase of TMA's barriers, and no sum over tiles. Here the device is treated as if it had
one multiprocessor. Triton's interpreter has no such tiles; it runs two short cases to show that the tests work.
"""

import dataclasses
import os

import pytest
import torch
from cases import MAPS, Case, make_inputs
from numerics import call, check, run

from linvideo.ops import linear_attn

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
BASE = Case(head_dim=128, nq=900, nk=1000, heads=2, v_mean=1.0)
EVERYTHING = {"rope": True, "mix": 0.3, "mask": "some", "packed": "rows", "group": 2, "heads": 1}
ALONE = [{}, {"rope": True}, {"mix": 0.3}, {"mask": "some"}]
OPTIONS = [
    *ALONE,
    {"packed": "rows"},
    {"group": 2, "heads": 1},
    {"layout": "packed_qkv"},
    {"layout": "heads_first"},
    {"layout": "shared_batch"},
    {"grad_layout": "sum"},
    {"rope": True, "mix": 0.3},
    {"rope": True, "layout": "packed_qkv"},
    {"rope": True, "layout": "shared_batch"},
    {"rope": True, "packed": "rows"},
    {"mix": 0.3, "layout": "shared_batch"},
    {"mix": 0.3, "packed": "rows"},
    EVERYTHING,
]
CASES = [dataclasses.replace(BASE, **option) for option in [*OPTIONS, *({"map": name} for name in MAPS)]]
CASES += [
    dataclasses.replace(BASE, dtype=dtype, **option)
    for dtype in ("fp16", "fp32")
    for option in (*ALONE, {"rope": True, "mix": 0.3}, EVERYTHING)
]
NARROWER = [{"head_dim": 64}, {"head_dim": 96}, {"head_dim": 96, "dtype": "fp16"}]
NARROWER += [{"head_dim": 96, "rope": True, "mix": 0.3}]
NARROWER += [{"head_dim": dim, **option} for dim in (16, 32) for option in ({}, {"map": ("elu", True)}, EVERYTHING)]
NARROWER += [{"head_dim": dim, "dtype": dtype} for dim in (16, 32) for dtype in ("fp16", "fp32")]
CASES += [dataclasses.replace(BASE, **option) for option in NARROWER]
TF32X3 = [dataclasses.replace(BASE, head_dim=dim, dtype="fp32") for dim in (64, 128)]
if INTERPRET:
    CASES = [dataclasses.replace(BASE, head_dim=16, nq=70, nk=140, **option) for option in ({}, EVERYTHING)]
    TF32X3 = [dataclasses.replace(TF32X3[0], head_dim=16, nq=70, nk=140)]


@pytest.fixture
def one_multiprocessor(monkeypatch, device):
    from linvideo_kernels.linear_attn import launch

    if device == "cpu":
        monkeypatch.setattr(launch, "INTERPRETER", launch.INTERPRETER._replace(sm_count=1))
    else:
        target = launch._cuda_target(torch.cuda.current_device())._replace(sm_count=1)
        monkeypatch.setattr(launch, "_cuda_target", lambda index: target)


@pytest.mark.parametrize("case", dict.fromkeys(CASES), ids=str)
def test_many_tiles_per_program(case, one_multiprocessor, device):
    inputs, grad = make_inputs(case, device)
    actual = run(linear_attn, inputs, grad, case.options)
    check(case, inputs, grad, actual)
    with torch.no_grad():  # with rope this runs another kernel, which rotates the queries on chip
        inference = call(linear_attn, inputs, case.options).double()
    check(case, inputs, grad, actual | {"o": inference})


@pytest.mark.parametrize("case", TF32X3, ids=str)
def test_many_tiles_in_tf32x3(case, one_multiprocessor, device):
    inputs, grad = make_inputs(case, device)
    check(case, inputs, grad, run(linear_attn, inputs, grad, case.options | {"fp32_precision": "tf32x3"}))


@pytest.mark.parametrize("value_first", [True, False])
def test_both_orders_of_the_state_product(value_first, one_multiprocessor, device, monkeypatch):
    """accumulate_state forms S^T = y^T phi, or S = phi^T y; some Triton releases miscompiled the second on Hopper."""
    from linvideo_kernels.linear_attn import configs

    def tile(kernel, *args):
        asked.add(kernel)
        found = table(kernel, *args)
        return found._replace(value_first=value_first) if kernel == "accumulate_state" else found

    asked, table = set(), configs.tile
    monkeypatch.setattr(configs, "tile", tile)
    inputs, grad = make_inputs(CASES[0], device)
    check(CASES[0], inputs, grad, run(linear_attn, inputs, grad, CASES[0].options))
    assert "accumulate_state" in asked


def test_reruns_of_many_tiles_are_bit_equal(one_multiprocessor, gpu):
    inputs, grad = make_inputs(CASES[0], gpu)
    first, second = (run(linear_attn, inputs, grad, CASES[0].options) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.skipif(INTERPRET, reason="hours in the interpreter")
def test_a_video(device):
    """The size of Wan 2.1 1.3B at 480p, 32,760 tokens and 12 heads, on all multiprocessors."""
    if torch.cuda.mem_get_info()[0] < 48e9:
        pytest.skip("needs 48 GB of free GPU memory for the float64 reference")
    case = dataclasses.replace(BASE, nq=32_760, batch=1, heads=12, rope=True, mix=0.3)
    inputs, grad = make_inputs(case, device)
    check(case, inputs, grad, run(linear_attn, inputs, grad, case.options))
