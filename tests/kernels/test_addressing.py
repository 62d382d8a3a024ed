"""Offsets beyond 2^31 elements. The tensors lie in sparse files, of which only the pages of their rows are touched."""

import dataclasses
import os

import pytest
import torch
from cases import Case, make_inputs
from numerics import run
from ops.claims import assert_same_bits

from linvideo.ops import linear_attn

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter_patch

CASE = Case(head_dim=16, nq=17, nk=20, dtype="fp32", batch=1, heads=1)
FAR = 2**31 + 2**20
# Strides of [B, N, H, D] that take the last of three batch entries, the last row or the last of three heads past 2^31
# elements, though each stride is below, and a stride that is beyond itself.
STRIDES = {
    "batch": lambda n, h, d: (FAR // 2, h * d, d, 1),
    "rows": lambda n, h, d: (h * d, FAR // (n - 1) // 64 * 64 + 64, d, 1),
    "heads": lambda n, h, d: (n * d, d, FAR // 2, 1),
    "far batch": lambda n, h, d: (FAR, h * d, d, 1),
}


@triton.jit
def multiply(out, n):
    tl.store(out, tl.program_id(0) + n * 4)


@pytest.fixture
def sparse(tmp_path):
    """A function that places a tensor in a file with holes; skips where files have none, or on a GPU."""

    def place(x: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
        if x.device.type != "cpu":
            pytest.skip("needs the interpreter; test_rows_past_2_to_the_31_elements is for a GPU")
        last = sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True))
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        with open(path, "wb") as file:
            file.truncate((last + 1) * x.element_size())
        if os.stat(path).st_blocks * 512 > 2**20:
            pytest.skip("the file system has no sparse files")
        memory = torch.from_file(str(path), shared=True, size=last + 1, dtype=x.dtype)
        far = memory.as_strided(x.shape, strides)
        far.copy_(x)
        assert last > 2**31
        return far.requires_grad_()

    return place


ALL = {"mix": 0.3, "rope": True, "mask": "some"}
CALLS = {
    "batch": ("batch", {"batch": 3}),
    "batch, options": ("batch", ALL | {"batch": 3}),
    "far batch": ("far batch", {"batch": 2, "map": ("elu", True)}),
    "rows": ("rows", {"map": ("elu", False)}),
    "rows, options": ("rows", ALL | {"packed": "rows", "group": 2}),
    "heads, options": ("heads", ALL | {"heads": 3}),
}


@pytest.mark.parametrize("name", CALLS)
def test_far_rows_are_the_near_ones(name, sparse, device):
    """The bits of the contiguous call, forward and backward; no 32-bit sum overflows on the way."""
    far, options = CALLS[name]
    case = dataclasses.replace(CASE, **options)
    inputs, grad = make_inputs(case, device)

    def place(x: torch.Tensor) -> torch.Tensor:
        return sparse(x.detach(), STRIDES[far](x.shape[1], x.shape[2], x.shape[3])) if x.dim() == 4 else x

    expected = run(linear_attn, inputs, grad, case.options)
    there = {name: place(x) for name, x in inputs.items()}
    gradient = place(grad).detach()
    with interpreter_patch.overflow_raises():
        actual = run(linear_attn, there, gradient, case.options)
    assert_same_bits(expected, actual)


@pytest.mark.parametrize("name", ["q", "v"])
def test_far_rows_through_descriptors(name, sparse, set_tiles, device):
    """TMA's strides are 64 bits wide as well."""
    set_tiles(tma=True)
    inputs, grad = make_inputs(CASE, device)
    expected = run(linear_attn, inputs, grad, CASE.options)
    x = inputs[name].detach()
    inputs[name] = sparse(x, STRIDES["rows"](x.shape[1], x.shape[2], x.shape[3]))
    assert_same_bits(expected, run(linear_attn, inputs, grad, CASE.options))


def test_overflow_is_seen(device):
    """The check that the tests above rely on."""
    if device != "cpu":
        pytest.skip("a feature of the interpreter")
    out = torch.zeros(1, dtype=torch.int32)
    multiply[(1,)](out, 2**28)
    with interpreter_patch.overflow_raises(), pytest.raises(Exception, match="overflow"):
        multiply[(1,)](out, 2**30)


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
