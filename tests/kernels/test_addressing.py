"""Offsets beyond 2^31 elements. In the interpreter the tensors are in sparse files, where only the pages with their
rows take space; on a GPU they are in one block of memory."""

import contextlib
import dataclasses
import os
from pathlib import Path

import pytest
import torch
from cases import DTYPES, Case, make_inputs
from claims import assert_same_bits
from numerics import run

from linvideo.ops import linear_attn

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRET:
    import interpreter_patch

# small in the interpreter; on a GPU the tiles of wide heads
SIZE = {"head_dim": 16, "dtype": "fp32"} if INTERPRET else {"head_dim": 128, "dtype": "bf16"}
CASE = Case(nq=17, nk=20, batch=1, heads=1, **SIZE)
FAR = 2**31 + 2**20
APART = 2**20  # distance between interleaved tensors, more than their near rows take
# Strides of [B, N, H, D] that put the last of three batch entries, the last row or the last of three heads beyond 2^31
# elements, though no stride is that large; and a batch stride that is.
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
def far(tmp_path, device):
    """Return a function that copies a tensor to memory with other strides; skip the test if there is not enough."""
    dtype, length, placed = DTYPES[CASE.dtype], FAR + 16 * APART, []
    memory = None
    if device == "cuda":
        if torch.cuda.mem_get_info()[0] < 1.1 * length * dtype.itemsize:
            pytest.skip(f"needs {1.1e-9 * length * dtype.itemsize:.0f} GB of free GPU memory")
        memory = torch.empty(length, dtype=dtype, device=device)

    def place(x: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
        last = sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True))
        assert last > 2**31
        number = len(placed)
        there = sparse(tmp_path / f"{number}", last + 1, dtype) if memory is None else memory[number * APART :]
        placed.append(there.as_strided(x.shape, strides, there.storage_offset()).copy_(x))
        return placed[-1].requires_grad_()

    return place


def sparse(path: Path, length: int, dtype: torch.dtype) -> torch.Tensor:
    with open(path, "wb") as file:
        file.truncate(length * dtype.itemsize)
    if os.stat(path).st_blocks * 512 > 2**20:
        pytest.skip("the file system has no sparse files")
    return torch.from_file(str(path), shared=True, size=length, dtype=dtype)


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
def test_far_rows_are_the_near_ones(name, far, device):
    """Forward and backward have the bits of the contiguous call, and no 32-bit sum overflows."""
    strides, options = CALLS[name]
    case = dataclasses.replace(CASE, **options)
    inputs, grad = make_inputs(case, device)

    def place(x: torch.Tensor) -> torch.Tensor:
        return far(x.detach(), STRIDES[strides](*x.shape[1:])) if x.dim() == 4 else x

    expected = run(linear_attn, inputs, grad, case.options)
    there = {name: place(x) for name, x in inputs.items()}
    gradient = place(grad).detach()
    with interpreter_patch.overflow_raises() if device == "cpu" else contextlib.nullcontext():
        actual = run(linear_attn, there, gradient, case.options)
    assert_same_bits(expected, actual)


@pytest.mark.parametrize("name", ["q", "v"])
def test_far_rows_through_descriptors(name, far, set_tiles, device):
    """The strides of TMA descriptors are 64 bits wide, too."""
    set_tiles(tma=True)
    inputs, grad = make_inputs(CASE, device)
    expected = run(linear_attn, inputs, grad, CASE.options)
    x = inputs[name].detach()
    inputs[name] = far(x, STRIDES["rows"](*x.shape[1:]))
    assert_same_bits(expected, run(linear_attn, inputs, grad, CASE.options))


def test_overflow_is_seen(device):
    """`overflow_raises`, which the tests above rely on, detects an overflow."""
    if device != "cpu":
        pytest.skip("a feature of the interpreter")
    out = torch.zeros(1, dtype=torch.int32)
    multiply[(1,)](out, 2**28)
    with interpreter_patch.overflow_raises(), pytest.raises(Exception, match="overflow"):
        multiply[(1,)](out, 2**30)
