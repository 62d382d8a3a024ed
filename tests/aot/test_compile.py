"""Every kernel compiled ahead of time, without a GPU, for each architecture, and what ptxas made of it."""

import functools
import inspect
import itertools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("tests/aot compiles, which TRITON_INTERPRET=1 prevents", allow_module_level=True)
triton = pytest.importorskip("triton", reason="tests/aot needs triton")

from linvideo_kernels.linear_attn import backward, forward  # noqa: E402
from linvideo_kernels.linear_attn.aot import CompileJob, compile_jobs  # noqa: E402

SHARED_LIMIT = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}  # KB a block may have
MATRIX_INSTRUCTION = {80: "mma.sync", 89: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}
FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
MAPS = ["hedgehog", "elu", "relu", "softmax", "identity"]


class Code(NamedTuple):
    registers: int
    stack: int  # bytes a thread spills
    sass: str
    instructions: int


def jobs(dims, maps, dtypes, capabilities, normalize=True) -> list[CompileJob]:
    combinations = itertools.product(dims, maps, dtypes, capabilities)
    return [job for combination in combinations for job in compile_jobs(*combination, normalize=normalize)]


def name(job: CompileJob) -> str:
    return job.name


@functools.cache
def cuobjdump() -> Path:
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def disassemble(cubin: bytes) -> Code:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [cuobjdump(), "--dump-resource-usage", "-sass", path]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", sass).groups()
    return Code(int(registers), int(stack), sass, len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s", sass, re.MULTILINE)))


def check(job: CompileJob) -> None:
    compiled = job.compile()
    code = disassemble(compiled.asm["cubin"])
    kernel, capability, dtype = job.launch.kernel.__name__, job.capability, job.launch.args[0].dtype
    shared = compiled.metadata.shared
    print(f"{job.name}: REG {code.registers} STACK {code.stack} SHARED {shared} instructions {code.instructions}")
    assert shared <= SHARED_LIMIT[capability] * 1024
    assert 100 < code.instructions < 10_000
    # A kernel that Triton could not lower is one trap; with tcgen05 ptxas adds traps of its own, behind the exit.
    assert "BPT.TRAP" not in code.sass.split("EXIT")[0]
    assert not (code.registers <= 32 and code.stack > 1000), f"ptxas gave up: REG {code.registers} STACK {code.stack}"
    if capability == 90 and dtype == BFLOAT16:
        assert code.stack < 512
    if dtype != FLOAT32 and kernel != "reduce_state":
        expected = (
            MATRIX_INSTRUCTION[capability] if job.launch.constexprs["WIDTH"] >= 64 else "mma"
        )  # wgmma has 64 rows
        assert expected in compiled.asm["ptx"], "no tensor cores"
    # min.f32 and max.f32 drop a NaN; of the maps only the softmaxes may take a maximum, whose NaN exp then keeps.
    assert "min.f32" not in compiled.asm["ptx"]


EVERYWHERE = [
    *jobs([64, 128], ["hedgehog", "elu"], [BFLOAT16], SHARED_LIMIT),
    *jobs([64, 128], ["hedgehog"], [FLOAT32], SHARED_LIMIT),
]
PADDED = jobs([16, 24, 96], ["hedgehog", "elu"], [BFLOAT16, FLOAT32], [90])
OTHER_MAPS = jobs([64, 128], ["relu", "softmax"], [BFLOAT16, FLOAT32], SHARED_LIMIT)
UNNORMALIZED = jobs([64, 128], MAPS, [BFLOAT16, FLOAT32], SHARED_LIMIT, normalize=False)
HALF = jobs([64, 128], MAPS[:-1], [FLOAT16], SHARED_LIMIT)
ELU_FLOAT32 = jobs([64, 128], ["elu"], [FLOAT32], SHARED_LIMIT)


@pytest.mark.parametrize("job", EVERYWHERE, ids=name)
def test_every_architecture(job):
    check(job)


@pytest.mark.parametrize("job", PADDED, ids=name)
def test_head_dimensions_inside_a_wider_tile(job):
    check(job)


@pytest.mark.full
@pytest.mark.parametrize("job", [*OTHER_MAPS, *UNNORMALIZED, *HALF, *ELU_FLOAT32], ids=name)
def test_other_maps_and_fp16(job):
    check(job)


def test_every_kernel_is_compiled():
    """Every jit function of forward.py and backward.py that runs as a program is among the jobs."""
    functions = (value for f in (forward, backward) for value in vars(sys.modules[f.__module__]).values())
    kernels = {
        function.__name__
        for function in functions
        if isinstance(function, triton.JITFunction) and "tl.program_id" in inspect.getsource(function.fn)
    }
    assert kernels == {job.launch.kernel.__name__ for job in EVERYWHERE}


def test_kernels_use_no_atomics():
    """Sums have a fixed order: the same input gives the same bits."""
    for job in EVERYWHERE:
        source = inspect.getsource(job.launch.kernel.fn)
        assert "atomic" not in source and "autotune" not in source
