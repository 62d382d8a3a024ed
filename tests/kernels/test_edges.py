"""Where such kernels break: splits, the range of fp16, eps, empty features, memory outside the tensors, reruns."""

import dataclasses
import re

import pytest
import torch
from cases import DTYPES, LAYOUTS, MAPS, Case, make_inputs
from linvideo_kernels.linear_attn import configs, launch
from numerics import check, run, truth

from linvideo.ops import linear_attn

MASKED = ("hedgehog", "elu", "softmax")  # phi(0) is not 0: a padded row or column that is not masked shows


@pytest.fixture
def splits(monkeypatch) -> list[int]:
    """The number of splits of N in every launch; enough multiprocessors for one split per tile in the interpreter."""
    seen = []

    def split_rows(*args):
        seen.append(plain(*args)[0])
        return plain(*args)

    plain = configs.split_rows
    monkeypatch.setattr(configs, "split_rows", split_rows)
    monkeypatch.setattr(launch, "INTERPRETER", launch.INTERPRETER._replace(sm_count=1000))
    return seen


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["hedgehog", "elu"])
def test_several_splits(name, dtype, splits, device):
    case = Case(head_dim=24, nq=197, nk=163, map=(name, True), dtype=dtype, batch=1, heads=2, v_mean=1.0)
    inputs, grad = make_inputs(case, device)
    check(case, inputs, grad, run(linear_attn, inputs, grad, case.options))
    assert len(splits) >= 6 and min(splits) > 1, splits


def test_fewer_tiles_in_the_last_split(monkeypatch, device):
    """5 tiles on 3 splits of 2: the last one ends early, and its second tile is all padding."""
    monkeypatch.setattr(configs, "split_rows", lambda length, block, *_: (-(-length // (2 * block)), 2))
    case = Case(head_dim=16, nq=4 * 64 + 1, nk=4 * 64 + 1, dtype="fp32", batch=1, heads=1)
    inputs, grad = make_inputs(case, device)
    check(case, inputs, grad, run(linear_attn, inputs, grad, case.options))


@pytest.mark.parametrize("dtype", DTYPES)
def test_reruns_are_bit_equal(dtype, splits, device):
    case = Case(head_dim=32, nq=130, nk=130, dtype=dtype)
    inputs, grad = make_inputs(case, device)
    first, second = (run(linear_attn, inputs, grad, case.options) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_and_what_lies_around_them_stay(layout, device):
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
    """NaN before, after and between the rows of every input."""
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
    """relu leaves rows of q, or every key, without features: o = 0 / eps, and 1 / eps overflows fp16."""
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
    """Nearly one-hot features, more of them than keys: phi(q) z is tiny and 1 / den beyond fp16."""
    case = Case(head_dim=64, nq=33, nk=nk, map=(name, True), dtype=dtype, input_scale=16.0, v_mean=1.0)
    inputs, grad = make_inputs(case, device)
    check(case, inputs, grad, run(linear_attn, inputs, grad, case.options))


@pytest.mark.parametrize("map", [("elu", True), ("relu", True), ("identity", False)])
def test_sums_beyond_the_range_of_fp16(map, device):
    """S and z pass 65504 long before N = 32,760."""
    case = Case(head_dim=16, nq=20, nk=3000, map=map, dtype="fp16", input_scale=64.0, v_mean=3.0, batch=1, heads=1)
    inputs, grad = make_inputs(case, device)
    with torch.no_grad():
        inputs["k"].abs_()
    assert inputs["k"].double().sum(1).max() > torch.finfo(torch.float16).max
    check(case, inputs, grad, run(linear_attn, inputs, grad, case.options))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_long_sequences(dtype, device):
    """phi / den falls with Nk: at 20,000 keys it nears fp16's subnormal numbers."""
    case = Case(head_dim=16, nq=16, nk=20_000, dtype=dtype, v_mean=1.0, batch=1, heads=1)
    inputs, grad = make_inputs(case, device)
    check(case, inputs, grad, run(linear_attn, inputs, grad, case.options))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_gradients_of_any_size(dtype, size, device):
    """The backward is linear in the gradient: a mean over a video's tokens makes it small, loss scaling large."""
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
    """Plain relative errors, whatever the error model says."""
    gates = {"fp32": (2e-6, 1e-5), "bf16": (4e-3, 8e-3)}[dtype]
    for map in MAPS[:2]:
        case = Case(head_dim=64, nq=130, nk=130, map=map, dtype=dtype, v_mean=v_mean, batch=1, heads=1)
        inputs, grad = make_inputs(case, device)
        actual, exact = run(linear_attn, inputs, grad, case.options), truth(inputs, grad, case.options)
        for name, true in exact.items():
            error = ((actual[name] - true).norm() / true.norm()).item()
            assert error < gates[name not in ("o", "dv")], f"{map[0]} {name}: {error:.1e}"


def test_memory_holds_no_features(device):
    """Allocations of a forward and backward: nothing of size N x F, and nothing kept beside the inputs and the sums."""
    case = Case(head_dim=16, nq=2400, nk=2400, dtype="fp32", batch=1, heads=2)  # rows >> splits on any GPU
    inputs, grad = make_inputs(case, device)
    limit = inputs["q"].numel() * inputs["q"].element_size()  # an N x F tensor is twice that
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        torch.autograd.grad(linear_attn(**inputs), list(inputs.values()), grad)
    own = [event for event in profile.events() if re.match(r"aten::(empty|zeros|new_)", event.name)]
    sizes = [max(event.self_cpu_memory_usage, getattr(event, "self_device_memory_usage", 0)) for event in own]
    assert max(sizes) > 0 and max(sizes) <= limit + 64

    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        linear_attn(**inputs)
    assert {x.shape for x in kept if x.shape[1:2] == (2400,)} == {inputs["q"].shape}


def test_interpreter_refuses_bf16_without_the_patch(monkeypatch, device):
    if device != "cpu":
        pytest.skip("a limit of the interpreter")
    import linvideo_kernels

    monkeypatch.setattr(linvideo_kernels, "interpreter_bf16_ok", False)
    inputs, _ = make_inputs(Case(head_dim=16, nq=4, nk=4), device)
    with pytest.raises(ValueError, match="expected float32 or float16 under TRITON_INTERPRET=1"):
        linear_attn(**inputs)


def test_kernels_really_run(monkeypatch, device):
    """Not the plain PyTorch path: breaking that changes nothing here."""
    from linvideo.ops import chunked

    monkeypatch.setattr(chunked, "forward", None)
    monkeypatch.setattr(chunked, "backward", None)
    case = Case(head_dim=16, nq=4, nk=4, dtype="fp32")
    inputs, grad = make_inputs(case, device)
    check(case, inputs, grad, run(linear_attn, inputs, grad, case.options))


def test_opcheck(device):
    inputs, _ = make_inputs(Case(head_dim=16, nq=20, nk=30, dtype="fp32", layout="packed_qkv"), device)
    arguments = (*inputs.values(), "hedgehog", 1.0, True, 1e-6)
    torch.library.opcheck(torch.ops.linvideo.linear_attn_forward.default, arguments)


def test_autocast(device):
    case = Case(head_dim=16, nq=20, nk=30, dtype="fp32")
    inputs, _ = make_inputs(case, device)
    with torch.autocast(device, torch.bfloat16):
        out = linear_attn(**inputs)
    rounded = {name: x.detach().bfloat16() if name in "qkv" else x.detach() for name, x in inputs.items()}
    assert out.dtype == torch.bfloat16 and torch.equal(out, linear_attn(**rounded))


def test_rows_past_2_to_the_31_elements(device):
    if device == "cpu":
        pytest.skip("needs a GPU: 13 GB of inputs")
    case = Case(head_dim=128, nq=64, nk=64, dtype="bf16", batch=1, heads=1)
    n = 2**31 // (3 * 12 * 128) + 1000  # rows of a packed QKV projection of 12 heads, the last ones past 2^31 elements
    packed = torch.zeros(1, n, 3, 12, 128, device=device, dtype=torch.bfloat16)
    inputs, grad = make_inputs(case, device)
    with torch.no_grad():
        for part, name in enumerate("qkv"):
            packed[:, -64:, part, 11:] = inputs[name]
    tail = {name: packed[:, :, part, 11:] for part, name in enumerate("qkv")}
    weights = {name: inputs[name].detach() for name in ("q_weight", "k_weight")}
    whole = linear_attn(tail["q"], tail["k"][:, -64:], tail["v"][:, -64:], **weights)
    assert torch.equal(whole[:, -64:], linear_attn(**{name: x.detach() for name, x in inputs.items()}))


@dataclasses.dataclass
class _Counter:
    graphs: int = 0

    def __call__(self, graph, _):
        self.graphs += 1
        return graph.forward


def test_compiles_without_graph_breaks_or_recompiles(device):
    torch._dynamo.reset()
    counter = _Counter()
    compiled = torch.compile(
        lambda q, k, v: linear_attn(q, k, v, feature_map="elu") + 1, fullgraph=True, backend=counter
    )
    for n in (20, 33, 47, 64):
        x = torch.randn(1, n, 1, 16, device=device)
        torch.testing.assert_close(compiled(x, x, x), linear_attn(x, x, x, feature_map="elu") + 1)
    assert counter.graphs <= 2  # one for the first length, one for any other
