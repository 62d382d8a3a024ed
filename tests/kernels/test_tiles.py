"""The ways in which kernels may read and multiply a tile: all give correct results, and most give the same bits."""

import dataclasses
import importlib
import itertools

import pytest
import torch
from cases import DTYPES, LAYOUTS, MAPS, Case, make_inputs
from claims import assert_same_bits
from linvideo_kernels.linear_attn import configs, side
from numerics import check, run

from linvideo.ops import linear_attn


@pytest.fixture(autouse=True)
def interpreter_only(device):
    if device != "cpu":
        pytest.skip("only the interpreter can run any tile; a GPU has only those of its table")


BASE = Case(head_dim=16, nq=131, nk=70)  # neither length fills its last tile


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "head_dim"), [("fp32", 24), ("fp16", 16), ("bf16", 24)])
def test_descriptors_read_what_pointers_read(head_dim, dtype, layout, set_tiles, monkeypatch, device):
    """Past the end TMA gives zeros, and pointers repeat a row, but the results have the same bits."""
    case = dataclasses.replace(BASE, head_dim=head_dim, dtype=dtype, layout=layout, heads=1)
    inputs, grad = make_inputs(case, device)
    used = []

    def descriptor(*args):
        used.append(args)
        return plain(*args)

    plain = side.descriptor
    for module in ("accumulate", "apply"):
        monkeypatch.setattr(importlib.import_module(f"linvideo_kernels.linear_attn.{module}"), "descriptor", descriptor)
    expected = run(linear_attn, inputs, grad, case.options)
    assert not used
    set_tiles(tma=True)
    assert_same_bits(expected, run(linear_attn, inputs, grad, case.options))
    assert used or layout == "shared_batch"


def test_the_table_uses_descriptors_only_where_they_can_read():
    """A descriptor reads every key, has one fixed length, and cannot handle strides of 0."""
    taken = set()
    options = ("rope", "mix", "key_mask", "packed", "expanded", "factors", "keys")
    subsets = [frozenset(s) for n in range(len(options) + 1) for s in itertools.combinations(options, n)]
    kernels = ("accumulate_state", "apply_state", "map_grad", "project_grad")
    for kernel, capability, dim, dtype in itertools.product(kernels, (80, 89, 90, 100, 120), (16, 64, 96, 128), DTYPES):
        for given in subsets:
            tile = configs.tile(kernel, dim, DTYPES[dtype], capability, "hedgehog", given)
            unfit = {"packed", "expanded"} | ({"key_mask"} if kernel == "accumulate_state" else set())
            assert not tile.tma or not given & unfit, (kernel, capability, dim, dtype, given)
            taken |= {kernel} if tile.tma else set()
    assert taken == {"accumulate_state", "apply_state"}


@pytest.mark.parametrize("capability", configs.AMD)
def test_amd_has_neither_descriptors_nor_a_register_limit(capability):
    kernels = (
        "accumulate_state",
        "apply_state",
        "map_grad",
        "project_grad",
        "reduce_state",
        "prepare_state",
        "mix_grad",
    )
    options = ("rope", "mix", "key_mask", "packed", "factors", "keys")
    subsets = [frozenset(s) for n in range(3) for s in itertools.combinations(options, n)]
    for kernel, dim, dtype, given in itertools.product(kernels, (16, 64, 96, 128), DTYPES.values(), subsets):
        tile = configs.tile(kernel, dim, dtype, capability, "hedgehog", given)
        assert not tile.tma and tile.z_by_dot and tile.options.keys() == {
            "num_warps", "num_stages", "matrix_instr_nonkdim"
        }  # fmt: skip
    with pytest.raises(ValueError, match=f"'ieee' on gfx{capability}, got 'tf32x3'"):
        configs.tile("apply_state", 64, torch.float32, capability, "hedgehog", frozenset({"tf32x3"}))


@pytest.mark.parametrize("map", [("identity", False), ("elu", True), ("hedgehog_joint", True)], ids=str)
def test_descriptors_ignore_nan_past_the_end(map, set_tiles, device):
    """Rows behind the last one, which belong to other tensors in the same memory, have no effect."""
    set_tiles(tma=True)
    case = dataclasses.replace(BASE, map=map, dtype="fp32", heads=1)
    inputs, grad = make_inputs(case, device)
    for name in "qkv":
        x = inputs[name].detach()
        longer = x.new_full((x.shape[0], x.shape[1] + 64, *x.shape[2:]), float("nan"))
        longer[:, : x.shape[1]] = x
        inputs[name] = longer[:, : x.shape[1]].requires_grad_()
    check(case, inputs, grad, run(linear_attn, inputs, grad, case.options))


@pytest.mark.parametrize("changed", ["value_first", "z_by_dot"])
@pytest.mark.parametrize(("map", "dtype"), list(zip(MAPS, itertools.cycle(DTYPES), strict=False)), ids=str)
def test_other_ways_to_the_state(map, dtype, changed, set_tiles, device):
    """S is formed as phi^T v instead of (v^T phi)^T, or z is summed in registers instead of by a product."""
    set_tiles(**{changed: False})
    case = dataclasses.replace(BASE, map=map, dtype=dtype, heads=1)
    inputs, grad = make_inputs(case, device)
    check(case, inputs, grad, run(linear_attn, inputs, grad, case.options))


@pytest.mark.parametrize("dtype", DTYPES)
def test_state_on_chip_or_read_again(dtype, set_tiles, device):
    case = dataclasses.replace(BASE, dtype=dtype)
    inputs, grad = make_inputs(case, device)
    expected = run(linear_attn, inputs, grad, case.options)
    set_tiles(keeps=False)
    assert_same_bits(expected, run(linear_attn, inputs, grad, case.options))


@pytest.mark.parametrize("block", [16, 32, 128])
def test_any_tile_height(block, set_tiles, device):
    set_tiles(block=block)
    case = dataclasses.replace(BASE, rope=True, mix=0.3, mask="some", packed="rows", group=3, heads=1)
    inputs, grad = make_inputs(case, device)
    check(case, inputs, grad, run(linear_attn, inputs, grad, case.options))
