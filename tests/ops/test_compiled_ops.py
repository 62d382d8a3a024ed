"""What torch.compile makes of the ops: options, lengths, numbers, wrong arguments, and how many graphs it takes."""

import dataclasses

import pytest
import torch
from claims import halves
from families import LTX_CHANNELS, ltx_inputs, ltx_transformer, randn
from numerics import call
from tiny import tiny_inputs, tiny_transformer
from torch._dynamo.utils import counters
from torch.testing import assert_close
from transforms import SMALL, problem, waves

from linvideo.models import convert
from linvideo.ops import linear_attn, linear_attn_apply, linear_attn_state, window_attn


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("op", [linear_attn, halves])
def test_rows_that_no_sequence_covers(op, backend):
    """They are 0 in the output and in all gradients, and what they hold does not reach the gradients of the weights."""
    case = dataclasses.replace(SMALL, nq=10, nk=12, batch=1)
    leaves = {name: x.detach() for name, x in problem("linear_attn", case).leaves.items()}
    covered, cu_seqlens = {"q": (2, 8), "k": (1, 9), "v": (1, 9)}, {"q": [2, 5, 8], "k": [1, 6, 9]}
    for name, (first, end) in covered.items():
        leaves[name][:, :first], leaves[name][:, end:] = float("nan"), float("inf")

    def run(function, rows, start: bool):
        rows = {name: x.clone().requires_grad_() for name, x in rows.items()}
        ends = {f"cu_seqlens_{x}": torch.tensor(y, dtype=torch.int32) - start * y[0] for x, y in cu_seqlens.items()}
        out = function(**rows, **ends)
        gradient = waves([leaves["q"]])[0]
        gradient = gradient[:, 2:8] if start else gradient
        return {"o": out, **dict(zip(rows, torch.autograd.grad(out, list(rows.values()), gradient), strict=True))}

    torch._dynamo.reset()
    inner = {name: x[:, slice(*covered[name])] if name in covered else x for name, x in leaves.items()}
    expected = run(op, inner, True)
    for name, x in run(torch.compile(op, fullgraph=True, backend=backend), leaves, False).items():
        if name in ("o", *covered):
            first, end = covered.get(name, (2, 8))
            assert not x[:, :first].any() and not x[:, end:].any()
            x = x[:, first:end]
        assert_close(x, expected[name])


class Counter:
    """A backend that counts graphs, and gives them to another one."""

    def __init__(self, inner: str):
        self.graphs, self.inner = 0, torch._dynamo.lookup_backend(inner)

    def __call__(self, graph, inputs):
        self.graphs += 1
        return self.inner(graph, inputs)


CHANGES = [
    {},
    {"rope": True},
    {"mix": 0.3},
    {"mask": "some"},
    {"packed": "rows"},
    {"packed": "flat"},
    {"group": 3},
    {"map": ("elu", False)},
    {"rope": True, "mix": 0.3, "mask": "some", "packed": "flat", "group": 3},
]


@pytest.mark.parametrize("option", CHANGES, ids=str)
@pytest.mark.parametrize(
    ("op", "dynamic"),
    [
        (linear_attn, True),
        pytest.param(halves, True, marks=pytest.mark.full),
        pytest.param(linear_attn, None, marks=pytest.mark.full),
    ],
)
def test_lengths_take_two_graphs(op, dynamic, option):
    """With dynamic=True too: outputs and gradients are eager's, of all lengths."""
    torch._dynamo.reset()
    counter = Counter("aot_eager")

    def run(function, leaves: dict, options: dict):
        out = call(function, leaves, options)
        return out, torch.autograd.grad(out, list(leaves.values()), waves([out]))

    compiled = torch.compile(op, fullgraph=True, dynamic=dynamic, backend=counter)
    for length in (12, 9, 17, 24):
        case = dataclasses.replace(SMALL, nq=length, nk=length + 3, **option)
        leaves = {name: x.requires_grad_() for name, x in problem("linear_attn", case).leaves.items()}
        options = case.options | ({} if case.map[1] else {"scale": 0.1})
        if "rope" in options:
            options["rope"] = tuple(x.double() for x in options["rope"])
        assert_close(run(compiled, leaves, options), run(op, leaves, options))
    assert counter.graphs <= 2


@pytest.mark.parametrize("dynamic", [True, None])
@pytest.mark.parametrize("name", ["scale", "eps"])
def test_numbers_may_change(name, dynamic):
    """Each value takes a graph of its own, as scaled_dot_product_attention's scale does."""
    torch._dynamo.reset()

    def op(q, number):
        return linear_attn(q, q, q, feature_map="elu", normalize=name == "eps", **{name: number})

    compiled = torch.compile(op, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    q = torch.randn(2, 5, 2, 8)
    for number in (0.5, 1e-3, 2.0, 3, 0.5):
        assert_close(compiled(q, number), op(q, number))


@pytest.mark.parametrize("name", ["scale", "eps"])
@pytest.mark.parametrize("op", [linear_attn, halves, window_attn])
def test_a_tensor_as_a_number(op, name):
    """It is read as a number, and refused where it needs a gradient."""
    q, number = torch.randn(1, 5, 2, 8), torch.tensor(0.5)
    settings = {"feature_map": "elu", "normalize": name == "eps"}
    if op is window_attn:
        if name == "eps":
            pytest.skip("window_attn has no eps")
        settings = {"feature_map": "elu", "frame_tokens": 1, "log_gain": torch.zeros(2), "chunk": 1}
    assert torch.equal(op(q, q, q, **{name: number}, **settings), op(q, q, q, **{name: 0.5}, **settings))
    with pytest.raises(TypeError, match=f"expected {name} to be a number"):
        op(q, q, q, **{name: number.requires_grad_()}, **settings)


@pytest.mark.parametrize("name", ["scale", "eps"])
def test_a_tensor_with_a_tangent_is_refused_as_a_number(name):
    q, number = torch.randn(1, 5, 2, 8), torch.tensor(0.5)

    def op(number):
        return linear_attn(q, q, q, feature_map="elu", normalize=name == "eps", **{name: number})

    with pytest.raises(TypeError, match=f"expected {name} to be a number"):
        torch.func.jvp(op, (number,), (number,))
    with pytest.raises(TypeError, match=f"expected {name} to be a number"):
        torch.func.grad(lambda number: op(number).sum())(number)


@pytest.mark.parametrize("op", ["linear_attn", "halves", "window_attn"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_weights_of_16_bit_rows(op, dtype):
    """They give the output's bits of weights in the rows' dtype, and their gradients are in float32."""
    p = problem(op, None, dtype)
    weights = {name: x.float() * 1.001 for name, x in p.leaves.items() if name.endswith("weight")}
    leaves = {name: x.requires_grad_() for name, x in (p.leaves | weights).items()}
    (out,) = p.op(**leaves)
    assert torch.equal(out, p.op(**leaves | {name: x.to(dtype) for name, x in weights.items()})[0])
    gradients = torch.autograd.grad(out, list(leaves.values()), waves([out]))
    assert [x.dtype for x in gradients] == [x.dtype for x in leaves.values()]


ROWS, WEIGHT = torch.randn(2, 5, 2, 8), torch.randn(2, 8, 8)
ELU = {"feature_map": "elu"}
STATE = torch.zeros(2, 2, 8, 8), torch.zeros(2, 2, 8)
WRONG = {
    "width of k": (lambda q: linear_attn(q, q[..., :4], q), "expected a head dimension D"),
    "dtype of k": (lambda q: linear_attn(q, q.half(), q, **ELU), "expected q, k, v in one dtype"),
    "feature map": (lambda q: linear_attn(q, q, q, feature_map="gelu"), "expected feature_map to be one of"),
    "no weight": (lambda q: linear_attn(q, q, q, q_weight=WEIGHT), "expected k_weight of shape"),
    "rope": (lambda q: linear_attn(q, q, q, rope=(WEIGHT, WEIGHT), **ELU), "expected rope's cos of shape"),
    "mix": (lambda q: linear_attn(q, q, q, mix=(q, q), **ELU), "expected r to be one number"),
    "key_mask": (lambda q: linear_attn(q, q, q, key_mask=q, **ELU), "expected key_mask to be bool"),
    "eps": (lambda q: linear_attn(q, q, q, eps=0.0, **ELU), "expected a normal float32 eps > 0"),
    "S": (lambda q: linear_attn_apply(q, STATE[1], STATE[1], **ELU), "expected S of shape"),
    "v of the state": (lambda q: linear_attn_state(q, q[:, :2], **ELU), "expected v of k's shape"),
    "frames": (lambda q: window_attn(q, q, q, frame_tokens=3, log_gain=WEIGHT, **ELU), "expected prefix_tokens"),
}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_inside_compile(wrong, dynamic):
    torch._dynamo.reset()
    function, message = WRONG[wrong]
    with pytest.raises(ValueError) as eager:
        function(ROWS)
    with pytest.raises(Exception) as compiled:
        torch.compile(function, fullgraph=True, dynamic=dynamic, backend="eager")(ROWS)
    assert message in str(eager.value) and message in str(compiled.value)


def wan_inputs(frames: int) -> dict:
    return tiny_inputs() | {"hidden_states": randn(2, 16, frames, 8, 8, seed=1)}


def ltx_inputs_of(frames: int) -> dict:
    return ltx_inputs() | {"hidden_states": randn(2, 4 * frames, LTX_CHANNELS, seed=1), "num_frames": frames}


MODELS = {"Wan": (lambda: tiny_transformer(num_layers=1), wan_inputs), "LTX": (ltx_transformer, ltx_inputs_of)}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_converted_model_takes_no_more_graphs(name, dynamic):
    """Than its stock model over several frame counts, and breaks no more of them."""
    make, inputs = MODELS[name]

    def count(model) -> tuple[int, int]:
        torch._dynamo.reset()
        counters.clear()
        counter = Counter("eager")
        compiled = torch.compile(model, dynamic=dynamic, backend=counter)
        with torch.no_grad():
            for frames in (3, 2, 5):
                compiled(**inputs(frames))
        return counter.graphs, sum(counters["graph_break"].values())

    (graphs, breaks), (stock_graphs, stock_breaks) = count(convert(make(), r_init=0.5)), count(make())
    assert stock_graphs > 0 and graphs <= stock_graphs and breaks <= stock_breaks
