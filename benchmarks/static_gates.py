"""What the compiler made of each shipped kernel, without a GPU: `python -m benchmarks.static_gates [--arch sm_90 ...]`.

Compiles the tile table ahead of time for each architecture, prints one line a kernel and fails on: spills, shared
memory over the limit, no tensor-core instruction where 16-bit tiles want one, exponentials computed twice (sm_90,
sm_100), sums that shuffle in the hot loop, rows read or written 2 bytes at a time, fewer programs per SM than the table
counts on, and kernels that ptxas gave up on; spills of one or two registers count by themselves. EXCEPTIONS names what
is let through, each with its reason.
"""

import argparse
import fnmatch
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from linvideo_kernels.linear_attn.aot import OPTIONS, CompileJob, compile_jobs
from linvideo_kernels.linear_attn.configs import Tile


class Architecture(NamedTuple):
    shared: int  # KB that one program may have
    shared_per_sm: int  # KB
    matrix: str  # the widest tensor-core instruction, in PTX


ARCHITECTURES = {
    80: Architecture(163, 164, "mma.sync"),
    89: Architecture(99, 100, "mma.sync"),
    90: Architecture(227, 228, "wgmma.mma_async"),
    100: Architecture(227, 228, "tcgen05.mma"),
    120: Architecture(99, 100, "mma.sync"),
}
MAPS = ("hedgehog", "hedgehog_joint", "elu", "relu", "softmax", "identity")

# (gate, pattern of the kernel's name): reason
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("exponentials", "accumulate_state-elu-*key_mask*"): (
        "masked rows come through registers, and two products want them in two layouts; the pass waits for bytes"
    ),
    ("two registers", "accumulate_state-hedgehog_joint-d128-fp16-sm90-factors"): "read back once in 128 rows",
    ("two registers", "map_grad-hedgehog*-sm100-*normalize_factors*"): "read back once or twice in 64 rows",
}
if triton.__version__.startswith("3.6."):
    EXCEPTIONS["exponentials", "map_grad-elu-*-normalize_factors"] = "Triton 3.6, in the same way"


class Code(NamedTuple):
    """One compiled kernel. Counts "in the loop" are SASS instructions of a warp in the loop over the tiles of rows."""

    registers: int
    stack: int  # bytes a thread
    local: int  # local loads and stores: spills that are used
    shared: int  # bytes
    resident: int  # programs that fit one SM
    matrix: int  # instructions in PTX: Architecture.matrix, mma.sync where that needs wider tiles
    loop: int  # instructions in the loop
    exponentials: float  # in the loop, over what is due
    shuffles: int  # in the loop
    wide: int  # 16-byte global loads and stores in the loop, TMA included
    narrow: int  # 2-byte ones
    trap: bool


def read(job: CompileJob) -> Code:
    compiled = job.compile()
    sass = disassemble(compiled.asm["cubin"])
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", sass).groups())
    code = [(int(at, 16), text) for at, text in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)]
    loop = hot_loop(code)
    threads = 32 * job.launch.tile.warps
    due = exponentials_due(job)

    def count(pattern: str, lines=loop) -> int:
        return sum(bool(re.search(pattern, text)) for _, text in lines)

    architecture = ARCHITECTURES[job.capability]
    wide_enough = job.launch.constexprs.get("WIDTH", 0) >= 64 and job.launch.tile.block >= 64
    instruction = architecture.matrix if wide_enough else r"mma\.sync|wgmma|tcgen05\.mma"
    shared = compiled.metadata.shared
    return Code(
        registers=registers,
        stack=stack,
        local=count(r"\b(LDL|STL)\b", code),
        shared=shared,
        resident=min(
            architecture.shared_per_sm * 1024 // (shared + 1024), 65536 // (-(-registers // 8) * 8 * threads), 32
        ),
        matrix=len(re.findall(instruction, compiled.asm["ptx"])),
        loop=len(loop),
        exponentials=count(r"MUFU\.EX2") * threads / due if due else 0.0,
        shuffles=count(r"\bSHFL\b"),
        wide=count(r"\b(LDG|LDGSTS|STG)\b.*\.128|UTMALDG"),
        narrow=count(r"\b(LDG|STG)\b\S*\.[US]16\b"),
        trap=any("BPT.TRAP" in text for _, text in itertools.takewhile(lambda line: "EXIT" not in line[1], code)),
    )


def disassemble(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [tool, "--dump-resource-usage", "-sass", path]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def hot_loop(code: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """The smallest loop with most of the products and special functions that the longest has."""
    index = {at: i for i, (at, _) in enumerate(code)}
    loops = []
    for i, (_, text) in enumerate(code):
        target = re.search(r"\bBRA\S*\s.*\b0x([0-9a-f]+)", text)
        if (
            target and (first := index.get(int(target.group(1), 16), len(code))) < i
        ):  # not the branch to itself at the end
            loops.append(code[first : i + 1])
    if not loops:
        return code

    def work(loop) -> int:
        return sum(bool(re.search(r"[HQ]GMMA|HMMA|UTC\w*MMA|\bFFMA\b|MUFU", text)) for _, text in loop)

    most = max(work(loop) for loop in loops)
    return min((loop for loop in loops if work(loop) > 0.8 * most), key=len) if most else max(loops, key=len)


def exponentials_due(job: CompileJob) -> int:
    """Of one tile of rows."""
    constexprs, name = job.launch.constexprs, job.launch.kernel.__name__
    feature_map = constexprs.get("FEATURE_MAP")
    if feature_map in (None, "relu", "identity"):
        return 0
    halves = constexprs["SIGNS"]
    if name == "accumulate_state" and feature_map == "hedgehog":
        halves = 1  # a program has one half; the joint softmax needs the other one too
    return halves * constexprs["BLOCK"] * constexprs["WIDTH"]


def faults(job: CompileJob, code: Code) -> dict[str, str]:
    """Gate -> what is wrong, exceptions included."""
    architecture, dtype = ARCHITECTURES[job.capability], job.name.split("-")[3]
    name = job.launch.kernel.__name__
    products = name in ("accumulate_state", "apply_state", "map_grad", "project_grad")
    moves = name in ("mix_grad", "rotate_rows")  # without products: bytes are all they cost
    rows = products or moves
    found = {
        "spills": code.stack > 8 and f"{code.stack} bytes of stack, {code.local} local accesses",
        "two registers": 0 < code.stack <= 8 and f"{code.stack} bytes of stack, {code.local} local accesses",
        "shared": code.shared > architecture.shared * 1024 and f"{code.shared / 1024:.1f} KB of {architecture.shared}",
        "matrix": products
        and (dtype != "fp32" or "tf32x3" in job.name)
        and not code.matrix
        and "no tensor-core instruction",
        "exponentials": job.capability in (90, 100)
        and code.exponentials > 1.01
        and f"{code.exponentials:.2f} of what is due",
        "shuffles": dtype != "fp32" and code.shuffles > 160 and f"{code.shuffles} shuffles a tile",
        "narrow": rows
        and (code.narrow or (moves and not code.wide))
        and f"{code.narrow} accesses of 2 bytes, {code.wide} of 16",
        "resident": rows
        and code.resident < job.launch.tile.resident
        and f"{code.resident} of {job.launch.tile.resident}",
        "gave up": (code.trap or (code.registers <= 32 and code.stack > 1000)) and "a trap, or all on the stack",
    }
    return {gate: what for gate, what in found.items() if what}


def excused(gate: str, name: str) -> str | None:
    return next((why for (g, pattern), why in EXCEPTIONS.items() if g == gate and fnmatch.fnmatch(name, pattern)), None)


def jobs(arches, dims, maps, dtypes, options=((),), normalize=(True,), precisions=("ieee",)) -> list[CompileJob]:
    product = itertools.product(arches, dims, maps, dtypes, options, normalize, precisions)
    made = []
    for capability, dim, feature_map, dtype, option, normal, precision in product:
        if feature_map == "identity" and normal:
            continue
        made += compile_jobs(dim, feature_map, dtype, capability, normal, precision, option)
    return made


def unique(chosen: list[CompileJob]) -> list[CompileJob]:
    return list({job.key: job for job in reversed(chosen)}.values())[::-1]


def sample(arches) -> list[CompileJob]:
    """What `make test` compiles: the shipped path everywhere, each option once."""
    bf16, fp32 = torch.bfloat16, torch.float32
    chosen = [
        *jobs(arches, [64, 128], ["hedgehog"], [bf16]),
        *jobs([a for a in arches if a in (80, 90, 100)], [128], ["elu"], [bf16]),
        *jobs([a for a in arches if a in (90, 100)], [96], ["hedgehog"], [bf16]),
        *jobs([a for a in arches if a in (80, 90)], [128], ["hedgehog"], [fp32]),
    ]
    if 90 in arches:
        every = [*((option,) for option in OPTIONS), ("rope", "mix", "key_mask", "packed")]
        chosen += [
            *jobs([90], [128], ["hedgehog"], [bf16], options=every),
            *jobs([90], [128], ["hedgehog_joint", "softmax"], [bf16]),
            *jobs([90], [128], ["identity"], [bf16], normalize=[False]),
            *jobs([90], [128], ["hedgehog"], [torch.float16]),
            *jobs([90], [64], ["hedgehog"], [fp32], precisions=["tf32x3"]),
            *jobs([90], [24], ["hedgehog"], [bf16]),
            *jobs([90], [64], ["relu"], [bf16]),
        ]
    return unique(chosen)


def everything(arches) -> list[CompileJob]:
    sixteen, dims = [torch.bfloat16, torch.float16], [16, 24, 32, 64, 96, 128]
    pairs = [("rope", "mix"), ("mix", "packed"), ("mix", "expanded"), ("rope", "packed"), ("rope", "expanded")]
    every = [(), *((option,) for option in OPTIONS), *pairs, ("rope", "mix", "key_mask", "packed", "grouped")]
    chosen = [
        *jobs(arches, dims, MAPS, sixteen, normalize=[True, False]),
        *jobs(arches, [64, 96, 128], ["hedgehog", "hedgehog_joint", "elu"], [torch.bfloat16], options=every),
        *jobs(arches, dims, MAPS, [torch.float32], normalize=[True, False]),
        *jobs(arches, [64, 128], ["hedgehog"], [torch.float32], precisions=["tf32x3"]),
    ]
    return unique(chosen)


def check(job: CompileJob) -> tuple[Code | None, dict[str, str]]:
    try:
        code = read(job)
    except Exception as error:  # ptxas and Triton raise many kinds, with the whole program in the text
        return None, {"compile": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"}
    return code, faults(job, code)


_chosen: list[CompileJob] = []  # inherited by forked workers: kernels cannot be pickled


def _check_number(number: int):
    return check(_chosen[number])


def check_all(chosen: list[CompileJob], workers: int | None = None) -> Iterator[tuple[Code | None, dict[str, str]]]:
    """`check` of each job in turn, compiled side by side."""
    _chosen[:] = chosen
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        yield from pool.map(_check_number, range(len(chosen)))


def line(job: CompileJob, code: Code | None, found: dict[str, str]) -> str:
    """A row of the table; in brackets what is let through."""
    figures = "" if code is None else (
        f"{code.registers:4}{code.stack:6}{code.local:6}{code.shared / 1024:7.1f}{code.resident:4}{code.matrix:5}"
        f"{code.loop:6}{code.exponentials:6.2f}{code.shuffles:5}{code.wide:5}{code.narrow:4}"
    )  # fmt: skip
    why = {gate: excused(gate, job.name) for gate in found}
    notes = [f"({gate}: {what}; {why[gate]})" if why[gate] else f"{gate}: {what}" for gate, what in found.items()]
    return f"{figures:58}  {tile_name(job.launch.tile):9} {job.name} {' '.join(notes)}".rstrip()


def tile_name(tile: Tile) -> str:
    """Rows/warps/stages, T: read through TMA, R: the state is read again for each tile, P: phi comes first."""
    flags = (tile.tma, "T"), (not tile.keeps, "R"), (not tile.value_first, "P")
    return f"{tile.block}/{tile.warps}/{tile.stages}{''.join(letter for is_set, letter in flags if is_set)}"


HEADER = (
    " REG STACK LOCAL  SH KB CTA  MMA  LOOP   EXP SHFL WIDE  2B"
    "  rows/warps/stages (T: TMA, R: state read again for each tile), kernel"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = {f"sm_{a}": a for a in ARCHITECTURES}
    parser.add_argument("--arch", nargs="+", choices=names, default=list(names), help="architectures (default: all)")
    parser.add_argument("--all", action="store_true", help="every map, dtype, option and size; an hour or more")
    parser.add_argument("--match", default="*", help="only kernels whose name fits this pattern")
    parser.add_argument("--json", type=Path, help="also write the rows to this file, which must not exist")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    if args.json and args.json.exists():
        parser.error(f"{args.json} exists; results are never overwritten")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 prevents compilation")
    arches = [names[name] for name in args.arch]
    chosen = [job for job in (everything if args.all else sample)(arches) if fnmatch.fnmatch(job.name, args.match)]
    print(f"triton {triton.__version__}, {len(chosen)} kernels")
    print(HEADER)
    rows, bad = [], 0
    for job, (code, found) in zip(chosen, check_all(chosen, args.workers), strict=True):
        wrong = {gate: what for gate, what in found.items() if not excused(gate, job.name)}
        bad += bool(wrong)
        print(line(job, code, found), flush=True)
        figures = {} if code is None else code._asdict()
        rows.append({"kernel": job.name, "tile": job.launch.tile._asdict(), **figures, "faults": found})
    if args.json:
        aside = args.json.with_name(args.json.name + ".writing")
        aside.write_text(json.dumps({"triton": triton.__version__, "kernels": rows}, indent=1))
        os.replace(aside, args.json)
    print(f"{bad} of {len(chosen)} kernels fail" if bad else f"all {len(chosen)} kernels pass")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
