"""Where such kernels tend to break: splits, fp16's range, eps, empty features, memory outside the tensors, reruns."""

import pytest
import torch
from cases import DTYPES, LAYOUTS, MAPS, Case, make_inputs
from linvideo_kernels.linear_attn import configs, launch
from numerics import check, run, truth

from linvideo.ops import linear_attn
from linvideo.ops.reference import linear_attn_reference

# maps with phi(0) > 0, which show padded rows or columns that are not masked
MASKED = ("hedgehog", "hedgehog_joint", "elu", "softmax")


@pytest.fixture
def splits(monkeypatch) -> list[int]:
    """Record the number of splits in every launch; in the interpreter, there are enough SMs for one split per tile."""
    seen = []

    def deal_out(tile, length, *args):
        work = plain(tile, length, *args)
        seen.append(-(-length // work.rows))
        return work

    plain = configs.deal_out
    monkeypatch.setattr(configs, "deal_out", deal_out)
    monkeypatch.setattr(launch, "INTERPRETER", launch.INTERPRETER._replace(sm_count=1000))
    return seen


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["hedgehog", "hedgehog_joint", "elu"])
def test_several_splits(name, dtype, splits, device):
    case = Case(head_dim=24, nq=197, nk=163, map=(name, True), dtype=dtype, batch=1, heads=2, v_mean=1.0)
    inputs, grad = make_inputs(case, device)
    check(case, inputs, grad, run(linear_attn, inputs, grad, case.options))
    assert len(splits) >= 6 and min(splits) > 1, splits


def test_several_splits_with_every_option(splits, device):
    case = Case(head_dim=16, nq=197, rope=True, mix=0.3, mask="some", packed="rows", group=3, heads=1, v_mean=1.0)
    inputs, grad = make_inputs(case, device)
    check(case, inputs, grad, run(linear_attn, inputs, grad, case.options))
    assert len(splits) >= 6 and min(splits) > 1, splits


@pytest.mark.parametrize("packed", ["no", "rows"])
def test_fewer_tiles_in_the_last_split(packed, monkeypatch, device):
    """With 5 tiles in 3 splits of 2, the last split ends early: its second tile is all padding."""

    def deal_out(tile, length, batch, sequences, *_):
        rows = 2 * tile.block
        splits = -(-length // rows)
        if sequences is None:
            return configs.Work(batch, batch * splits, splits, rows)
        return configs.Work(sequences, length // rows + sequences, 0, rows)

    monkeypatch.setattr(configs, "deal_out", deal_out)
    case = Case(head_dim=16, nq=4 * 64 + 1, nk=4 * 64 + 1, dtype="fp32", batch=1, heads=1, packed=packed)
    inputs, grad = make_inputs(case, device)
    check(case, inputs, grad, run(linear_attn, inputs, grad, case.options))


@pytest.mark.parametrize("sm_count", [1, 4, 132])
@pytest.mark.parametrize("block", [16, 64, 128])
@pytest.mark.parametrize("length", [1, 64, 65, 1000, 32_760])
def test_work_covers_every_row_once(length, block, sm_count):
    """Each row of each sequence is in exactly one item of deal_out, when items are found as in tiles.locate."""
    tile = configs.Tile(block, 4, 1)
    work = configs.deal_out(tile, length, 2, None, 12, sm_count)
    assert work.items == 2 * work.splits and work.rows % block == 0
    assert (work.splits - 1) * work.rows < length <= work.splits * work.rows
    ends = [0, 0, length // 3, length // 3 + 1, length]
    packed = configs.deal_out(tile, length, 1, len(ends) - 1, 12, sm_count)
    last = 0
    for sequence, (first, end) in enumerate(zip(ends, ends[1:], strict=False)):
        item = first // packed.rows + sequence
        assert item >= last  # the items of the previous sequence end before it
        last = item - (-(end - first) // packed.rows)
    assert last <= packed.items


@pytest.mark.parametrize("dtype", DTYPES)
def test_reruns_are_bit_equal(dtype, splits, gpu):
    case = Case(head_dim=32, nq=130, nk=130, dtype=dtype)
    inputs, grad = make_inputs(case, gpu)
    first, second = (run(linear_attn, inputs, grad, case.options) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_and_the_memory_around_them_are_not_written(layout, device):
    case = Case(head_dim=24, nq=17, nk=33, layout=layout, dtype="fp32")
    inputs, grad = make_inputs(case, device)
    storages = [x.untyped_storage() for x in (*inputs.values(), grad)]
    before = [torch.tensor(list(bytes(storage.cpu())), dtype=torch.uint8) for storage in storages]
    run(linear_attn, inputs, grad, case.options)
    after = [torch.tensor(list(bytes(storage.cpu())), dtype=torch.uint8) for storage in storages]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MASKED)
def test_nothing_outside_the_tensors_is_read(name, dtype, device):
    """There is NaN before, after and between the rows of every input."""
    case = Case(head_dim=24, nq=17, nk=33, map=(name, True), layout="guarded", dtype=dtype)
    inputs, grad = make_inputs(case, device)
    check(case, inputs, grad, run(linear_attn, inputs, grad, case.options))


@pytest.mark.parametrize("eps", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("nk", [1, 63])
def test_eps_is_added_to_the_plain_sum(eps, dtype, nk, device):
    case = Case(head_dim=32, nq=17, nk=nk, eps=eps, dtype=dtype, v_mean=3.0)
    inputs, grad = make_inputs(case, device)
    check(case, inputs, grad, run(linear_attn, inputs, grad, case.options))


@pytest.mark.parametrize("scale", [None, 0.125, -2.0])
def test_scale(scale, device):
    case = Case(head_dim=16, nq=17, nk=17, map=("elu", False), dtype="fp32")
    inputs, grad = make_inputs(case, device)
    options = {"feature_map": "elu", "normalize": False, "scale": scale}
    actual, exact = run(linear_attn, inputs, grad, options), truth(inputs, grad, options)
    for name in exact:
        torch.testing.assert_close(actual[name], exact[name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_or_keys_without_positive_features(dtype, device):
    """Where relu leaves a query or all keys without features, o = 0 / eps; 1 / eps overflows fp16."""
    case = Case(head_dim=32, nq=33, nk=17, map=("relu", True), dtype=dtype)
    inputs, grad = make_inputs(case, device)
    with torch.no_grad():
        inputs["q"][:, ::2] = -inputs["q"][:, ::2].abs()
        inputs["k"][1] = -inputs["k"][1].abs()
    actual = run(linear_attn, inputs, grad, case.options)
    assert not actual["o"][:, ::2].any() and not actual["o"][1].any()
    check(case, inputs, grad, actual)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("name", ["hedgehog", "softmax"])
@pytest.mark.parametrize("nk", [1, 15])
def test_queries_that_share_little_with_the_keys(name, dtype, nk, device):
    """With nearly one-hot features, more of them than keys, phi(q) z is tiny and 1 / den exceeds fp16."""
    case = Case(head_dim=64, nq=33, nk=nk, map=(name, True), dtype=dtype, input_scale=16.0, v_mean=1.0)
    inputs, grad = make_inputs(case, device)
    check(case, inputs, grad, run(linear_attn, inputs, grad, case.options))


@pytest.mark.parametrize("normalize", [True, False])
def test_queries_whose_elu_features_are_below_fp16(normalize, device):
    """All channels are below -17, where exp(x) is 0 in fp16; a power of two per row keeps the features."""
    case = Case(head_dim=24, nq=70, nk=80, map=("elu", normalize), dtype="fp16")
    inputs, _ = make_inputs(case, device)
    with torch.no_grad():
        inputs["q"].abs_().neg_().sub_(17)
        options = case.options | ({} if normalize else {"scale": 2.0**20})
        actual = linear_attn(**inputs, **options).double()
        expected = linear_attn_reference(**{name: x.double() for name, x in inputs.items()}, **options)
    assert expected.abs().max() > 1e-3
    assert (actual - expected).norm() <= 2e-3 * expected.norm()


@pytest.mark.parametrize("map", [("elu", True), ("relu", True), ("identity", False)])
def test_sums_beyond_the_range_of_fp16(map, device):
    """S and z exceed 65504 long before N = 32,760."""
    case = Case(head_dim=16, nq=20, nk=3000, map=map, dtype="fp16", input_scale=64.0, v_mean=3.0, batch=1, heads=1)
    inputs, grad = make_inputs(case, device)
    with torch.no_grad():
        inputs["k"].abs_()
    assert inputs["k"].double().sum(1).max() > torch.finfo(torch.float16).max
    check(case, inputs, grad, run(linear_attn, inputs, grad, case.options))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_long_sequences(dtype, set_tiles, device):
    """phi / den decreases with Nk, and at 20,000 keys it is close to fp16's subnormal numbers."""
    set_tiles(block=1024)  # fewer steps in the interpreter
    case = Case(head_dim=16, nq=16, nk=20_000, dtype=dtype, v_mean=1.0, batch=1, heads=1)
    inputs, grad = make_inputs(case, device)
    check(case, inputs, grad, run(linear_attn, inputs, grad, case.options))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_gradients_of_any_size(dtype, size, device):
    """Gradients may be small (a mean over a video's tokens) or large (loss scaling); the backward is linear in them."""
    case = Case(head_dim=32, nq=33, nk=33, dtype=dtype)
    inputs, grad = make_inputs(case, device)
    grad = (grad.double() * size).to(grad.dtype)
    check(case, inputs, grad, run(linear_attn, inputs, grad, case.options))


@pytest.mark.parametrize("map", MAPS, ids=str)
def test_nan_and_infinity_are_not_hidden(map, device):
    case = Case(head_dim=16, nq=20, nk=40, map=map, dtype="fp32", batch=2, heads=1)
    inputs, _ = make_inputs(case, device)
    for name in "qkv":
        broken = {other: x.detach().clone() for other, x in inputs.items()}
        broken[name][0, 3, 0, 5] = float("nan")
        out = linear_attn(**broken, **case.options)
        assert out[0].isnan().any() and not out[1].isnan().any(), name


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("v_mean", [0.0, 1.0, 3.0])
def test_fixed_gates_on_typical_inputs(v_mean, dtype, device):
    """Plain relative errors are small, independent of the error model."""
    gates = {"fp32": (2e-6, 1e-5), "bf16": (4e-3, 8e-3)}[dtype]
    for map in MAPS[:2]:
        case = Case(head_dim=64, nq=130, nk=130, map=map, dtype=dtype, v_mean=v_mean, batch=1, heads=1)
        inputs, grad = make_inputs(case, device)
        actual, exact = run(linear_attn, inputs, grad, case.options), truth(inputs, grad, case.options)
        for name, true in exact.items():
            error = ((actual[name] - true).norm() / true.norm()).item()
            assert error < gates[name not in ("o", "dv")], f"{map[0]} {name}: {error:.1e}"


def test_interpreter_refuses_bf16_without_the_patch(monkeypatch, device):
    if device != "cpu":
        pytest.skip("a limit of the interpreter")
    monkeypatch.undo()  # undoes the fixture that lifts the refusal
    inputs, _ = make_inputs(Case(head_dim=16, nq=4, nk=4), device)
    with pytest.raises(ValueError, match="expected float32 or float16 under TRITON_INTERPRET=1"):
        linear_attn(**inputs)


def test_gradients_near_the_end_of_fp16(device):
    """With a large loss scale, do . o leaves fp16's range before any gradient does, as a sum of D products."""
    case = Case(head_dim=128, nq=64, nk=64, dtype="fp16", batch=1, heads=1, map=("softmax", True), input_scale=4.0)
    inputs, grad = make_inputs(case, device)
    grad = 1000.0 * grad.sign()
    with torch.no_grad():  # query n attends to its own key, whose value points in the direction of the gradient
        inputs["k"].copy_(inputs["q"])
        inputs["v"].copy_(grad.sign())
    actual, exact = run(linear_attn, inputs, grad, case.options), truth(inputs, grad, case.options)
    assert (grad.double() * exact["o"]).sum(-1).abs().max() > torch.finfo(torch.float16).max
    for name, x in exact.items():
        assert x.abs().max() < torch.finfo(torch.float16).max, name
        assert (actual[name] - x).norm() < 0.02 * x.norm(), name
