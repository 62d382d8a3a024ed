"""The op inside PyTorch's machinery: torch.library, torch.compile, autocast, double backward, and a light import."""

import os
import subprocess
import sys

import pytest
import torch
from cases import MAPS, Case, make_inputs
from numerics import run

from linvideo.ops import linear_attn

CASE = Case(head_dim=16, nq=20, nk=30, dtype="fp32")
CHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_static",
    "test_aot_dispatch_dynamic",
)


def op_arguments(map, layout="contiguous", dtype="fp32") -> tuple:
    inputs, _ = make_inputs(Case(head_dim=16, nq=20, nk=30, map=map, layout=layout, dtype=dtype), "cpu")
    name, normalize = map
    return (*(inputs.get(x) for x in ("q", "k", "v", "q_weight", "k_weight")), name, 0.5, normalize, 1e-6)


@pytest.mark.parametrize("map", MAPS)
def test_opcheck_forward(map):
    torch.library.opcheck(torch.ops.linvideo.linear_attn_forward.default, op_arguments(map), test_utils=CHECKS)


@pytest.mark.parametrize("layout", ["packed_qkv", "heads_first", "shared_batch"])
def test_opcheck_forward_of_strided_inputs(layout):
    arguments = op_arguments(("hedgehog", True), layout, "bf16")
    torch.library.opcheck(torch.ops.linvideo.linear_attn_forward.default, arguments, test_utils=CHECKS)


@pytest.mark.parametrize("map", MAPS)
def test_opcheck_backward(map):
    arguments = [x.detach() if torch.is_tensor(x) else x for x in op_arguments(map, "packed_qkv")]
    o, *saved = torch.ops.linvideo.linear_attn_forward(*arguments)
    arguments = (torch.randn_like(o), *arguments[:5], *saved, *arguments[5:])
    op = torch.ops.linvideo.linear_attn_backward.default
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("map", [("hedgehog", True), ("elu", False)])
def test_compiles_without_graph_breaks(map):
    torch._dynamo.reset()
    case = Case(head_dim=16, nq=20, nk=30, map=map, dtype="fp32", layout="packed_qkv")
    inputs, grad = make_inputs(case, "cpu")
    compiled = torch.compile(lambda **x: linear_attn(**x) * 2, fullgraph=True, backend="aot_eager")
    eager = run(lambda **x: linear_attn(**x) * 2, inputs, grad, case.options)
    for name, got in run(compiled, inputs, grad, case.options).items():
        torch.testing.assert_close(got, eager[name], msg=name)


def test_lengths_do_not_recompile():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    def call(q, k, v):
        return linear_attn(q, k, v, feature_map="elu") + 1

    compiled = torch.compile(call, fullgraph=True, backend=backend)
    for nq, nk in [(20, 30), (40, 50), (33, 77), (64, 128), (129, 15), (301, 302)]:
        q, k, v = (torch.randn(2, n, 2, 16, requires_grad=True) for n in (nq, nk, nk))
        torch.testing.assert_close(compiled(q, k, v), call(q, k, v))
    assert len(graphs) <= 2  # one for the first shape, one for any other


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


def test_second_derivatives_are_refused_not_wrong():
    inputs, _ = make_inputs(CASE, "cpu")
    (dq,) = torch.autograd.grad(linear_attn(**inputs).square().sum(), inputs["q"], create_graph=True)
    with pytest.raises(RuntimeError):
        dq.square().sum().backward()


def test_meta_and_fake_shapes():
    out = linear_attn(*(torch.empty(2, n, 3, 16, device="meta") for n in (5, 7, 7)), feature_map="elu")
    assert out.shape == (2, 5, 3, 16) and out.device.type == "meta"


@pytest.mark.parametrize("module", ["linvideo.ops", "linvideo_kernels"])
def test_import_is_light(module):
    code = f"import sys, {module}; print(*sorted({{'triton', 'diffusers', 'transformers', 'fla'}} & set(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
