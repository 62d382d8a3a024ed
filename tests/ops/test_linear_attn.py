"""The op on CPU tensors: values and gradients against float64, options, layouts, memory."""

import dataclasses

import pytest
import torch
from cases import DTYPES, GRAD_LAYOUTS, LAYOUTS, MAPS, OPTIONS, Case, make_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import call, check, run

from linvideo.ops import chunked, linear_attn

BASE = Case(head_dim=24, nq=150, nk=130, heads=3)  # more than two slices of 64 rows


@pytest.fixture(autouse=True)
def short_slices(monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 1)  # slices of 64 rows, the minimum: small inputs take several


CASES = {
    "head_dim": st.sampled_from([8, 16, 24, 64, 96, 128]),
    "nq": st.integers(1, 200),
    "nk": st.integers(1, 200),
    "map": st.sampled_from(MAPS),
    "dtype": st.sampled_from(list(DTYPES)),
    "layout": st.sampled_from(LAYOUTS),
    "grad_layout": st.sampled_from(GRAD_LAYOUTS),
    "input_scale": st.sampled_from([1.0, 4.0, 16.0]),
    "v_mean": st.sampled_from([0.0, 1.0, 3.0]),
    "eps": st.sampled_from([1e-6, 0.1]),
    "batch": st.integers(1, 2),
    "heads": st.integers(1, 3),
}
WITH_OPTIONS = CASES | {name: st.sampled_from(values) for name, values in OPTIONS.items() if name != "map"}


def assert_accurate(case: Case, seed: int = 0, either: bool = False) -> None:
    inputs, grad = make_inputs(case, "cpu", seed)
    check(case, inputs, grad, run(linear_attn, inputs, grad, case.options), either)


@given(case=st.builds(Case, **CASES), seed=st.integers(0, 2**16))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_matches_float64(case, seed):
    assert_accurate(case, seed)


@given(case=st.builds(Case, **WITH_OPTIONS), seed=st.integers(0, 2**16))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_options_together_match_float64(case, seed):
    assert_accurate(case, seed, either=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("option", "value"), [(name, value) for name, values in OPTIONS.items() for value in values])
def test_every_option_alone(option, value, dtype):
    assert_accurate(dataclasses.replace(BASE, dtype=dtype, **{option: value}))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("map", MAPS)
def test_every_map_in_every_dtype(map, dtype):
    case = dataclasses.replace(BASE, map=map, dtype=dtype)
    inputs, grad = make_inputs(case, "cpu")
    check(case, inputs, grad, run(linear_attn, inputs, grad, case.options))


@pytest.mark.parametrize("length", [64, 65, 129])
def test_ends_of_slices(length):
    case = dataclasses.replace(BASE, nq=length, nk=length, dtype="fp32")
    inputs, grad = make_inputs(case, "cpu")
    check(case, inputs, grad, run(linear_attn, inputs, grad, case.options))


def test_slicing_does_not_change_the_answer(monkeypatch):
    inputs, grad = make_inputs(dataclasses.replace(BASE, dtype="fp32"), "cpu")
    sliced = run(linear_attn, inputs, grad, BASE.options)
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 1 << 30)
    for name, whole in run(linear_attn, inputs, grad, BASE.options).items():
        torch.testing.assert_close(sliced[name], whole, rtol=1e-5, atol=1e-5, msg=name)


def test_reruns_are_bit_equal():
    inputs, grad = make_inputs(BASE, "cpu")
    first, second = (run(linear_attn, inputs, grad, BASE.options) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_inputs_are_not_written():
    inputs, grad = make_inputs(dataclasses.replace(BASE, layout="packed_qkv"), "cpu")
    before = {name: x.detach().clone() for name, x in inputs.items()}
    run(linear_attn, inputs, grad, BASE.options)
    assert all(torch.equal(before[name], x) for name, x in inputs.items())


def test_softmax_of_huge_logits_is_finite():
    """exp(300) overflows fp32, so the maximum has to be subtracted first, for both signs."""
    case = dataclasses.replace(BASE, dtype="fp32", input_scale=100.0)
    inputs, grad = make_inputs(case, "cpu")
    check(case, inputs, grad, run(linear_attn, inputs, grad, case.options))


@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_without_positive_features(dtype):
    """Where relu leaves a query or all keys without features, o = 0 / eps; 1 / eps overflows fp16."""
    case = dataclasses.replace(BASE, map=("relu", True), dtype=dtype)
    inputs, grad = make_inputs(case, "cpu")
    with torch.no_grad():
        inputs["q"][:, ::2] = -inputs["q"][:, ::2].abs()
        inputs["k"][1] = -inputs["k"][1].abs()
    actual = run(linear_attn, inputs, grad, case.options)
    assert not actual["o"][:, ::2].any() and not actual["o"][1].any()
    check(case, inputs, grad, actual)


def test_only_some_inputs_need_gradients():
    inputs, grad = make_inputs(BASE, "cpu")
    whole = dict(zip(inputs, torch.autograd.grad(linear_attn(**inputs), list(inputs.values()), grad), strict=True))
    for name in inputs:
        some = {other: x.detach().requires_grad_(other == name) for other, x in inputs.items()}
        (got,) = torch.autograd.grad(linear_attn(**some), [some[name]], grad)
        assert torch.equal(got, whole[name])
    assert not linear_attn(**{name: x.detach() for name, x in inputs.items()}).requires_grad


def test_weights_may_stay_fp32_with_16_bit_inputs():
    inputs, grad = make_inputs(BASE, "cpu")
    weights = {name: inputs[name].detach().float().requires_grad_() for name in ("q_weight", "k_weight")}
    out = linear_attn(**inputs | weights)
    grads = torch.autograd.grad(out, list(weights.values()), grad)
    assert out.dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in grads)
    assert torch.equal(out, linear_attn(**inputs))  # the weights hold bf16 values here


class _Sizes(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation has made."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        views = torch.utils._pytree.tree_leaves(out)
        self.largest = max(
            [self.largest, *(x.untyped_storage().nbytes() // x.itemsize for x in views if torch.is_tensor(x))]
        )
        return out


LONG = Case(head_dim=16, nq=30_000, nk=30_000, dtype="fp32", batch=1, heads=4)


@pytest.mark.parametrize("option", [{}, {"mask": "some"}, {"packed": "rows"}, {"group": 2, "heads": 2}], ids=str)
def test_operators_make_nothing_of_n_f(option, monkeypatch):
    """The largest tensor that the four functions make is no larger than an input."""
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 1 << 16)  # slices of 512 rows
    case = dataclasses.replace(LONG, **option)
    inputs, grad = make_inputs(case, "cpu")
    q, k, v, q_weight, k_weight = (x.detach() for x in inputs.values())
    keys = (k_weight, case.options.get("key_mask"), case.options.get("cu_seqlens_k"), "hedgehog")
    queries = (q_weight, case.options.get("cu_seqlens_q"), "hedgehog", 1.0, True, 1e-6)
    with _Sizes() as sizes:
        state, z = chunked.state(k, v, *keys)
        chunked.apply(q, state, z, *queries)
        _, dstate, dz, _ = chunked.apply_backward(grad, q, state, z, *queries)
        chunked.state_backward(dstate, dz, k, v, *keys[:-1], state, z, "hedgehog")
    assert 0 < sizes.largest <= q.numel()


# What is kept for the backward, in multiples of q's size. Without kernels the rotary embedding and the mixture are
# plain operations, and the mixture keeps softmax_out and o.
KEPT = {
    "plain": ({}, 3),
    "mask": ({"mask": "some"}, 3),
    "packed": ({"packed": "flat"}, 3),
    "mix": ({"mix": 0.3}, 5),
    "rope": ({"rope": True}, 3),
}


@pytest.mark.parametrize("name", KEPT)
def test_keeps_rows_and_sums_only(name, monkeypatch):
    """Only q, k, v and tensors that do not grow with N are kept for the backward."""
    monkeypatch.undo()
    option, rows = KEPT[name]
    case = dataclasses.replace(LONG, **option)
    inputs, _ = make_inputs(case, "cpu")
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        call(linear_attn, inputs, case.options)
    tables = sum(x.numel() for x in case.options.get("rope", ()))
    assert len(kept) >= 5 and sum(kept.values()) < (rows + 0.1) * inputs["q"].numel() + tables


def test_a_default_device_of_another_kind():
    """Memory that slices use is made where the rows are, and calls after that are as before."""
    q, k, v = torch.randn(3, 1, 10, 2, 16)
    before = linear_attn(q, k, v, feature_map="elu")
    chunked._kept.__dict__.clear()
    with torch.device("meta"):
        assert torch.equal(linear_attn(q, k, v, feature_map="elu"), before)
    assert torch.equal(linear_attn(q, k, v, feature_map="elu"), before)


def test_memory_between_calls_is_bounded(monkeypatch):
    """Many batch entries and heads are worked on one after another."""
    monkeypatch.undo()
    chunked._kept.__dict__.clear()
    x = torch.randn(3, 40, 16, 20, 64, requires_grad=True)
    linear_attn(*x, q_weight=torch.eye(64).repeat(20, 1, 1), k_weight=torch.eye(64).repeat(20, 1, 1)).sum().backward()
    assert 0 < chunked._kept.__dict__["torch.float32"].numel() <= 8 * chunked.CHUNK_ELEMENTS


def test_boundaries_that_no_check_has_seen():
    """Where they have no values to check before, as in vmap, the work on the CPU checks them."""
    q, k, v = torch.randn(3, 1, 6, 2, 16)
    ends = torch.tensor([[0, 2, 6], [0, 4, 9]])
    with pytest.raises(ValueError, match="cu_seqlens to rise from 0 to 6, got"):
        torch.vmap(lambda e: linear_attn(q, k, v, feature_map="elu", cu_seqlens_q=e, cu_seqlens_k=e))(ends)
