"""Ahead-of-time compilation of the kernels, without a GPU: the launches are recorded on meta tensors and compiled."""

from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from linvideo_kernels.linear_attn import configs, passes, window
from linvideo_kernels.linear_attn.launch import Launch, Target, recording

TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int8: "i8", torch.int32: "i32"
}  # fmt: skip
OPTIONS = ("rope", "mix", "key_mask", "packed", "grouped", "expanded", "window")


class CompileJob(NamedTuple):
    name: str
    launch: Launch
    capability: int

    @property
    def key(self) -> tuple:
        """A key that is equal for jobs that compile the same kernel."""
        kernel, tile, args, constexprs = self.launch
        types = tuple(None if value is None else (_type(value), _divisible(value)) for value in args)
        return self.capability, kernel.__name__, tile, types, *constexprs.items()

    def compile(self):
        """Return Triton's compiled kernel (.metadata.shared, .asm["cubin"]); not with TRITON_INTERPRET=1.

        The kernel is then in Triton's cache, where a launch finds it: several processes can compile what one will run.
        """
        return triton.compile(self.source(), target=gpu_target(self.capability), options=self.launch.tile.options)

    def source(self) -> ASTSource:
        """Return the source as a launch makes it.

        Even its empty entries and the order of the parameters are the same, since both are part of the cache's key.
        """
        kernel, _, args, constexprs = self.launch
        signature = dict.fromkeys(kernel.arg_names, "constexpr")
        constants, attrs = dict(constexprs), {}
        given = dict(zip((parameter.name for parameter in kernel.params), args, strict=False)) | constexprs
        for parameter in kernel.params:
            value = given[parameter.name]
            if value is None or parameter.name in constexprs:
                constants[parameter.name] = value
                if isinstance(value, str) or not triton.__version__.startswith("3.6."):
                    attrs[(parameter.num,)] = []
                continue
            signature[parameter.name] = _type(value)
            if _divisible(value) and not parameter.do_not_specialize:
                attrs[(parameter.num,)] = [["tt.divisibility", 16]]
                if self.capability in configs.AMD and isinstance(value, torch.Tensor):
                    attrs[(parameter.num,)].append(["tt.pointer_range", 32])  # a tensor of at most 2 GB
        return ASTSource(kernel, signature, constants, attrs)


def gpu_target(capability: int) -> GPUTarget:
    """Return the target of a capability as Triton's driver would."""
    if capability in configs.AMD:
        return GPUTarget("hip", configs.arch(capability), configs.AMD[capability])
    return GPUTarget("cuda", capability, 32)


def compile_jobs(
    head_dim: int,
    feature_map: str,
    dtype: torch.dtype,
    capability: int,
    normalize: bool = True,
    precision: str = "ieee",
    options: tuple[str, ...] = (),
) -> list[CompileJob]:
    """Return one job for each distinct kernel of a forward and a backward.

    Args:
        head_dim, feature_map, dtype, normalize, precision: Arguments of the op.
        capability: 90 for sm_90, 942 for gfx942.
        options: Names from OPTIONS. "window" adds what window attention needs.
    """

    def meta(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    heads, key_heads = 16, 8 if "grouped" in options else 16

    def rows(heads: int) -> torch.Tensor:
        return (
            meta(1, 1, heads, head_dim).expand(1, 4096, -1, -1)
            if "expanded" in options
            else meta(1, 4096, heads, head_dim)
        )

    (k, v), (q, do, softmax_out) = (rows(key_heads) for _ in "kv"), (rows(heads) for _ in range(3))
    weighted = configs.signs(feature_map) == 2
    q_weight, k_weight = ((meta(h, head_dim, head_dim) if weighted else None) for h in (heads, key_heads))
    table = meta(4096, head_dim // 2, dtype=torch.float32)
    rope = (table, table) if "rope" in options else None
    mix = (softmax_out, meta(1, dtype=torch.float32)) if "mix" in options else (None, None)
    key_mask = meta(1, 4096, dtype=torch.int8) if "key_mask" in options else None
    cu_seqlens = meta(5, dtype=torch.int32) if "packed" in options else None
    training = rope is not None
    settings = (feature_map, 1.0, normalize, 1e-6, precision)
    with recording(Target(capability, 132)) as launches:
        keys = (k_weight, rope, key_mask, cu_seqlens)
        state, z, rotated = passes.state(k, v, *keys, feature_map, precision, training)
        passes.state_backward(state, z, rotated if training else k, v, *keys, state, z, feature_map, precision)
        queries = (q_weight, rope, *mix, cu_seqlens)
        windowed = "window" in options
        o, den, rotated, *prepared = passes.apply(q, state, z, *queries, *settings, True, windowed)
        rotated = rotated if training else q
        passes.apply_backward(do, rotated, z, *queries, prepared, *settings, den)
        if windowed:
            log_gain = meta(heads, dtype=torch.float32)
            for common in (None, (o, den)):
                window.merge(o, den, common, (o, den), log_gain)
            dot, share = window.factors(do, o, den, log_gain)
            sums = state[:1], z[:1]  # no packed sequences here: each frame is a sequence of the batch
            passes.part_backward(do, dot, share, rotated, *sums, q_weight, feature_map, precision)
        if training:  # without gradients the forward runs other kernels: apply_state rotates the queries itself
            passes.state(k, v, *keys, feature_map, precision, False)
            passes.apply(q, state, z, *queries, *settings, False)
    what = [feature_map, f"d{head_dim}", TYPES[dtype], configs.arch(capability).replace("_", "")]
    what += ([] if normalize else ["raw"]) + ([] if precision == "ieee" else [precision]) + list(options)
    jobs = [
        CompileJob("-".join([launch.kernel.__name__, *what, _use(launch)]), launch, capability) for launch in launches
    ]
    return list({job.key: job for job in reversed(jobs)}.values())[::-1]


def _use(launch: Launch) -> str:
    """Return a name that distinguishes the uses of one kernel in a forward and a backward."""
    given = {p.name for p, value in zip(launch.kernel.params, launch.args, strict=False) if value is not None}
    flags = [
        name.lower() for name in ("KEYS", "NORMALIZE", "BACKWARD", "CENTER") if launch.constexprs.get(name) is True
    ]
    flags += [
        name.removesuffix("_ptr")
        for name in ("factors_ptr", "cos_ptr", "grad_ptr", "den_ptr", "den_grad_ptr", "dot_ptr", "common_ptr")
        if name in given
    ]
    return "_".join(flags) or "plain"


def _divisible(value) -> bool:
    return isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)


def _type(value) -> str:
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"
