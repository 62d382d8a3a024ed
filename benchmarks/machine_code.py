"""Figures of a compiled kernel's machine code: `read(job)` returns a Code, which static_gates.py judges.

NVIDIA's and AMD's GPUs have different readers, based on sass.py and amdgcn.py, that fill in the same Code.
"""

import itertools
import re
from typing import NamedTuple

from linvideo_kernels.linear_attn.aot import CompileJob
from linvideo_kernels.linear_attn.configs import AMD
from triton.backends.nvidia.compiler import get_ptxas_version

from benchmarks import amdgcn, sass, wgmma_hazards


class Architecture(NamedTuple):
    shared: int  # KB of shared memory that one program may use
    shared_per_sm: int  # KB of shared memory of an SM
    matrix: str  # the widest tensor-core instruction, in PTX or AMDGCN


ARCHITECTURES = {
    80: Architecture(163, 164, "mma.sync"),
    86: Architecture(99, 100, "mma.sync"),
    89: Architecture(99, 100, "mma.sync"),
    90: Architecture(227, 228, "wgmma.mma_async"),
    100: Architecture(227, 228, "tcgen05.mma"),
    120: Architecture(99, 100, "mma.sync"),
    942: Architecture(64, 64, amdgcn.MATRIX),
    950: Architecture(160, 160, amdgcn.MATRIX),
    1100: Architecture(64, 128, amdgcn.MATRIX),  # per pair of compute units, which share their programs
}

# The least share of a tile's work between a load and the wait for it. A wait for memory, about 1,000 clocks with its
# queue, is hidden by half a tile: on sm_90 a tile takes 3,000 clocks or more. Triton's stages give either about 0 (the
# loop ends with the next copy and begins with the wait for it) or at least 1.
LEAST_AHEAD = 0.5


class Code(NamedTuple):
    """One compiled kernel. Counts "in the loop" are instructions of a warp in the loop over the tiles of rows.

    On AMD's GPUs an SM is a compute unit, on gfx1100 a pair of them. Loads and shuffles are not analysed there.
    """

    registers: int
    stack: int  # bytes per thread
    local: int  # local loads and stores, that is, spills in use; on AMD the registers spilled, also those to AGPRs
    shared: int  # bytes of shared memory
    resident: int  # number of programs that fit on one SM
    matrix: int  # tensor-core instructions in PTX: Architecture.matrix, or mma.sync for tiles too narrow for that
    register_a: int  # asynchronous products (wgmma) whose A operand is in registers
    hazards: list[str]  # registers of asynchronous products touched too early (wgmma_hazards.py)
    loop: int  # instructions in the loop
    ahead: float | None  # least distance between a load and the wait for it, in tiles (sass.tiles_ahead)
    exponentials: float  # number in the loop, divided by the number needed
    shuffles: int  # number in the loop
    wide: int  # 16-byte global loads and stores in the loop, including TMA
    narrow: int  # 2-byte global loads and stores in the loop
    trap: bool  # whether the code has a trap instruction

    @property
    def prefetches(self) -> bool:
        """Whether the work of the loop hides the wait for its loads."""
        return self.ahead is not None and self.ahead >= LEAST_AHEAD


def read(job: CompileJob) -> Code:
    """Compile a kernel and return the figures of its code."""
    compiled = job.compile()
    return _read_amd(job, compiled) if job.capability in AMD else _read_nvidia(job, compiled)


def _read_amd(job: CompileJob, compiled) -> Code:
    text, architecture, warps = compiled.asm["amdgcn"], ARCHITECTURES[job.capability], job.launch.tile.warps
    code = amdgcn.parse(text)
    loop = amdgcn.hot_loop(code)
    due = exponentials_due(job)

    def count(pattern: str, lines=loop) -> int:
        return sum(bool(re.match(pattern, line)) for line in lines)

    shared = compiled.metadata.shared
    return Code(
        registers=amdgcn.figure(text, "vgpr_count"),
        stack=amdgcn.figure(text, "private_segment_fixed_size"),
        local=amdgcn.figure(text, "vgpr_spill_count"),
        shared=shared,
        resident=min(architecture.shared_per_sm * 1024 // max(shared, 1), 4 * amdgcn.occupancy(text) // warps, 32),
        matrix=count(architecture.matrix, code),
        register_a=0,
        hazards=[],
        loop=len(loop),
        ahead=None,
        exponentials=count("v_exp_f32") * AMD[job.capability] * warps / due if due else 0.0,
        shuffles=0,
        wide=count(r"(global|buffer)_(load|store)_(dwordx4|b128)"),
        narrow=count(r"(global|buffer)_(load|store)_(u?short|short_d16|[ui]16|b16|d16)"),
        trap=count("s_trap", code) > 0,
    )


def _read_nvidia(job: CompileJob, compiled) -> Code:
    text = sass.disassemble(compiled.asm["cubin"])
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", text).groups())
    code = sass.parse(text)
    loop = sass.hot_loop(code)
    threads = 32 * job.launch.tile.warps
    tile = job.launch.tile.block, job.launch.constexprs.get("WIDTH", 0)
    due = exponentials_due(job)

    def count(pattern: str, lines=loop) -> int:
        return sum(bool(re.search(pattern, instruction.text)) for instruction in lines)

    architecture = ARCHITECTURES[job.capability]
    wide_enough = job.launch.constexprs.get("WIDTH", 0) >= 64 and job.launch.tile.block >= 64
    instruction = architecture.matrix if wide_enough else r"mma\.sync|wgmma|tcgen05\.mma"
    shared = compiled.metadata.shared
    before_exit = itertools.takewhile(lambda instruction: "EXIT" not in instruction.text, code)
    return Code(
        registers=registers,
        stack=stack,
        local=count(r"\b(LDL|STL)\b", code),
        shared=shared,
        resident=min(
            architecture.shared_per_sm * 1024 // (shared + 1024), 65536 // (-(-registers // 8) * 8 * threads), 32
        ),
        matrix=len(re.findall(instruction, compiled.asm["ptx"])),
        register_a=wgmma_hazards.register_operands(code),
        hazards=wgmma_hazards.hazards(code),
        loop=len(loop),
        ahead=sass.tiles_ahead(loop, compiled.asm["ttgir"], tile) if len(loop) < len(code) else None,
        exponentials=count(r"MUFU\.EX2") * threads / due if due else 0.0,
        shuffles=count(r"\bSHFL\b"),
        wide=count(r"\b(LDG|LDGSTS|STG)\b.*\.128|UTMALDG"),
        narrow=count(r"\b(LDG|STG)\b\S*\.[US]16\b"),
        trap=any("BPT.TRAP" in instruction.text for instruction in before_exit),
    )


def exponentials_due(job: CompileJob) -> int:
    """Return the number of exponentials that one tile of rows needs."""
    constexprs, name = job.launch.constexprs, job.launch.kernel.__name__
    feature_map = constexprs.get("FEATURE_MAP")
    if feature_map in (None, "relu", "identity"):
        return 0
    halves = constexprs["SIGNS"]
    if name == "accumulate_state" and feature_map == "hedgehog":
        halves = 1  # a program has one half; only the joint softmax needs the other one, too
    return halves * constexprs["BLOCK"] * constexprs["WIDTH"]


def ptxas_version(capability: int) -> str:
    """Return the version of ptxas that Triton uses for an architecture.

    TRITON_PTXAS_PATH and TRITON_PTXAS_BLACKWELL_PATH select another one.
    """
    text = get_ptxas_version(capability)
    found = re.search(r"\bV(\d[\d.]*)", text)
    return found.group(1) if found else text.strip()
