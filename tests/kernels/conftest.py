"""Run the kernels in Triton's interpreter on CPU tensors or, if TRITON_INTERPRET is not set, on a GPU."""

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
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by deterministic mode on CUDA
    torch.backends.cudnn.allow_tf32 = False  # on by default, and Wan's patch embedding is a convolution


@pytest.fixture(scope="session")
def device() -> str:
    if not INTERPRET and not torch.cuda.is_available():
        pytest.skip(NEEDS)
    return "cpu" if INTERPRET else "cuda"


@pytest.fixture(scope="session")
def gpu(device) -> str:
    """`device`, for tests that cannot fail in the interpreter, which runs the programs one by one in one thread."""
    if device == "cpu":
        pytest.skip("only meaningful on a GPU")
    return device


@pytest.fixture(autouse=True)
def bfloat16_is_not_refused(monkeypatch):
    """Lift the refusal of `check_interpreted`, since interpreter_patch fixes bfloat16."""
    monkeypatch.setattr(library, "check_interpreted", lambda x: None)


@pytest.fixture(autouse=True)
def nan_in_fresh_memory():
    """Have torch.empty and the like return NaN, so that an element that no kernel has written is noticed."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def set_tiles(monkeypatch, device):
    """Return a function that changes fields of configs.Tile for the kernels that loop over rows.

    tma is set only where descriptors can read. The function has an effect in the interpreter only; on a GPU the tiles
    of the table remain.
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
