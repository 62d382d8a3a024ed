"""The calls that benchmarks/host.py times. They run in a process of their own, on the code of one source tree.

`python -P host_calls.py '[1, 32760, 12, 128]'` prints the names of its cases, then answers each line
`["name", calls]` on stdin with a line of JSON. PYTHONPATH names the tree, which may be older than this file, so only
PyTorch, Triton and that tree's linvideo are imported.

The tensors are on PyTorch's meta device and take the code path of CUDA tensors. A launch goes through Triton's own path
(it binds the arguments, derives the specialization and looks up the kernel), but the kernel that it finds does nothing.
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
    """Return a kernel that a launch finds in Triton's cache, and that only counts how often it is started."""
    source.fn.cache_key  # noqa: B018 - as in compiling, this collects the globals that every launch compares
    compiled, name = CompiledKernel.__new__(CompiledKernel), source.fn.__name__

    def run(*args) -> None:
        launched[name] += 1

    compiled.__dict__ |= {"src": source, "name": name, "module": compiled, "function": None, "packed_metadata": ()}
    compiled._run = run
    return compiled


class Autocast(torch.autocast):
    """Autocast that costs as much time as for a device that supports it."""

    def __init__(self, device_type: str, *args, **kwargs):
        super().__init__("cpu" if device_type == "meta" else device_type, *args, **kwargs)


def new_empty(x, size, dtype=None, layout=None, device=None, pin_memory=None) -> torch.Tensor:
    return torch.empty(size, dtype=dtype or x.dtype, device="meta")


def sum_over(x, dim, keepdim=False, dtype=None) -> torch.Tensor:
    """Implement `sum` over the first axis."""
    size = x.shape[1:]
    return torch.empty((1, *size) if keepdim else size, dtype=dtype or x.dtype, device="meta")


def load():
    """Return the tree's linear_attn, changed so that it launches kernels for meta tensors."""
    triton.runtime.driver.set_active(Driver(GPUTarget("cuda", H100[0], 32)))
    triton.compiler.compile = compile_nothing
    torch.autocast = Autocast
    implementations, impl = {}, torch.library.Library.impl

    def recorded(library, name, function, key="", **options):
        own = str(name).rpartition("::")[2].startswith("linear_attn")
        if own and key in ("CompositeExplicitAutograd", "CUDA"):
            implementations[name] = function
        if not own or key != "Meta":  # it has shapes only; the implementation with kernels takes its place below
            impl(library, name, function, key, **options)

    torch.library.Library.impl = recorded
    from linvideo_kernels.linear_attn import launch

    from linvideo.ops import linear_attn

    for module in [module for name, module in sys.modules.items() if name.startswith("linvideo.")]:
        if hasattr(module, "uses_kernels"):
            module.uses_kernels = lambda x: True
    launch.INTERPRETER = launch.Target(*H100)  # used for tensors that are on no GPU
    # Registrations live as long as their libraries. PyTorch's own meta implementations of these two operators take ten
    # times as long as those of a device.
    load.libraries = torch.library.Library("linvideo", "IMPL"), torch.library.Library("aten", "IMPL")
    for name, function in implementations.items():
        impl(load.libraries[0], name, function, "Meta")
    for name, function in {"new_empty": new_empty, "sum.dim_IntList": sum_over}.items():
        impl(load.libraries[1], name, function, "Meta", allow_override=True)
    return linear_attn


def cases(linear_attn, shape: tuple[int, int, int, int]) -> dict:
    """Return name -> call without arguments. Rows are in bfloat16, weights and tables in float32."""
    batch, length, heads, dim, *_ = shape

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
        call()  # so that everything that is created only once exists
    print(json.dumps(list(made)), flush=True)
    for line in sys.stdin:
        case, calls = json.loads(line)
        launched.clear()
        times = []
        for _ in range(calls):
            start = time.thread_time_ns()  # CPU time, which other processes don't add to
            made[case]()
            times.append((time.thread_time_ns() - start) / 1000)
        print(json.dumps({"launches": sum(launched.values()) // calls, "microseconds": times}), flush=True)


if __name__ == "__main__":
    main()
