"""The ops on empty inputs, under transforms too, on boundaries in int64, and on fake tensors, which have no values."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import jvp, vmap
from transforms import (
    ALL,
    EVERY_MAP,
    FORWARD,
    OPS,
    WINDOW_OPTIONS,
    check_tangents,
    close,
    compiled,
    forward_over,
    inside_compile,
    named,
    of,
    one_by_one,
    pulled,
    waves,
)

EMPTY = [{"batch": 0}, {"nq": 0}, {"nk": 0}, {"batch": 0, "nq": 0, "nk": 0}, ALL | {"nq": 0}]
EMPTY += [{"batch": 0} | ALL | {"packed": "no"}, {"packed": "rows", "nq": 0}, {"packed": "rows", "nk": 0}]
EMPTY += [{"packed": x, "nq": 0, "nk": 0} for x in ("rows", "flat")]
EMPTY += [{"packed": "rows", "lengths": x} for x in (((0, 3), (4, 0), (0, 0), (2, 3)), ((0, 0), (0, 0)))]


def check_empty(p) -> None:
    names = p.leaves.keys()
    close(p.op(**p.tensors), p.reference(**p.tensors))
    gradients = pulled(p, p.op)(p.tensors)
    close(gradients, pulled(p, p.reference)(p.tensors))
    assert [x.shape for x in gradients] == [p.leaves[name].shape for name in names]
    dims = dict.fromkeys(p.tensors, None) | dict.fromkeys(names, -1)
    samples = p.tensors | {name: torch.stack([p.leaves[name], 2 * p.leaves[name]], -1) for name in names}
    close(vmap(named(p.op), in_dims=(dims,))(samples), one_by_one(named(p.reference), dims)(samples))
    batched = vmap(pulled(p, p.op), in_dims=(dims,))(samples)
    close(batched, one_by_one(pulled(p, p.reference), dims)(samples))


@pytest.mark.parametrize("option", EMPTY, ids=str)
@pytest.mark.parametrize("map", EVERY_MAP)
@pytest.mark.parametrize("op", FORWARD)
def test_empty_inputs(op, map, option):
    if map == ("identity", True) and option.get("rope"):
        pytest.skip("rotated features may be negative")
    p = of(op, map=map, **option)
    check_empty(p)
    check_tangents(p)


@pytest.mark.parametrize("option", EMPTY[:5] + EMPTY[-4:], ids=str)
@pytest.mark.parametrize("op", ["linear_attn", pytest.param("halves", marks=pytest.mark.full)])
def test_empty_inputs_inside_compile(op, option):
    p = of(op, **option)
    leaves = {name: x.clone().requires_grad_() for name, x in p.leaves.items()}
    out = compiled(p.op)(**p.others, **leaves)
    close(torch.autograd.grad(out, tuple(leaves.values()), waves(out)), pulled(p, p.reference)(p.tensors))
    check_tangents(p, inside_compile(jvp))


@pytest.mark.parametrize("op", FORWARD)
def test_int64_boundaries(op):
    p = of(op, packed="rows")
    wide = {name: x.long() for name, x in p.others.items()}
    assert all(map(torch.equal, p.op(**p.tensors), p.op(**p.leaves, **wide)))


@pytest.mark.parametrize("option", [{}, {"packed": "rows"}, ALL], ids=["plain", "packed", "all"])
@pytest.mark.parametrize("op", OPS)
def test_fake_tensors(op, option):
    p = of(op, **(WINDOW_OPTIONS if option and op == "window_attn" else option if op != "window_attn" else {}))
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(x) for name, x in p.tensors.items()}
        results = [p.op(**fake), pulled(p, p.op)(fake)]
        results += [] if op == "window_attn" else [forward_over(p, p.op)(fake)[1]]
    expected = [p.op(**p.tensors), tuple(p.leaves.values()), p.op(**p.tensors)]
    for some, like in zip(results, expected, strict=False):
        assert [(x.shape, x.dtype) for x in some] == [(x.shape, x.dtype) for x in like]


def test_a_vmap_over_no_samples():
    p = of("linear_attn", **ALL)
    dims = dict.fromkeys(p.tensors, None) | dict.fromkeys(p.leaves, 0)
    samples = p.tensors | {name: x.new_zeros(0, *x.shape) for name, x in p.leaves.items()}
    (out,), (expected,) = vmap(named(p.op), in_dims=(dims,))(samples), p.op(**p.tensors)
    assert out.shape == (0, *expected.shape)


def test_kernels_take_no_rows_where_a_gpu_reads_them_by_descriptors():
    """Triton refuses to describe an empty tensor. The launches are recorded for an H100, not run."""
    pytest.importorskip("triton")
    from linvideo_kernels import linear_attn as kernels
    from linvideo_kernels.linear_attn import launch

    weight = torch.randn(2, 128, 128, dtype=torch.bfloat16)
    for shape in ((0, 8, 2, 128), (2, 0, 2, 128), (2, 8, 2, 128)):
        rows = torch.randn(shape, dtype=torch.bfloat16)
        with launch.recording(launch.Target(90, 132)) as launches:
            state, z, _ = kernels.state(rows, rows, weight, None, None, None, "hedgehog", "ieee", False)
            scaling = "hedgehog", 1.0, True, 1e-6, "ieee", False
            kernels.apply(rows, state, z, weight, None, None, None, None, *scaling)
        assert any(made.tile.tma for made in launches) == (0 not in shape)
