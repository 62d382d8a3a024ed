"""The tiles of wide heads on a GPU, with every option, each program walking over many of them.

At the sizes of the other tests a GPU's hundred multiprocessors give a program one tile: no second stage of a pipeline,
no second phase of TMA's barriers, no sum that is carried on. Here the device is taken to have one multiprocessor.
"""

import dataclasses
import os

import pytest
import torch
from cases import MAPS, Case, make_inputs
from numerics import call, check, run

from linvideo.ops import linear_attn

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("for the tiles of a GPU; test_tiles is for the interpreter", allow_module_level=True)

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
CASES += [dataclasses.replace(BASE, **option) for option in NARROWER]


@pytest.fixture
def one_multiprocessor(monkeypatch, device):
    from linvideo_kernels.linear_attn import launch

    target = launch._cuda_target(torch.cuda.current_device())._replace(sm_count=1)
    monkeypatch.setattr(launch, "_cuda_target", lambda index: target)


@pytest.mark.parametrize("case", dict.fromkeys(CASES), ids=str)
def test_many_tiles_a_program(case, one_multiprocessor, device):
    inputs, grad = make_inputs(case, device)
    actual = run(linear_attn, inputs, grad, case.options)
    check(case, inputs, grad, actual)
    with torch.no_grad():  # with rope another kernel: the queries are turned on chip
        inference = call(linear_attn, inputs, case.options).double()
    check(case, inputs, grad, actual | {"o": inference})


@pytest.mark.parametrize("head_dim", [64, 128])
def test_many_tiles_in_tf32x3(head_dim, one_multiprocessor, device):
    case = dataclasses.replace(BASE, head_dim=head_dim, dtype="fp32")
    inputs, grad = make_inputs(case, device)
    check(case, inputs, grad, run(linear_attn, inputs, grad, case.options | {"fp32_precision": "tf32x3"}))


def test_a_video(device):
    """Wan 2.1 1.3B at 480p, on all multiprocessors: 32,760 tokens of 12 heads."""
    if torch.cuda.mem_get_info()[0] < 48e9:
        pytest.skip("needs 48 GB of free GPU memory: the truth is float64")
    case = dataclasses.replace(BASE, nq=32_760, batch=1, heads=12, rope=True, mix=0.3)
    inputs, grad = make_inputs(case, device)
    check(case, inputs, grad, run(linear_attn, inputs, grad, case.options))
