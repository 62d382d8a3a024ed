"""The calls that benchmarks/host.py times, of one source tree and in a process of their own.

`python -P host_calls.py '[1, 32760, 12, 128]'` prints the names of its cases, and then a line of JSON for each line
`["name", calls]` that comes in. PYTHONPATH names the tree, which may be older than this file: nothing but PyTorch,
Triton and the tree's linvideo is imported.

Tensors are on PyTorch's meta device and take the branch that CUDA tensors take. A launch goes through Triton's own path
(it binds the arguments, derives the specialization and looks the kernel up), but what it finds starts nothing.
"""

import json
import sys
import time
from collections import Counter

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

H100 = (90, 132)  # compute capability and multiprocessors


class Driver:
    """Triton's driver without a device."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


launched: Counter = Counter()  # kernels, by name


def compile_nothing(source, **options) -> CompiledKernel:
    """What a launch finds in Triton's cache, but that it starts nothing."""
    source.fn.cache_key  # noqa: B018 - collects the globals that every launch compares, as compiling does
    compiled, name = CompiledKernel.__new__(CompiledKernel), source.fn.__name__

    def run(*args) -> None:
        launched[name] += 1

    compiled.__dict__ |= {"src": source, "name": name, "module": compiled, "function": None, "packed_metadata": ()}
    compiled._run = run
    return compiled


class Autocast(torch.autocast):
    """As costly as it is for a device that has autocast."""

    def __init__(self, device_type: str, *args, **kwargs):
        super().__init__("cpu" if device_type == "meta" else device_type, *args, **kwargs)


def new_empty(x, size, dtype=None, layout=None, device=None, pin_memory=None) -> torch.Tensor:
    return torch.empty(size, dtype=dtype or x.dtype, device="meta")


def sum_over(x, dim, keepdim=False, dtype=None) -> torch.Tensor:
    """For the sum over the first axis."""
    size = x.shape[1:]
    return torch.empty((1, *size) if keepdim else size, dtype=dtype or x.dtype, device="meta")


def load():
    """The tree's linear_attn, made to launch kernels for meta tensors."""
    triton.runtime.driver.set_active(Driver(GPUTarget("cuda", H100[0], 32)))
    triton.compiler.compile = compile_nothing
    torch.autocast = Autocast
    implementations, impl = {}, torch.library.Library.impl

    def recorded(library, name, function, key="", **options):
        own = str(name).rpartition("::")[2].startswith("linear_attn")
        if own and key in ("CompositeExplicitAutograd", "CUDA"):
            implementations[name] = function
        if not own or key != "Meta":  # of shapes alone; the kernels' implementation takes its place below
            impl(library, name, function, key, **options)

    torch.library.Library.impl = recorded
    from linvideo_kernels.linear_attn import launch

    from linvideo.ops import linear_attn

    for module in [module for name, module in sys.modules.items() if name.startswith("linvideo.")]:
        if hasattr(module, "uses_kernels"):
            module.uses_kernels = lambda x: True
    launch.INTERPRETER = launch.Target(*H100)  # that of tensors on no GPU
    # Registrations live as long as their libraries. PyTorch's own for meta take ten times as long as those of a device.
    load.libraries = torch.library.Library("linvideo", "IMPL"), torch.library.Library("aten", "IMPL")
    for name, function in implementations.items():
        impl(load.libraries[0], name, function, "Meta")
    for name, function in {"new_empty": new_empty, "sum.dim_IntList": sum_over}.items():
        impl(load.libraries[1], name, function, "Meta", allow_override=True)
    return linear_attn


def cases(linear_attn, shape: tuple[int, int, int, int]) -> dict:
    """Name -> a call without arguments. Rows in bfloat16, weights and tables in float32."""
    batch, length, heads, dim = shape

    def meta(*size: int, dtype=torch.float32, **options) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta", **options)

    q, k, v, do = (meta(*shape, dtype=torch.bfloat16) for _ in range(4))
    weights = {name: meta(heads, dim, dim) for name in ("q_weight", "k_weight")}
    table = meta(length, dim // 2)
    trained = [x.detach().requires_grad_() for x in (q, k, v, *weights.values())]

    def forward(rope):
        with torch.no_grad():
            linear_attn(q, k, v, **weights, rope=rope)

    def training(rope):
        *rows, q_weight, k_weight = trained
        out = linear_attn(*rows, q_weight=q_weight, k_weight=k_weight, rope=rope)
        torch.autograd.grad(out, trained, do)

    return {
        "forward": lambda: forward(None),
        "forward, RoPE": lambda: forward((table, table)),
        "forward + backward": lambda: training(None),
        "forward + backward, RoPE": lambda: training((table, table)),
    }


def main() -> None:
    made = cases(load(), tuple(json.loads(sys.argv[1])))
    for call in made.values():
        call()  # what is made once is made
    print(json.dumps(list(made)), flush=True)
    for line in sys.stdin:
        case, calls = json.loads(line)
        launched.clear()
        times = []
        for _ in range(calls):
            start = time.thread_time_ns()  # what other processes take of the CPU is not in it
            made[case]()
            times.append((time.thread_time_ns() - start) / 1000)
        print(json.dumps({"launches": sum(launched.values()) // calls, "microseconds": times}), flush=True)


if __name__ == "__main__":
    main()
