"""Window attention on the kernels: linear attention to the far frames, the merge and RoPE. On a GPU, every backend."""

import dataclasses

import pytest
import torch
from cases import DTYPES
from window_cases import CASES, WindowCase, check_16_bits, check_float32, make_window_inputs, run_window, softmax_errors

from linvideo.ops import softmax_backends, window_attn

SMALL = WindowCase(frames=5, frame_tokens=3, batch=1)
EVERYTHING = dataclasses.replace(
    SMALL, prefix=3, suffix=2, masked=True, batch=2, heads=1, group=2, rope=True, anchors=("first",), head_dim=24
)
LENGTHS = [  # one token per frame, and thousands in total
    dataclasses.replace(SMALL, frame_tokens=1),
    dataclasses.replace(SMALL, frame_tokens=300, frames=7, chunk=3, prefix=77, rope=True),
]
INTERPRETED = [
    (SMALL, "fp32"),
    (EVERYTHING, "fp32"),
    (EVERYTHING, "fp16"),
    (dataclasses.replace(SMALL, causal=True, feature_map="hedgehog_joint", gain=3.0, layout="guarded"), "bf16"),
    (dataclasses.replace(SMALL, frames=3, frame_tokens=50, chunk=1, overlap=0, heads=1, feature_map="elu"), "fp16"),
    (dataclasses.replace(SMALL, frames=3, overlap=2, rope=True), "fp32"),  # the windows cover the video
    *((case, dtype) for case in CASES[-3:] for dtype in ("fp32", "fp16")),
    (dataclasses.replace(CASES[-3], head_dim=128), "fp16"),  # the most that rounding o adds to the weights' gradients
]


def check(case: WindowCase, device: str, backend: str | None = None, of_terms: bool = False) -> None:
    inputs, grad = make_window_inputs(case, device)
    options = case.options | ({} if backend is None else {"backend": backend})
    actual = run_window(window_attn, inputs, grad, options)
    if case.dtype == "fp32":
        check_float32(case, inputs, grad, actual, of_terms)
    else:
        check_16_bits(case, inputs, grad, actual, softmax_errors(inputs, grad, case.options))


@pytest.mark.filterwarnings("ignore:divide by zero encountered in log")  # log 0 = -inf is meant: no far frames
@pytest.mark.parametrize(("case", "dtype"), INTERPRETED, ids=str)
def test_against_float64(case, dtype, device):
    check(dataclasses.replace(case, dtype=dtype), device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", [None, *softmax_backends.BACKENDS])
def test_every_backend(backend, dtype, gpu):
    """All cases on a GPU, with the head dimension of Wan, which every library has kernels for, and one feature map."""
    q = torch.zeros(1, dtype=DTYPES[dtype], device=gpu)
    try:
        softmax_backends.choose(backend, q, masked=False, training=True)
    except ValueError as error:
        pytest.skip(str(error))
    for case in CASES + LENGTHS:
        # Logits of -39 take a softmax in fp32 to within 1e-5 of its largest value at best, and gradients cancel.
        of_terms = case.far_apart > 0
        check(dataclasses.replace(case, dtype=dtype, head_dim=128, feature_map="hedgehog"), gpu, backend, of_terms)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reruns_give_the_same_bits(dtype, gpu):
    case = dataclasses.replace(EVERYTHING, dtype=dtype, frames=9, frame_tokens=100)
    inputs, grad = make_window_inputs(case, gpu)
    first, second = (run_window(window_attn, inputs, grad, case.options) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
