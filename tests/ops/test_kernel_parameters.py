"""No length, number of sequences or number of splits may make Triton compile a kernel again."""

import importlib
import pkgutil

import pytest
import torch

pytest.importorskip("triton")
import linvideo_kernels.linear_attn as package  # noqa: E402
from linvideo_kernels.linear_attn.launch import SIZES, Target, recording  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

# Names of the sizes that change between launches. SIZES also has HEADS, which differs only between models.
GROW = {"SEQUENCES", "N", "splits", "rows", "factors_plane"}


def kernels() -> dict[str, JITFunction]:
    """Return every kernel of the package by name: the jitted functions that are launched."""
    found = {}
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for name, value in vars(module).items():
            if isinstance(value, JITFunction) and value.fn.__module__ == module.__name__:
                found[name] = value
    launched = {name: f for name, f in found.items() if "tl.program_id" in f.src}
    assert {"accumulate_state", "apply_state", "map_grad", "project_grad"} <= set(launched)
    return launched


@pytest.mark.parametrize("name", kernels())
def test_sizes_do_not_specialize(name):
    """A size of 1 or a multiple of 16 does not compile another kernel, and no size is a constexpr."""
    sizes = [parameter for parameter in kernels()[name].params if parameter.name in {*SIZES, *GROW}]
    assert all(parameter.do_not_specialize and not parameter.is_constexpr for parameter in sizes)
    assert sizes or name == "prepare_state"


def test_lengths_are_among_the_sizes():
    assert set(SIZES) >= GROW


def test_each_size_is_a_parameter():
    """Each name in SIZES is a parameter of some kernel; otherwise one was renamed and is no longer protected."""
    assert set(SIZES) <= {parameter.name for kernel in kernels().values() for parameter in kernel.params}


def launches(length: int, sequences: int):
    """Return (kernel, tile, constexprs) of a forward and backward with every option, on meta tensors, for sm_90."""

    def meta(*shape: int, dtype=torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k, v = (meta(1, length, heads, 128) for heads in (8, 4, 4))
    table = meta(length, 64, dtype=torch.float32)
    ends, mask = meta(sequences + 1, dtype=torch.int32), meta(1, length, dtype=torch.bool)
    keys = meta(4, 128, 128), (table, table), mask, ends
    queries = meta(8, 128, 128), (table, table), q, meta(1, dtype=torch.float32), ends
    settings = "hedgehog", 1.0, True, 1e-6, "ieee"
    with recording(Target(90, 132)) as recorded:
        state, z, rotated = package.state(k, v, *keys, "hedgehog", "ieee", True)
        package.state_backward(state, z, rotated, v, *keys, state, z, "hedgehog", "ieee")
        _, _, rotated, *prepared = package.apply(q, state, z, *queries, *settings, True)
        package.apply_backward(q, rotated, z, *queries, prepared, *settings)
    return [(each.kernel.fn.__name__, each.tile, each.constexprs) for each in recorded]


@pytest.mark.parametrize(("length", "sequences"), [(32_760, 1), (32_761, 2), (130, 7)])
def test_lengths_do_not_change_the_kernels(length, sequences):
    """Any number of rows and of sequences launches the same kernels with the same constexprs."""
    assert launches(length, sequences) == launches(4096, 4)
