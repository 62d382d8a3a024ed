"""The kernels under torch.library, torch.compile, autocast and activation checkpointing."""

import dataclasses

import pytest
import torch
from cases import Case, make_inputs
from claims import assert_same_bits, halves
from numerics import call, check, run
from operators import check_operators
from torch.utils.checkpoint import checkpoint

from linvideo.ops import chunked, linear_attn

CASE = Case(head_dim=16, nq=20, nk=30, dtype="fp32", heads=1)
ALL = Case(head_dim=16, nq=30, dtype="fp32", rope=True, mix=0.3, mask="some", packed="rows", group=3, heads=1)


def test_kernels_really_run(monkeypatch, device):
    """The tests do not use the plain PyTorch path: breaking that path changes nothing."""
    for function in ("state", "state_backward", "apply", "apply_backward"):
        assert hasattr(chunked, function)
        monkeypatch.setattr(chunked, function, None)
    case = Case(head_dim=16, nq=4, nk=4, dtype="fp32")
    inputs, grad = make_inputs(case, device)
    check(case, inputs, grad, run(linear_attn, inputs, grad, case.options))


@pytest.mark.parametrize("option", [{"layout": "packed_qkv"}, {"map": ("elu", False), "rope": True}], ids=str)
def test_opcheck(option, device):
    check_operators(dataclasses.replace(CASE, **option), device)


def test_opcheck_with_every_option(device):
    check_operators(dataclasses.replace(ALL, lengths=((9, 5), (7, 11)), group=2), device)


@pytest.mark.parametrize("op", [linear_attn, halves])
def test_autocast(op, device):
    """Rows and softmax_out are cast; weights, tables, r, S and z keep their dtypes."""
    inputs, _ = make_inputs(ALL, device)
    with torch.autocast(device, torch.bfloat16):
        out = call(op, inputs, ALL.options)
    rounded = {name: x.detach().bfloat16() if x.dim() == 4 else x.detach() for name, x in inputs.items()}
    assert out.dtype == torch.bfloat16 and torch.equal(out, call(op, rounded, ALL.options))


@pytest.mark.parametrize("case", [CASE, ALL], ids=str)
def test_activation_checkpointing_changes_nothing(case, device):
    inputs, grad = make_inputs(case, device)

    def op(q, k, v, **options):
        return checkpoint(lambda *x: linear_attn(*x, **options), q, k, v, use_reentrant=False)

    assert_same_bits(run(linear_attn, inputs, grad, case.options), run(op, inputs, grad, case.options))


def test_training_and_inference_give_the_same_output(device):
    """With rope they run different kernels, since only training keeps the rotated rows."""
    inputs, _ = make_inputs(ALL, device)
    out = call(linear_attn, inputs, ALL.options)
    with torch.no_grad():
        assert torch.equal(out, call(linear_attn, inputs, ALL.options))


@pytest.mark.parametrize("trained", ["k", "q_weight", "r"])
def test_only_one_input_needs_a_gradient(trained, device):
    inputs, grad = make_inputs(ALL, device)
    whole = run(linear_attn, inputs, grad, ALL.options)
    some = {name: x.detach().requires_grad_(name == trained) for name, x in inputs.items()}
    (got,) = torch.autograd.grad(call(linear_attn, some, ALL.options), [some[trained]], grad)
    assert torch.equal(got.double(), whole[f"d{trained}"])


class _Counter:
    graphs = 0

    def __call__(self, graph, _):
        self.graphs += 1
        return graph.forward


@pytest.mark.parametrize("options", [(), ("rope", "mix", "key_mask")], ids=["plain", "options"])
def test_compiles_without_graph_breaks_or_recompiles(options, device):
    torch._dynamo.reset()
    counter = _Counter()

    def function(x, table, r, keep):
        given = {"rope": (table, table), "mix": (x, r), "key_mask": keep}
        return linear_attn(x, x, x, feature_map="elu", **{name: given[name] for name in options}) + 1

    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for n in (20, 33, 47, 64):
        x, table = torch.randn(1, n, 1, 16, device=device), torch.randn(n, 8, device=device)
        arguments = x, table, torch.tensor([0.3], device=device), torch.rand(1, n, device=device) < 0.7
        torch.testing.assert_close(compiled(*arguments), function(*arguments))
    assert counter.graphs <= 2  # one for the first length, one for any other
