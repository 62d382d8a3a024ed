"""Ahead-of-time compilation, without a GPU, of what the launchers launch: they run on meta tensors, recorded."""

from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from linvideo_kernels.linear_attn.backward import backward
from linvideo_kernels.linear_attn.forward import forward
from linvideo_kernels.linear_attn.launch import Launch, Target, recording

POINTER_TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


class CompileJob(NamedTuple):
    name: str
    launch: Launch
    capability: int

    def compile(self):
        """Triton's compiled kernel (.metadata.shared, .asm["cubin"]). Not in a process with TRITON_INTERPRET=1."""
        kernel, tile, args, constexprs = self.launch
        signature = dict.fromkeys(kernel.arg_names, "constexpr")
        constants, attrs = dict(constexprs), {}
        for parameter, value in zip(kernel.params, args, strict=False):  # the constexprs follow the arguments
            if value is None:
                constants[parameter.name] = value
                continue
            signature[parameter.name] = _type(value)
            divisible = isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)
            if divisible and not parameter.do_not_specialize:
                attrs[(parameter.num,)] = [["tt.divisibility", 16]]
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        source = ASTSource(kernel, signature, constants, attrs)
        return triton.compile(source, target=GPUTarget("cuda", self.capability, 32), options=options)


def compile_jobs(
    head_dim: int, feature_map: str, dtype: torch.dtype, capability: int, normalize: bool = True
) -> list[CompileJob]:
    """One job for each different kernel of a forward and a backward. capability: 90 for sm_90."""
    q, k, v, do = (torch.empty(1, 4096, 16, head_dim, dtype=dtype, device="meta") for _ in range(4))
    weight = torch.empty(16, head_dim, head_dim, dtype=dtype, device="meta") if feature_map == "hedgehog" else None
    with recording(Target(capability, 132)) as launches:
        _, state, stats = forward(q, k, v, weight, weight, feature_map, 1.0, normalize, 1e-6)
        backward(do, q, k, v, weight, weight, state, stats, feature_map, 1.0, normalize, 1e-6)
    jobs = {}
    for launch in launches:
        flags = [name.lower() for name, value in launch.constexprs.items() if value is True]
        dtype_name = str(dtype).removeprefix("torch.")
        name = "-".join([launch.kernel.__name__, feature_map, f"d{head_dim}", dtype_name, f"sm{capability}", *flags])
        jobs.setdefault(name, CompileJob(name, launch, capability))
    return list(jobs.values())


def _type(value) -> str:
    if isinstance(value, torch.Tensor):
        return POINTER_TYPES[value.dtype]
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"
