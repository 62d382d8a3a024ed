"""Each fault that interpreter_patch fixes, against torch's own bfloat16."""

import warnings

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402


@triton.jit
def multiply_tiles(a, b, out, SIZE: tl.constexpr):
    rows = tl.arange(0, SIZE)
    tile = rows[:, None] * SIZE + rows[None, :]
    tl.store(out + tile, tl.dot(tl.load(a + tile), tl.load(b + tile), input_precision="ieee"))


@triton.jit
def negate(x, out, SIZE: tl.constexpr):
    tl.store(out + tl.arange(0, SIZE), -tl.load(x + tl.arange(0, SIZE)))


@triton.jit
def round_to_bf16(x, out, EXPLICIT: tl.constexpr, SIZE: tl.constexpr):
    value = tl.load(x + tl.arange(0, SIZE))
    if EXPLICIT:
        value = value.to(tl.bfloat16, fp_downcast_rounding="rtne")
    else:
        value = value.to(tl.bfloat16)
    tl.store(out + tl.arange(0, SIZE), value)


@triton.jit
def arithmetic(x, y, total, product, less, larger, chosen, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    a, b = tl.load(x + at), tl.load(y + at)
    tl.store(total + at, a + b)
    tl.store(product + at, a * b)
    tl.store(less + at, (a < b).to(tl.int32))
    tl.store(larger + at, tl.maximum(a, b))
    tl.store(chosen + at, tl.where(a < b, a, b))


@triton.jit
def count_to(n, out):
    total = 0
    for i in tl.range(0, tl.load(n)):
        total += i
    tl.store(out, total)


@triton.jit
def sum_without_cast(x, out, SIZE: tl.constexpr):
    tl.store(out, tl.sum(tl.load(x + tl.arange(0, SIZE)), 0))


def fresh(device: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, device=device, dtype=dtype)


def test_dot(device):
    a, b = torch.randn(2, 32, 32).to(device, torch.bfloat16)
    out = fresh(device, 32, 32, dtype=torch.float32)
    multiply_tiles[(1,)](a, b, out, SIZE=32)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_negation(device):
    x = torch.cat([torch.randn(14), torch.tensor([0.0, float("inf")])]).to(device, torch.bfloat16)
    out = fresh(device, 16)
    negate[(1,)](x, out, SIZE=16)
    assert torch.equal(out, -x)


@pytest.mark.parametrize("explicit", [False, True])
def test_rounding_is_to_nearest_even(device, explicit):
    spacing = 2.0**-7
    ties = 1 + spacing * torch.tensor([0.5, 1.5, 2.5, 3.5])  # halfway between neighbours: round to the even one
    carry = torch.tensor([2 - spacing / 4, -2 + spacing / 4])  # rounds up into the next exponent
    edges = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 3.3895e38, 3.4e38, 1e-40, -1e-45])
    x = torch.cat([ties, -ties, carry, edges, torch.randn(256 - 18) * 100]).to(device)
    out = fresh(device, 256)
    round_to_bf16[(1,)](x, out, EXPLICIT=explicit, SIZE=256)
    assert torch.equal(out.view(torch.int16), x.to(torch.bfloat16).view(torch.int16))


def test_rounding_keeps_nan(device):
    bits = torch.tensor([0x7FC00000, 0x7F800001, 0x7FFFFFFF, -1, -0x400000, 0x7F80FFFF, 0, 0], dtype=torch.int32)
    x, out = bits.view(torch.float32).to(device), fresh(device, 8)
    round_to_bf16[(1,)](x, out, EXPLICIT=False, SIZE=8)
    assert torch.equal(out.isnan(), x.isnan())


def test_arithmetic_and_comparison(device):
    x, y = torch.randn(2, 64).to(device, torch.bfloat16)
    total, product, larger, chosen = (fresh(device, 64) for _ in range(4))
    less = fresh(device, 64, dtype=torch.int32)
    arithmetic[(1,)](x, y, total, product, less, larger, chosen, SIZE=64)
    assert torch.equal(total, x + y)
    assert torch.equal(product, x * y)
    assert torch.equal(less.bool(), x < y)
    assert torch.equal(larger, torch.maximum(x, y))
    assert torch.equal(chosen, torch.minimum(x, y))


def test_range_over_a_loaded_number(device):
    n, out = torch.tensor([5], dtype=torch.int32, device=device), fresh(device, 1, dtype=torch.int32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # numpy < 2.4 only warns about what numpy 2.4 refuses
        count_to[(1,)](n, out)
    assert out.item() == 10


def test_bf16_reduction_is_refused(device):
    if device != "cpu":
        pytest.skip("a limit of the interpreter")
    with pytest.raises(Exception, match="reductions of bfloat16 are wrong in the interpreter"):
        sum_without_cast[(1,)](torch.ones(8, dtype=torch.bfloat16), fresh(device, 1), SIZE=8)
