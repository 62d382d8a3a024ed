"""What `launch` assumes about Triton: which arguments share a compiled kernel, and which need another."""

import pytest
import torch

pytest.importorskip("triton")
from linvideo_kernels.linear_attn import configs, launch  # noqa: E402
from triton.compiler import CompiledKernel  # noqa: E402


class Compiled(CompiledKernel):
    def __init__(self):
        self.launched = []

    def __getitem__(self, grid):
        return lambda *arguments: self.launched.append((grid, arguments))


class Kernel:
    """Stands for a jitted function: a launch through Triton returns what it has compiled."""

    arg_names = ("u_ptr", "w_ptr", "stride", "D")

    def __init__(self):
        self.compiled = []

    @staticmethod
    def fn(u_ptr, w_ptr, stride, D):
        pass

    def __getitem__(self, grid):
        def call(*arguments, **options):
            self.compiled.append(Compiled())
            return self.compiled[-1]

        return call


@pytest.fixture
def kernel(monkeypatch) -> Kernel:
    monkeypatch.setattr(launch, "_compiled", {})
    return Kernel()


MEMORY = torch.zeros(100, dtype=torch.bfloat16)
GIVEN = {"u_ptr": MEMORY, "w_ptr": MEMORY, "stride": 64, "D": 16}
OTHERS = {
    "address": {"u_ptr": MEMORY[1:]},
    "dtype": {"u_ptr": MEMORY.half()},
    "none": {"w_ptr": None},
    "stride": {"stride": 72},
    "constexpr": {"D": 32},
}


TILE = configs.Tile(64, 4, 1)


def run(kernel: Kernel, tile: configs.Tile = TILE, **changes) -> None:
    launch.launch(kernel, 7, tile, torch.device("cpu"), **GIVEN | changes)


def test_arguments_of_the_same_kind_reuse_the_compiled_kernel(kernel):
    for u in (MEMORY, MEMORY.clone(), MEMORY[8:]):
        run(kernel, u_ptr=u)
    (compiled,) = kernel.compiled
    assert [grid for grid, _ in compiled.launched] == [(7, 1, 1)] * 2
    assert all(arguments[2:] == (64, 16) for _, arguments in compiled.launched)


@pytest.mark.parametrize("change", OTHERS)
def test_arguments_of_another_kind_go_through_triton(kernel, change):
    run(kernel)
    run(kernel, **OTHERS[change])
    assert len(kernel.compiled) == 2 and not any(compiled.launched for compiled in kernel.compiled)


def test_on_amd_a_tensor_of_more_than_2_gb_is_of_another_kind(kernel, monkeypatch):
    """Triton addresses smaller tensors with 32-bit offsets."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    for elements in (2**30 - 1, 1000, 2**30):
        run(kernel, u_ptr=torch.empty(elements, dtype=torch.bfloat16, device="meta"))
    assert len(kernel.compiled) == 2


class Properties:
    """Stands for the properties that PyTorch returns for a GPU."""

    multi_processor_count, major, minor, name = 304, 9, 4, "some GPU"

    def __init__(self, arch: str):
        self.gcnArchName = arch


@pytest.fixture
def hip(monkeypatch):
    """Make device 0 an AMD GPU of the given architecture."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    launch._cuda_target.cache_clear()
    yield lambda arch: monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties(arch))
    launch._cuda_target.cache_clear()


@pytest.mark.parametrize("capability", configs.AMD)
def test_the_target_of_an_amd_gpu(capability, hip):
    hip(f"gfx{capability}:sramecc+:xnack-")
    assert launch._cuda_target(0) == launch.Target(capability, 304)


@pytest.mark.parametrize("arch", ["gfx90a:sramecc+:xnack-", "gfx906", "gfx1201"])
def test_another_amd_gpu_is_refused(arch, hip):
    hip(arch)
    with pytest.raises(RuntimeError, match=f"an AMD GPU of gfx942, gfx950, gfx1100, got {arch.split(':')[0]}$"):
        launch._cuda_target(0)


def test_an_old_nvidia_gpu_is_refused(hip, monkeypatch):
    hip("")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(Properties, "major", 7)
    with pytest.raises(RuntimeError, match="compute capability 8.0 or newer, .* got some GPU$"):
        launch._cuda_target(0)


def test_another_tile_goes_through_triton(kernel):
    run(kernel)
    run(kernel, TILE._replace(stages=2))
    assert len(kernel.compiled) == 2


def test_the_cache_of_compiled_kernels_is_bounded(kernel):
    for stride in range(3000):
        run(kernel, stride=stride)
    assert len(launch._compiled) <= 1024


@pytest.mark.parametrize("arguments", [{"other": 1}, {"stride": ...}])
def test_a_wrong_name_is_refused(kernel, arguments):
    given = {name: value for name, value in (GIVEN | arguments).items() if value is not ...}
    with pytest.raises((TypeError, KeyError)):
        launch.launch(kernel, 7, TILE, torch.device("cpu"), **given)
    assert not kernel.compiled
