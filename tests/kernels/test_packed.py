"""Packed sequences of many lengths: empty, one row, whole tiles, several tiles and a remainder."""

import dataclasses

import pytest
import torch
from cases import DTYPES, Case, make_inputs
from linvideo_kernels.linear_attn import launch
from numerics import check, run

from linvideo.ops import checks, linear_attn

LENGTHS = {
    "every tile end": ((64, 65), (63, 1), (1, 64), (65, 63), (2, 2)),
    "long among short": ((1, 1), (300, 260), (0, 1), (1, 0), (3, 3)),
    "empty at both ends": ((0, 0), (5, 0), (0, 5), (130, 130), (0, 0)),
    "no queries with keys": ((17, 0), (0, 9)),
    "one": ((70, 131),),
    "many of one row": ((1, 1),) * 12,
}
BASE = Case(head_dim=16, heads=1, v_mean=1.0)


def assert_accurate(case: Case, device: str) -> dict:
    inputs, grad = make_inputs(case, device)
    actual = run(linear_attn, inputs, grad, case.options)
    check(case, inputs, grad, actual)
    return actual


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LENGTHS)
def test_lengths(name, dtype, device):
    assert_accurate(dataclasses.replace(BASE, lengths=LENGTHS[name], packed="flat", dtype=dtype), device)


@pytest.mark.parametrize("map", [("hedgehog_joint", True), ("elu", False), ("relu", True)], ids=str)
def test_lengths_of_other_maps_in_groups(map, device):
    lengths = LENGTHS["long among short"]
    assert_accurate(dataclasses.replace(BASE, lengths=lengths, packed="rows", group=3, map=map, heads=2), device)


@pytest.mark.parametrize("sm_count", [1, 1000])
def test_few_and_many_programs(sm_count, monkeypatch, device):
    """An item may be longer than a sequence, or there is an item for each tile."""
    monkeypatch.setattr(launch, "INTERPRETER", launch.INTERPRETER._replace(sm_count=sm_count))
    assert_accurate(dataclasses.replace(BASE, lengths=LENGTHS["long among short"], packed="rows", mix=0.3), device)


def test_queries_without_keys_give_zero(device):
    """Their output and gradients are 0, and so are those of a sequence without queries."""
    case = dataclasses.replace(BASE, lengths=LENGTHS["no queries with keys"], packed="rows")
    results = assert_accurate(case, device)
    assert not any(x.any() for x in results.values())


def test_sequences_do_not_see_each_other(device):
    """NaN in one sequence does not reach the others."""
    case = dataclasses.replace(BASE, lengths=((70, 70), (33, 40), (64, 64)), packed="rows", dtype="fp32")
    inputs, grad = make_inputs(case, device)
    expected = run(linear_attn, inputs, grad, case.options)
    with torch.no_grad():
        for name, start in (("q", 70), ("k", 70), ("v", 70)):
            inputs[name][:, start : start + 33] = float("nan")
    actual = run(linear_attn, inputs, grad, case.options)
    assert actual["o"][:, 70:103].isnan().all()
    for rows in (slice(0, 70), slice(103, None)):
        assert torch.equal(actual["o"][:, rows], expected["o"][:, rows])
        assert torch.equal(actual["dq"][:, rows], expected["dq"][:, rows])
    for rows in (slice(0, 70), slice(110, None)):
        assert torch.equal(actual["dk"][:, rows], expected["dk"][:, rows])
        assert torch.equal(actual["dv"][:, rows], expected["dv"][:, rows])


def test_rows_that_no_sequence_covers_are_zero(monkeypatch, device):
    """On a GPU the values of cu_seqlens are not checked: rows outside the sequences, even NaN, affect no gradient."""
    monkeypatch.setattr(checks, "check_packed", lambda *args: None)
    case = Case(head_dim=16, nq=90, nk=90, batch=1, rope=True, mix=0.3)
    inputs, grad = make_inputs(case, device)
    covered = slice(10, 70)
    with torch.no_grad():
        for name in ("q", "k", "v", "softmax_out"):
            inputs[name][:, :10] = inputs[name][:, 70:] = float("nan")
    ends = torch.tensor([10, 40, 70], dtype=torch.int32, device=device)
    out = run(linear_attn, inputs, grad, case.options | {"cu_seqlens_q": ends, "cu_seqlens_k": ends})
    part = {name: x.detach()[:, covered].clone() if x.dim() == 4 else x.detach().clone() for name, x in inputs.items()}
    part = {name: x.requires_grad_() for name, x in part.items()}
    options = case.options | {"rope": tuple(table[covered] for table in case.options["rope"])}
    inside = run(
        linear_attn, part, grad[:, covered], options | dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), ends - 10)
    )
    for name, x in out.items():
        assert x.isfinite().all(), name
        if x.dim() == 4:
            assert not x[:, :10].any() and not x[:, 70:].any(), name
            x = x[:, covered]
        torch.testing.assert_close(x, inside[name], rtol=1e-5, atol=1e-6, msg=name)
