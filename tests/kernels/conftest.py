"""Runs the kernels in Triton's interpreter on CPU tensors, or on a GPU where TRITON_INTERPRET is not set."""

import os

import pytest
import torch

from linvideo.ops import library

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
NEEDS = "tests/kernels needs `TRITON_INTERPRET=1 pytest tests/kernels`, or a CUDA GPU"

if INTERPRET:
    pytest.importorskip("triton", reason="tests/kernels needs triton")
    import interpreter_patch

    interpreter_patch.apply()
else:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic mode on CUDA asks for it
    torch.backends.cudnn.allow_tf32 = False  # on by default, and Wan's patch embedding is a convolution


@pytest.fixture(scope="session")
def device() -> str:
    if not INTERPRET and not torch.cuda.is_available():
        pytest.skip(NEEDS)
    return "cpu" if INTERPRET else "cuda"


@pytest.fixture(scope="session")
def gpu(device) -> str:
    """`device`, for what cannot fail in the interpreter, which runs one program after another in one thread."""
    if device == "cpu":
        pytest.skip("means something on a GPU only")
    return device


@pytest.fixture(autouse=True)
def bfloat16_is_not_refused(monkeypatch):
    """interpreter_patch has mended what `check_interpreted` refuses."""
    monkeypatch.setattr(library, "check_interpreted", lambda x: None)


@pytest.fixture(autouse=True)
def nan_in_fresh_memory():
    """torch.empty and its kin come filled with NaN, so that an element no kernel wrote is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def set_tiles(monkeypatch, device):
    """A function that changes fields of configs.Tile of the kernels that walk over rows; tma only where it can read.

    For the interpreter: a GPU keeps the tiles that fit it.
    """
    from linvideo_kernels.linear_attn import configs

    def change(**fields) -> None:
        def tile(kernel, *args):
            found, options = plain(kernel, *args), args[-1]
            if kernel in ("prepare_state", "reduce_state"):
                return found
            unfit = options & configs.NO_DESCRIPTOR.get(kernel, frozenset())
            return found._replace(**fields | ({"tma": False} if unfit else {}))

        if device == "cpu":
            monkeypatch.setattr(configs, "tile", tile)

    plain = configs.tile
    return change
