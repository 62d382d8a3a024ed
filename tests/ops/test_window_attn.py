"""Window attention on the CPU: results and gradients, properties, bad input, and PyTorch around it."""

import dataclasses
import re

import pytest
import torch
from cases import GRAD_LAYOUTS, LAYOUTS
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import DERIVATIVE_CHECKS, FORWARD_CHECKS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from window_cases import (
    CASES,
    WindowCase,
    check_16_bits,
    check_float32,
    make_window_inputs,
    run_window,
    softmax_errors,
)

from linvideo.ops import softmax_backends, window_attn
from linvideo.ops.reference import FEATURE_MAPS
from linvideo.ops.window_reference import window_masks

ALL = WindowCase(prefix=3, suffix=2, masked=True, rope=True, heads=1, group=2, anchors=("first",), frames=7, chunk=2)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_against_float64(case):
    inputs, grad = make_window_inputs(case)
    check_float32(case, inputs, grad, run_window(window_attn, inputs, grad, case.options))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_16_bits_against_softmax(case, dtype):
    case = dataclasses.replace(case, dtype=dtype)
    inputs, grad = make_window_inputs(case)
    actual = run_window(window_attn, inputs, grad, case.options)
    check_16_bits(case, inputs, grad, actual, softmax_errors(inputs, grad, case.options))


@st.composite
def window_cases(draw):
    prefix, suffix = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    causal = draw(st.booleans())
    anchors = draw(st.sets(st.sampled_from(["first"] if causal else ["first", "last"])))
    return WindowCase(
        frames=draw(st.integers(1, 9)),
        frame_tokens=draw(st.integers(1, 4)),
        chunk=draw(st.integers(1, 4)),
        overlap=draw(st.integers(0, 4)),
        prefix=prefix,
        suffix=suffix,
        anchors=tuple(sorted(anchors)),
        causal=causal,
        # the text's own queries need a key
        masked=prefix + suffix > 1 and draw(st.booleans()) and not causal,
        batch=draw(st.integers(1, 3)),
        heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 2)),
        head_dim=8,
        feature_map=draw(st.sampled_from(FEATURE_MAPS[:-1])),
        rope=draw(st.booleans()),
        gain=draw(st.sampled_from([-4.0, 0.0, 4.0])),
        layout=draw(st.sampled_from(LAYOUTS)),
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(window_cases())
def test_any_configuration(case):
    inputs, grad = make_window_inputs(case)
    check_float32(case, inputs, grad, run_window(window_attn, inputs, grad, case.options), of_terms=True)


def test_the_reference_s_masks():
    """Written out for five frames of one token in chunks of two, between two tokens before and one after."""
    options = {"frame_tokens": 1, "chunk": 2, "overlap": 1, "prefix_tokens": 2, "suffix_tokens": 1}

    def rows(anchors=(), causal=False) -> list[str]:
        near, far = (mask.int() for mask in window_masks(8, **options, anchors=anchors, causal=causal))
        return ["".join(".nf?"[x] for x in row) for row in (near + 2 * far).tolist()]

    whole, text = "nnnnnnnn", "nn.....n"
    assert rows() == [whole] * 2 + ["nnnnnffn"] * 2 + ["nnfnnnnn"] * 2 + ["nnfffnnn"] + [whole]
    both = ("first", "last")
    assert rows(both) == [whole] * 2 + ["nnnnnfnn"] * 2 + [whole] * 2 + ["nnnffnnn"] + [whole]
    assert rows((), True) == [text] * 2 + ["nnnn...n"] * 2 + ["nnfnnn.n"] * 2 + ["nnfffnnn"] + [text]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("frames", [1, 2, 3])
def test_short_videos_are_plain_softmax_bit_for_bit(frames, dtype):
    case = WindowCase(frames=frames, overlap=2, prefix=3, group=2, dtype=dtype)
    inputs, grad = make_window_inputs(case)
    out = window_attn(**inputs, **case.options)
    q, k, v = (inputs[name].detach() for name in "qkv")
    heads = q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)
    backend, scale = softmax_backends.choose(None, q, masked=False, training=True), q.shape[-1] ** -0.5
    expected, lse = backend.forward(*heads, scale)
    assert torch.equal(out, expected)
    dq, dk, dv = backend.backward(grad, *heads, expected, lse, scale)
    sums = [x.unflatten(2, (-1, 2)).sum(3) for x in (dk, dv)]
    grads = torch.autograd.grad(out, list(inputs.values()), grad)
    assert all(torch.equal(x, y) for x, y in zip(grads[:3], (dq, *sums), strict=True))
    assert not any(x.any() for x in grads[3:])


def test_chunks_without_far_frames_are_plain_softmax():
    """A causal chunk that sees no frame outside of its window has the result of softmax alone, whatever the gain is."""
    case = WindowCase(causal=True, chunk=2, overlap=2)
    inputs, _ = make_window_inputs(case)
    rows = [inputs[name].detach()[:, : 4 * case.frame_tokens] for name in "qkv"]
    for gain in (0.0, 30.0):
        inputs["log_gain"].data.fill_(gain)
        out = window_attn(**inputs, **case.options)
        backend = softmax_backends.choose(None, out, masked=False, training=False)
        first, second = (slice(i * 2 * case.frame_tokens, (i + 1) * 2 * case.frame_tokens) for i in range(2))
        for queries, keys in ((first, first), (second, slice(0, second.stop))):
            expected, _ = backend.forward(rows[0][:, queries], rows[1][:, keys], rows[2][:, keys], case.head_dim**-0.5)
            assert torch.equal(out[:, queries], expected)


def test_the_order_of_far_frames_does_not_matter():
    case = WindowCase(frames=9, chunk=3, overlap=1)
    inputs, _ = make_window_inputs(case)
    order = [0, 1, 2, 3, 8, 4, 7, 6, 5]  # the window of the first chunk keeps its place

    def reorder(x):
        return x.unflatten(1, (9, -1))[:, order].flatten(1, 2)

    rows = slice(0, 3 * case.frame_tokens)
    before = window_attn(**inputs, **case.options)[:, rows]
    after = window_attn(**inputs | {name: reorder(inputs[name]) for name in "kv"}, **case.options)[:, rows]
    torch.testing.assert_close(after, before)
    moved = window_attn(**inputs | {"v": reorder(inputs["v"])}, **case.options)[:, rows]
    assert (moved - before).abs().max() > 0.01


@pytest.mark.parametrize("gain", [-200.0, float("-inf")])
def test_without_gain_it_is_softmax_in_the_window(gain):
    case = WindowCase(prefix=2, anchors=("last",))
    inputs, grad = make_window_inputs(case)
    inputs["log_gain"].data.fill_(gain)
    names = ("frame_tokens", "chunk", "overlap", "prefix_tokens", "suffix_tokens", "anchors", "causal")
    near, _ = window_masks(case.tokens, **{name: case.options[name] for name in names})
    q, k, v = (inputs[name] for name in "qkv")
    attention = torch.nn.functional.scaled_dot_product_attention
    expected = attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=near).transpose(1, 2)
    out = window_attn(**inputs, **case.options)
    torch.testing.assert_close(out, expected)
    for x, y in zip(*(torch.autograd.grad(o, (q, k, v), grad) for o in (out, expected)), strict=True):
        torch.testing.assert_close(x, y)
    grads = torch.autograd.grad(window_attn(**inputs, **case.options), list(inputs.values())[3:], grad)
    assert not any(x.any() for x in grads)


def test_the_weights_of_near_and_far_add_up_to_one():
    """With v = 1 the output is 1, at any gain, and the gradients that come from the weights vanish."""
    for gain in (-30.0, 0.0, 30.0):
        case = WindowCase(gain=gain)
        inputs, _ = make_window_inputs(case)
        inputs["v"].data.fill_(1.0)
        out = window_attn(**inputs, **case.options)
        torch.testing.assert_close(out, torch.ones_like(out))
        for x in torch.autograd.grad(out.sum(), (inputs["q"], inputs["k"], inputs["log_gain"])):
            assert x.abs().max() < 1e-3


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_reruns_give_the_same_bits(dtype):
    case = dataclasses.replace(ALL, dtype=dtype)
    inputs, grad = make_window_inputs(case)
    first, second = (run_window(window_attn, inputs, grad, case.options) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("layout", GRAD_LAYOUTS[1:])
def test_layouts_of_the_gradient(layout):
    inputs, grad = make_window_inputs(ALL)
    spread = {
        "sum": lambda: grad.flatten()[0].expand_as(grad),
        "per_head": lambda: grad[:, :1, :, :1].expand_as(grad),
        "heads_first": lambda: grad.transpose(1, 2).contiguous().transpose(1, 2),
    }[layout]()
    expected = run_window(window_attn, inputs, spread.contiguous(), ALL.options)
    actual = run_window(window_attn, inputs, spread, ALL.options)
    for name, x in actual.items():
        torch.testing.assert_close(x, expected[name], rtol=1e-5, atol=1e-5)


def test_a_gain_in_16_bits():
    inputs, grad = make_window_inputs(ALL)
    gain = inputs["log_gain"].detach().bfloat16().requires_grad_()
    out = window_attn(**inputs | {"log_gain": gain}, **ALL.options)
    assert torch.equal(out, window_attn(**inputs | {"log_gain": gain.float()}, **ALL.options))
    assert torch.autograd.grad(out, gain, grad)[0].dtype == torch.bfloat16


def test_meta_tensors():
    inputs, grad = make_window_inputs(ALL)
    inputs = {name: x.detach().to("meta").requires_grad_() for name, x in inputs.items()}
    run_window(window_attn, inputs, grad.to("meta"), ALL.options)


def good(**changes) -> dict:
    """Return good arguments with two heads, 3 + 4 * 5 + 2 tokens."""
    rows = {name: torch.ones(2, 25, 2, 16) for name in "qkv"}
    text = {"prefix_tokens": 3, "suffix_tokens": 2}
    arguments = {**rows, "log_gain": torch.zeros(2), "frame_tokens": 5, "feature_map": "elu", **text} | changes
    return {name: x for name, x in arguments.items() if x is not Ellipsis}


ONES = torch.ones(2, 25, 2, 16)
BAD = {
    "frame_tokens that do not divide": (
        {"frame_tokens": 6},
        r"= 25 tokens for a whole number of frames F > 0, got 3 \+ F 6",
    ),
    "prefix longer than N": ({"prefix_tokens": 26}, "expected prefix_tokens .* = 25 tokens .*, got 26"),
    "nothing but text": ({"prefix_tokens": 23}, "whole number of frames F > 0, got 23"),
    "frame_tokens 0": ({"frame_tokens": 0}, "expected frame_tokens to be an integer of at least 1, got 0"),
    "chunk 0": ({"chunk": 0}, "expected chunk to be an integer of at least 1, got 0"),
    "chunk 1.5": ({"chunk": 1.5}, "expected chunk to be an integer of at least 1, got 1.5"),
    "chunk True": ({"chunk": True}, "expected chunk to be an integer of at least 1, got True"),
    "overlap -1": ({"overlap": -1}, "expected overlap to be an integer of at least 0, got -1"),
    "suffix_tokens -1": ({"suffix_tokens": -1}, "expected suffix_tokens to be an integer of at least 0, got -1"),
    "anchor middle": ({"anchors": ("middle",)}, "expected anchors to be .*'first' and 'last', got .*middle"),
    "anchors as text": ({"anchors": "first"}, "expected anchors to be .*'first' and 'last', got 'first'"),
    "anchors None": ({"anchors": None}, "expected anchors to be a collection of .*, got None"),
    "anchors that can be read once": ({"anchors": (x for x in ["first"])}, "expected anchors to be .*, got <gener"),
    "causal as text": ({"causal": "no"}, "expected causal to be True or False, got 'no'"),
    "causal with last": ({"anchors": ("last",), "causal": True}, "expected no anchor 'last' with causal=True.*, got"),
    "log_gain of one": (
        {"log_gain": torch.zeros(1)},
        r"expected log_gain of shape \[2\] in .*, got torch.float32 \[1\]",
    ),
    "log_gain float64": ({"log_gain": torch.zeros(2).double()}, "expected log_gain .* in float32.*, got torch.float64"),
    "log_gain number": ({"log_gain": 0.0}, "expected log_gain .*, got float"),
    "log_gain device": ({"log_gain": torch.zeros(2, device="meta")}, "expected log_gain on .* cpu, got meta"),
    "key_mask of N": ({"key_mask": torch.ones(2, 25).bool()}, r"bool of shape \[2, 5\].*, got torch.bool \[2, 25\]"),
    "key_mask int": ({"key_mask": torch.ones(2, 5).int()}, r"expected key_mask to be bool .*, got torch.int32"),
    "key_mask as list": ({"key_mask": [[True] * 5] * 2}, "expected key_mask to be bool .*, got list"),
    "key_mask device": ({"key_mask": torch.ones(2, 5, device="meta").bool()}, "expected key_mask on .* cpu, got meta"),
    "more keys": (
        {"k": torch.ones(2, 30, 2, 16), "v": torch.ones(2, 30, 2, 16)},
        "as many keys as queries, got 30 keys, 25",
    ),
    "v mixed": ({"v": ONES.half()}, "one dtype of .*, got torch.float32 and v torch.float16"),
    "three heads of keys": ({"k": torch.ones(2, 25, 3, 16), "v": torch.ones(2, 25, 3, 16)}, "Hk a divisor of 2"),
    "int32": ({name: ONES.int() for name in "qkv"}, "one dtype of .*, got q torch.int32"),
    "identity": ({"feature_map": "identity"}, "expected a feature_map whose features are not negative, got 'identity'"),
    "unknown map": ({"feature_map": "exp"}, "expected feature_map to be one of .*, got 'exp'"),
    "no weight": ({"feature_map": "hedgehog"}, r"expected q_weight of shape \[2, 16, 16\] .*, got None"),
    "unwanted weight": ({"k_weight": torch.ones(2, 16, 16)}, "expected no k_weight .*'elu', got one"),
    "rope of the video": ({"rope": (torch.ones(20, 8), torch.ones(20, 8))}, r"cos of shape \[25, 8\].*, got \(20, 8\)"),
    "scale nan": ({"scale": float("nan")}, "expected a finite scale, got nan"),
    "unknown backend": ({"backend": "sage"}, "expected a softmax backend of cpu, .*, got 'sage'"),
    "backend of a GPU": ({"backend": "flash"}, "expected tensors on cuda for the softmax backend 'flash', got cpu"),
    "precision": ({"fp32_precision": "tf32"}, "expected fp32_precision to be one of .*, got 'tf32'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    changes, message = BAD[name]
    with pytest.raises(ValueError) as error:
        window_attn(**good(**changes))
    assert re.search(message, str(error.value)), str(error.value)
    assert "\n" not in str(error.value)


def test_good_input_is_not_refused():
    window_attn(**good())
    window_attn(**good(scale=0.5, backend="cpu", anchors=["first"], key_mask=torch.ones(2, 5).bool()))
    with pytest.raises(TypeError, match="frame_tokens"):
        window_attn(**good(frame_tokens=...))


class Calls(TorchDispatchMode):
    """Record the arguments of our operators."""

    def __init__(self):
        super().__init__()
        self.arguments = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "linvideo":
            self.arguments[func] = args
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "case", [WindowCase(frame_tokens=2), dataclasses.replace(ALL, frame_tokens=2, feature_map="elu")], ids=str
)
def test_opcheck(case):
    inputs, grad = make_window_inputs(case)
    inputs = {name: x.detach().nan_to_num(0, 0, 0).requires_grad_() for name, x in inputs.items()}  # opcheck compares
    calls = Calls()
    with calls:
        with torch.no_grad():
            window_attn(**inputs, **case.options)
        forward = dict(calls.arguments)
        window_attn(**inputs, **case.options).backward(grad)
    assert {func.name() for func in calls.arguments} == {"linvideo::window_attn", "linvideo::window_attn_backward"}
    for func, arguments in (calls.arguments | forward).items():
        backward = func.name().endswith("backward")
        arguments = [
            x.detach().requires_grad_(not backward and x.is_floating_point()) if torch.is_tensor(x) else x
            for x in arguments
        ]
        checks = DERIVATIVE_CHECKS if backward else FORWARD_CHECKS
        torch.library.opcheck(func, tuple(arguments), test_utils=checks)


@pytest.mark.parametrize("case", [WindowCase(), ALL, WindowCase(frames=2)], ids=str)
def test_compiles_without_graph_breaks(case):
    torch._dynamo.reset()
    inputs, grad = make_window_inputs(case)
    compiled = torch.compile(lambda **x: window_attn(**x) * 2, fullgraph=True, backend="aot_eager")
    eager = run_window(lambda **x: window_attn(**x) * 2, inputs, grad, case.options)
    for name, x in run_window(compiled, inputs, grad, case.options).items():
        torch.testing.assert_close(x, eager[name], msg=name, equal_nan=True)


def test_frames_do_not_recompile():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    def call(q, k, v, gain):
        return window_attn(q, k, v, log_gain=gain, frame_tokens=4, feature_map="elu", prefix_tokens=2) + 1

    compiled = torch.compile(call, fullgraph=True, backend=backend)
    for frames in (12, 7, 9, 21, 3, 1):
        rows = [torch.randn(1, 2 + 4 * frames, 2, 16) for _ in range(3)]
        torch.testing.assert_close(compiled(*rows, torch.zeros(2)), call(*rows, torch.zeros(2)))
    assert len(graphs) <= 3  # one for the first length, one for any other, and perhaps one for a single frame
    torch._dynamo.reset()
    dynamic = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    rows = [torch.randn(1, 34, 2, 16, requires_grad=True) for _ in range(3)]
    torch.testing.assert_close(dynamic(*rows, torch.zeros(2)), call(*rows, torch.zeros(2)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    inputs, grad = make_window_inputs(ALL)
    with torch.autocast("cpu", dtype):
        out = window_attn(**inputs, **ALL.options)
    cast = {name: x.to(dtype) if name in "qkv" else x for name, x in inputs.items()}
    assert out.dtype == dtype and torch.equal(out, window_attn(**cast, **ALL.options))
    grads = torch.autograd.grad(out, list(inputs.values()), grad.to(dtype))
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in grads)


@pytest.mark.parametrize("case", [WindowCase(), ALL], ids=str)
def test_activation_checkpointing_changes_nothing(case):
    inputs, grad = make_window_inputs(case)

    def recomputed(**arguments):
        return checkpoint(lambda: window_attn(**arguments), use_reentrant=False)

    plain = run_window(window_attn, inputs, grad, case.options)
    again = run_window(recomputed, inputs, grad, case.options)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_it_is_differentiable_once():
    inputs, grad = make_window_inputs(WindowCase())
    out = window_attn(**inputs, **WindowCase().options)
    dq = torch.autograd.grad(out, inputs["q"], grad, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="differentiable once"):
        dq.sum().backward()


def test_some_gradients_only():
    inputs, grad = make_window_inputs(ALL)
    full = run_window(window_attn, inputs, grad, ALL.options)
    for name in inputs:
        alone = {other: x.detach().requires_grad_(other == name) for other, x in inputs.items()}
        dx = torch.autograd.grad(window_attn(**alone, **ALL.options), alone[name], grad)[0]
        assert torch.equal(dx.double(), full[f"d{name}"])
    with torch.no_grad():
        assert torch.equal(window_attn(**inputs, **ALL.options).double(), full["o"])


def test_memory_grows_with_the_number_of_tokens():
    """No allocation is larger than a few times q, where an N x N matrix has N / D = 150 times q's size."""
    case = WindowCase(frames=12, frame_tokens=200, chunk=2, batch=1, prefix=8)
    inputs, grad = make_window_inputs(case)
    rows, kept = inputs["q"].numel() * 4, {}
    window_attn(**inputs, **case.options).backward(grad)  # makes the memory that slices use again and again

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = window_attn(**inputs, **case.options)
        torch.autograd.grad(out, list(inputs.values()), grad)
    sizes = [event.self_cpu_memory_usage for event in profile.events()]
    assert rows <= max(sizes) <= 4 * rows
    assert sum(kept.values()) <= 5 * rows  # q, k, v, o, the logs of the normalisers and the small inputs
