"""The op under torch.library, torch.compile, autocast, activation checkpointing and meta tensors."""

import copy
import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from cases import MAPS, OPTIONS, Case, make_inputs
from claims import assert_same_bits, halves
from numerics import call, run
from operators import check_operators
from torch.utils.checkpoint import checkpoint

from linvideo.ops import linear_attn, linear_attn_apply, linear_attn_state

CASE = Case(head_dim=16, nq=20, nk=30, dtype="fp32")
ALL = Case(head_dim=16, nq=30, dtype="fp32", rope=True, mix=0.3, mask="some", packed="rows", group=3)
EACH = [{name: value} for name, values in OPTIONS.items() for value in values[1:]]


@pytest.mark.parametrize("map", MAPS)
def test_opcheck_of_every_map(map):
    check_operators(dataclasses.replace(CASE, map=map), "cpu")


@pytest.mark.parametrize("option", [{"mask": "some"}, {"packed": "rows"}, {"group": 3}], ids=str)
@pytest.mark.parametrize("map", [("hedgehog", True), ("elu", False)])
def test_opcheck_of_options(map, option):
    check_operators(dataclasses.replace(CASE, map=map, **option), "cpu")


@pytest.mark.parametrize("layout", ["packed_qkv", "heads_first", "shared_batch"])
def test_opcheck_of_strided_inputs(layout):
    check_operators(dataclasses.replace(CASE, layout=layout, dtype="bf16"), "cpu")


def assert_compiles(case: Case, op, **settings) -> None:
    """Assert that `op` compiles with fullgraph=True and then gives the eager values."""
    torch._dynamo.reset()
    inputs, grad = make_inputs(case, "cpu")
    compiled = torch.compile(lambda **x: op(**x) * 2, fullgraph=True, **settings)
    eager = run(lambda **x: op(**x) * 2, inputs, grad, case.options)
    for name, got in run(compiled, inputs, grad, case.options).items():
        torch.testing.assert_close(got, eager[name], msg=name)


@pytest.mark.parametrize("map", [("hedgehog", True), ("elu", False)])
def test_compiles_without_graph_breaks(map):
    assert_compiles(dataclasses.replace(CASE, map=map, layout="packed_qkv"), linear_attn, backend="aot_eager")


@pytest.mark.parametrize("option", EACH, ids=str)
def test_compiles_with_each_option(option):
    assert_compiles(dataclasses.replace(CASE, **option), linear_attn, backend="aot_eager")


@pytest.mark.parametrize("op", [linear_attn, halves])
def test_compiles_with_all_options(op):
    assert_compiles(ALL, op, backend="aot_eager")


def graphs_of(call, inputs) -> int:
    """Return the number of graphs that torch.compile makes when called with these inputs in turn."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(call, fullgraph=True, backend=backend)
    for arguments in inputs:
        torch.testing.assert_close(compiled(*arguments), call(*arguments))
    return len(graphs)


def rows(*lengths: int) -> list[torch.Tensor]:
    return [torch.randn(2, n, 2, 16, requires_grad=True) for n in lengths]


def test_lengths_do_not_recompile():
    def call(q, k, v):
        return linear_attn(q, k, v, feature_map="elu") + 1

    lengths = [(20, 30), (40, 50), (33, 77), (64, 128), (129, 15), (301, 302)]
    assert graphs_of(call, [rows(nq, nk, nk) for nq, nk in lengths]) <= 2  # one for the first shape, one for any other


def test_lengths_do_not_recompile_with_options():
    def call(q, k, v, cos, sin, softmax_out, r, key_mask):
        options = {"rope": (cos, sin), "mix": (softmax_out, r), "key_mask": key_mask}
        return linear_attn(q, k, v, feature_map="elu", **options) + 1

    def arguments(n: int) -> list[torch.Tensor]:
        tables = torch.randn(2, n, 8)
        return [*rows(n, n, n), *tables, *rows(n), torch.tensor([0.3]), torch.rand(2, n) < 0.7]

    assert graphs_of(call, [arguments(n) for n in (20, 33, 64, 129, 301)]) <= 2


def test_packed_lengths_do_not_recompile():
    def call(q, k, v, ends_q, ends_k):
        return linear_attn(q, k, v, feature_map="elu", cu_seqlens_q=ends_q, cu_seqlens_k=ends_k) + 1

    def arguments(*ends: int) -> list[torch.Tensor]:
        x = torch.randn(3, ends[-1], 2, 16)
        cu_seqlens = torch.tensor([0, *ends], dtype=torch.int32)
        return [*x, cu_seqlens, cu_seqlens]

    assert graphs_of(call, [arguments(3, 20), arguments(30, 33), arguments(0, 64), arguments(100, 129)]) <= 2


def test_inductor_runs_it():
    torch._dynamo.reset()
    inputs, grad = make_inputs(CASE, "cpu")
    compiled = torch.compile(lambda **x: linear_attn(**x).relu(), fullgraph=True)
    eager = run(lambda **x: linear_attn(**x).relu(), inputs, grad, CASE.options)
    for name, got in run(compiled, inputs, grad, CASE.options).items():
        torch.testing.assert_close(got, eager[name], msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_inputs_and_returns_its_dtype(dtype):
    inputs, _ = make_inputs(CASE, "cpu")
    with torch.autocast("cpu", dtype):
        out = linear_attn(**inputs)
        mixed = linear_attn(**inputs | {"q": inputs["q"].to(dtype)})
    assert out.dtype == dtype and torch.equal(out, mixed)
    cast = {name: x.to(dtype) if name in "qkv" else x for name, x in inputs.items()}
    assert torch.equal(out, linear_attn(**cast))
    out.float().sum().backward()
    assert all(x.grad.dtype == torch.float32 and x.grad.isfinite().all() for x in inputs.values())


@pytest.mark.parametrize("op", [linear_attn, halves])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_of_the_options_and_the_halves(op, dtype):
    """softmax_out is cast like the rows; r, the tables, S and z keep their dtypes."""
    inputs, _ = make_inputs(ALL, "cpu")
    cast = {name: x.detach().to(dtype) if x.dim() == 4 else x.detach() for name, x in inputs.items()}
    with torch.autocast("cpu", dtype):
        out = call(op, inputs, ALL.options)
    assert out.dtype == dtype and torch.equal(out, call(op, cast, ALL.options))
    out.float().sum().backward()
    assert all(x.grad.dtype == x.dtype for x in inputs.values())
    assert all(x.grad.isfinite().all() for x in inputs.values())


def test_autocast_keeps_the_state_in_float32():
    inputs, _ = make_inputs(CASE, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        state = linear_attn_state(inputs["k"], inputs["v"], k_weight=inputs["k_weight"])
        out = linear_attn_apply(inputs["q"], *state, q_weight=inputs["q_weight"])
    assert [x.dtype for x in (*state, out)] == [torch.float32, torch.float32, torch.bfloat16]


def test_autocast_off_and_backward_under_autocast():
    inputs, _ = make_inputs(CASE, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            out = linear_attn(**inputs)
        assert out.dtype == torch.float32
        out.sum().backward()
    inside = {name: x.grad for name, x in inputs.items()}
    for x in inputs.values():
        x.grad = None
    linear_attn(**inputs).sum().backward()
    assert all(torch.equal(inside[name], x.grad) for name, x in inputs.items())


@pytest.mark.parametrize("case", [CASE, ALL], ids=str)
def test_activation_checkpointing_changes_nothing(case):
    inputs, grad = make_inputs(case, "cpu")

    def recomputed(*tensors, **options):
        return checkpoint(lambda *x: linear_attn(*x, **options), *tensors, use_reentrant=False)

    def op(q, k, v, **options):
        return recomputed(q, k, v, **options)

    assert_same_bits(run(linear_attn, inputs, grad, case.options), run(op, inputs, grad, case.options))


def test_no_gradients_where_none_are_asked_for():
    """Without grad mode nothing is kept, and the output is the same."""
    inputs, _ = make_inputs(ALL, "cpu")
    kept = []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = call(linear_attn, inputs, ALL.options)
    assert not out.requires_grad and not kept
    assert torch.equal(out, call(linear_attn, inputs, ALL.options))


def test_tables_and_masks_get_no_gradient():
    inputs, grad = make_inputs(ALL, "cpu")
    tables = tuple(x.requires_grad_() for x in ALL.options["rope"])
    call(linear_attn, inputs, ALL.options | {"rope": tables}).backward(grad)
    assert all(x.grad is None for x in tables)


def test_state_and_output_can_be_copied():
    inputs, _ = make_inputs(CASE, "cpu")
    with torch.no_grad():
        state = linear_attn_state(inputs["k"], inputs["v"], k_weight=inputs["k_weight"])
        first = linear_attn_apply(inputs["q"], *state, q_weight=inputs["q_weight"])
        second = linear_attn_apply(inputs["q"], *copy.deepcopy(state), q_weight=inputs["q_weight"])
    assert torch.equal(first, second)


def test_only_one_of_the_sums_is_used():
    """Using only S, or only z, gives the gradient of using both with weight 0 for the other."""
    inputs, _ = make_inputs(CASE, "cpu")
    keys = [inputs[name] for name in ("k", "v", "k_weight")]

    def grads(use_state: bool, use_z: bool):
        sums = linear_attn_state(keys[0], keys[1], k_weight=keys[2])
        weight = sum(x.sum() * (1.0 if used else 0.0) for x, used in zip(sums, (use_state, use_z), strict=True))
        return torch.autograd.grad(weight, keys)

    for which in (0, 1):
        alone = torch.autograd.grad(linear_attn_state(keys[0], keys[1], k_weight=keys[2])[which].sum(), keys)
        both = grads(which == 0, which == 1)
        assert all(torch.equal(a, b) for a, b in zip(alone, both, strict=True))


@pytest.mark.parametrize("trained", ["q", "v", "q_weight", "k_weight"])
def test_only_one_input_needs_a_gradient(trained):
    """The backward skips the keys' half if none of its inputs needs a gradient."""
    inputs, grad = make_inputs(CASE, "cpu")
    whole = run(linear_attn, inputs, grad, CASE.options)
    some = {name: x.detach().requires_grad_(name == trained) for name, x in inputs.items()}
    (got,) = torch.autograd.grad(call(linear_attn, some, CASE.options), [some[trained]], grad)
    assert torch.equal(got.double(), whole[f"d{trained}"])


@pytest.mark.parametrize("op", [linear_attn, halves])
@pytest.mark.parametrize("loss", [torch.square, torch.clone], ids=["square", "linear"])
def test_second_derivatives_are_refused_not_wrong(op, loss):
    """Even with a linear loss, whose output gradient is a constant, and with another term that has a gradient."""
    inputs, _ = make_inputs(CASE, "cpu")
    (dq,) = torch.autograd.grad(loss(op(**inputs)).sum(), inputs["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        (dq.square().sum() + inputs["q"].sum()).backward()


def test_meta_and_fake_shapes():
    out = linear_attn(*(torch.empty(2, n, 3, 16, device="meta") for n in (5, 7, 7)), feature_map="elu")
    assert out.shape == (2, 5, 3, 16) and out.device.type == "meta"


@pytest.mark.parametrize("case", [CASE, dataclasses.replace(ALL, map=("elu", True))], ids=str)
def test_meta_tensors_with_options(case):
    inputs, _ = make_inputs(case, "cpu")
    inputs = {name: x.detach().to("meta") for name, x in inputs.items()}
    out = call(linear_attn, inputs, case.options)
    assert out.shape == inputs["q"].shape and out.device.type == "meta"


@pytest.mark.parametrize("module", ["linvideo.ops", "linvideo_kernels"])
def test_import_is_light(module):
    code = f"import sys, {module}; print(*sorted({{'triton', 'diffusers', 'transformers', 'fla'}} & set(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
