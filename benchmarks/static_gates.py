"""Check the machine code of each shipped kernel without a GPU: `python -m benchmarks.static_gates [--arch sm_90 ...]`.

This compiles the tile table ahead of time for each architecture and prints one line per kernel. The gates are:

spills          registers spilled
two registers   the same, at most two registers
shared          shared memory above the limit
matrix          no tensor-core instruction where the tiles need one
exponentials    exponentials computed more than once (sm_90, sm_100, gfx942, gfx950)
shuffles        sums that shuffle in the hot loop
narrow          rows read or written 2 bytes at a time
resident        fewer programs per SM than the table assumes
overlap         a loop that waits for loads it has just issued, with no other program on the SM
hazard          registers of asynchronous products touched before the wait (sm_90)
stages          stages that Triton is known to compile wrongly (sm_100)
gave up         a kernel that ptxas gave up on

On AMD's GPUs (gfx942, gfx950, gfx1100) every spilled register counts, and waits and shuffles are not analysed.
EXCEPTIONS lists what may fail, each with its reason.
"""

import argparse
import fnmatch
import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import triton
from linvideo_kernels.linear_attn.aot import OPTIONS, CompileJob, compile_jobs
from linvideo_kernels.linear_attn.configs import AMD, arch

from benchmarks import gate_tables
from benchmarks.machine_code import ARCHITECTURES, Code, ptxas_version, read

MAPS = ("hedgehog", "hedgehog_joint", "elu", "relu", "softmax", "identity")

# The first release of Triton that compiles loops of several stages correctly for tcgen05 (sm_100, sm_103). 3.6.0 and
# 3.7.1 are known to give wrong sums if two products of a loop add to one accumulator (triton-lang/triton issue 10821,
# fixed on main by pull request 10988). Issue 10993, open in summer 2026, reports the same for an accumulator that
# another product reads. No release is proven correct for these kernels: set this once their tests pass on such a GPU.
TCGEN05_STAGES_SINCE: tuple[int, ...] | None = None

# (gate, pattern of the kernel's name): reason
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("overlap", "*-fp32-*"): "a product in fp32 takes many times as long as its loads",
    ("overlap", "*-sm100-*"): "only one stage compiles correctly, and the registers don't suffice for a second program",
    **{
        ("overlap", f"{kernel}-*-sm{capability}-*"): "100 KB of shared memory don't hold a state and two tiles"
        for kernel in ("apply_state", "map_grad")
        for capability in (86, 89, 120)
    },
    **{
        ("overlap", f"map_grad-{feature_map}-*-sm90-*"): "Triton prefetches what a product reads; these maps have no xW"
        for feature_map in ("elu", "relu", "softmax", "identity")
    },
    ("overlap", "accumulate_state-[eri]*-sm[18]*-*key_mask*"): "masked rows come through registers",
    ("overlap", "apply_state-*-sm80-*mix*"): "Triton prefetches what a product reads; none reads softmax_out",
    ("overlap", "apply_state-*-sm90-*mix*packed*"): "mixing packed rows spills where two programs share the registers",
    ("overlap", "apply_state-*-sm90-*rope-mix*"): "the same; both together occur only in inference during a transfer",
    ("overlap", "apply_state-hedgehog_joint-*-sm90-*rope*_cos"): "the same for the angles next to a joint softmax",
    ("overlap", "accumulate_state-*-sm90-*packed*factors"): "three stages of 64 rows spill 64 bytes",
    ("overlap", "accumulate_state-*-sm90-*expanded*factors"): "the same, 40 bytes with Triton 3.6",
    **{
        ("overlap", f"accumulate_state-{feature_map}-*-sm90-*{option}*"): "the same, 8 to 72 bytes"
        for feature_map in ("hedgehog_joint", "elu", "relu", "softmax", "identity")
        for option in ("key_mask", "packed", "expanded")
    },
    ("overlap", "accumulate_state-*-fp16-sm90-*factors"): "fp16's gain takes the registers of a second program",
    ("overlap", "apply_state-elu-d64-*-sm80-window*"): "writing denominators takes the registers of a second program",
    ("exponentials", "accumulate_state-elu-*key_mask*"): (
        "masked rows come through registers, and two products need two layouts; memory bounds the pass anyway"
    ),
    ("exponentials", "*-elu-*-gfx*"): "without weights, sums and products need the features in two layouts",
    ("exponentials", "*-fp32-gfx*"): "a product in fp32 takes many times as long",
    (
        "two registers",
        "apply_state-*-gfx942-*",
    ): "they are spilled to registers of the matrix instructions, not to memory",
    ("exponentials", "apply_state-hedgehog*-gfx942-*"): "with more of each row in registers, two warps share it",
    ("spills", "apply_state-*-gfx1100-*"): "RDNA 3 keeps each operand of a product twice in its 256 registers",
    **{
        ("spills", f"{kernel}-*-{dim}-*-gfx1100-*"): "the same"
        for kernel in ("accumulate_state", "map_grad")
        for dim in ("d96", "d128")
    },
    ("spills", "*-fp32-gfx1100-*"): "RDNA 3 has no matrix instruction for fp32",
    (
        "narrow",
        "*-gfx1100-*",
    ): "Triton stores results in the layout of RDNA's products, 2 bytes of a row in each thread",
    ("two registers", "accumulate_state-hedgehog_joint-d128-fp16-sm90-factors"): "read back once in 128 rows",
    ("two registers", "map_grad-hedgehog*-sm100-*normalize_factors*"): "read back once or twice in 64 rows",
    **{
        ("spills", f"map_grad-{kernel}-*window*_dot"): "4 to 8 registers, read back once or twice in 64 rows"
        for kernel in ("hedgehog_joint-d128-*-sm90", "hedgehog*-sm100")
    },
    ("two registers", "map_grad-hedgehog_joint-d96-*-sm90-window*_dot"): "read back once in 64 rows",
}
if triton.__version__.startswith("3.6."):
    EXCEPTIONS["spills", "apply_state-hedgehog*-d128-*-gfx942-*"] = "Triton 3.6 allocates registers less well"
    EXCEPTIONS["exponentials", "map_grad-elu-*-normalize_factors"] = "Triton 3.6 computes some of them twice"
    EXCEPTIONS["two registers", "accumulate_state-hedgehog-*-sm90-*factors"] = "Triton 3.6: read back once in 64 rows"


def faults(job: CompileJob, code: Code) -> dict[str, str]:
    """Return gate -> what is wrong, including what EXCEPTIONS allows."""
    architecture, dtype = ARCHITECTURES[job.capability], job.name.split("-")[3]
    name, amd = job.launch.kernel.__name__, job.capability in AMD
    products = name in ("accumulate_state", "apply_state", "map_grad", "project_grad")
    moves = name in (
        "mix_grad",
        "rotate_rows",
        "merge_rows",
        "merge_factors",
    )  # they have no products and cost only memory traffic
    rows = products or moves
    spilled = f"{code.stack} bytes of stack, {code.local} {'registers spilled' if amd else 'local accesses'}"
    found = {
        "spills": (code.stack > 8 or (amd and code.local > 2)) and spilled,
        "two registers": (0 < code.stack <= 8 or (amd and 0 < code.local <= 2 and not code.stack)) and spilled,
        "shared": code.shared > architecture.shared * 1024 and f"{code.shared / 1024:.1f} KB of {architecture.shared}",
        "matrix": products
        and (dtype != "fp32" or "tf32x3" in job.name)
        and not code.matrix
        and "no tensor-core instruction",
        "exponentials": job.capability in (90, 100, 942, 950)
        and code.exponentials > 1.01
        and f"{code.exponentials:.2f} times the number needed",
        "shuffles": dtype != "fp32" and code.shuffles > 160 and f"{code.shuffles} shuffles per tile",
        "narrow": rows
        and (code.narrow or (moves and not code.wide))
        and f"{code.narrow} accesses of 2 bytes, {code.wide} of 16",
        "resident": rows
        and code.resident < job.launch.tile.resident
        and f"{code.resident} of {job.launch.tile.resident}",
        "overlap": rows
        and code.resident == 1
        and code.ahead is not None
        and not code.prefetches
        and f"waits for loads issued only {code.ahead:.2f} tiles earlier, alone on the SM",
        "hazard": code.hazards and f"{len(code.hazards)} hazards, the first: {code.hazards[0]}",
        "stages": job.capability // 10 == 10
        and job.launch.tile.stages > 1
        and (TCGEN05_STAGES_SINCE is None or _triton_version() < TCGEN05_STAGES_SINCE)
        and f"{job.launch.tile.stages} stages, which Triton {triton.__version__} is not known to compile correctly",
        "gave up": (code.trap or (code.registers <= 32 and code.stack > 1000))
        and "a trap instruction, or everything on the stack",
    }
    return {gate: what for gate, what in found.items() if what}


def _triton_version() -> tuple[int, ...]:
    return tuple(int(part) for part in triton.__version__.split(".")[:2])


def excused(gate: str, name: str) -> str | None:
    """Return the reason why a kernel may fail a gate; None if it may not."""
    return next((why for (g, pattern), why in EXCEPTIONS.items() if g == gate and fnmatch.fnmatch(name, pattern)), None)


def jobs(arches, dims, maps, dtypes, options=((),), normalize=(True,), precisions=("ieee",)) -> list[CompileJob]:
    """Return the compile jobs of all combinations that exist."""
    product = itertools.product(arches, dims, maps, dtypes, options, normalize, precisions)
    made = []
    for capability, dim, feature_map, dtype, option, normal, precision in product:
        if (feature_map == "identity" and normal) or (precision == "tf32x3" and capability in AMD):
            continue
        made += compile_jobs(dim, feature_map, dtype, capability, normal, precision, option)
    return made


def unique(chosen: list[CompileJob]) -> list[CompileJob]:
    """Return the first job of each that compile to the same kernel."""
    return list({job.key: job for job in reversed(chosen)}.values())[::-1]


def sample(arches) -> list[CompileJob]:
    """Return what `make test` compiles: the shipped path for every architecture, and each option once.

    There are only some kernels for sm_86, which has the tiles of sm_89, and of AMD's GPUs only gfx942, which has the
    least shared memory.
    """
    bf16, fp32 = torch.bfloat16, torch.float32
    shipped = [a for a in arches if a not in (86, 950, 1100)]
    chosen = [
        *jobs(shipped, [64, 128], ["hedgehog"], [bf16]),
        *jobs([a for a in arches if a in (80, 90, 100)], [128], ["elu"], [bf16]),
        *jobs([a for a in arches if a in (90, 100)], [96], ["hedgehog"], [bf16]),
        *jobs([a for a in arches if a in (80, 90)], [128], ["hedgehog"], [fp32]),
    ]
    if 86 in arches:
        chosen += [job for job in jobs([86], [128], ["hedgehog"], [bf16]) if job.name.startswith(("map_", "project_"))]
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
    """Return what `make gates` compiles."""
    sixteen, dims = [torch.bfloat16, torch.float16], [16, 24, 32, 64, 96, 128]
    pairs = [("rope", "mix"), ("mix", "packed"), ("mix", "expanded"), ("rope", "packed"), ("rope", "expanded")]
    pairs += [("window", "packed")]
    every = [(), *((option,) for option in OPTIONS), *pairs, ("rope", "mix", "key_mask", "packed", "grouped")]
    chosen = [
        *jobs(arches, dims, MAPS, sixteen, normalize=[True, False]),
        *jobs(arches, [64, 96, 128], ["hedgehog", "hedgehog_joint", "elu"], [torch.bfloat16], options=every),
        *jobs(arches, dims, MAPS, [torch.float32], normalize=[True, False]),
        *jobs(arches, [64, 128], ["hedgehog"], [torch.float32], precisions=["tf32x3"]),
    ]
    return unique(chosen)


def check(job: CompileJob) -> tuple[Code | None, dict[str, str]]:
    """Compile a kernel; returns its figures (None if it doesn't compile) and its faults."""
    try:
        code = read(job)
    except Exception as error:  # ptxas and Triton raise many kinds of errors, with the whole program in the message
        return None, {"compile": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"}
    return code, faults(job, code)


_chosen: list[CompileJob] = []  # forked workers inherit it, since kernels can't be pickled


def _check_number(number: int):
    return check(_chosen[number])


def check_all(chosen: list[CompileJob], workers: int | None = None) -> Iterator[tuple[Code | None, dict[str, str]]]:
    """Yield `check` of each job in order; they are compiled in parallel."""
    _chosen[:] = chosen
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        yield from pool.map(_check_number, range(len(chosen)))


def line(job: CompileJob, code: Code | None, found: dict[str, str]) -> str:
    """Return a row of the table, with allowed faults in brackets."""
    ahead = "" if code is None or code.ahead is None else f"{code.ahead:.2f}"
    figures = "" if code is None else (
        f"{code.registers:4}{code.stack:6}{code.local:6}{code.shared / 1024:7.1f}{code.resident:4}{code.matrix:5}"
        f"{code.register_a:5}{code.loop:6}{ahead:>6}{code.exponentials:6.2f}{code.shuffles:5}{code.wide:5}{code.narrow:4}"
    )  # fmt: skip
    why = {gate: excused(gate, job.name) for gate in found}
    notes = [f"({gate}: {what}; {why[gate]})" if why[gate] else f"{gate}: {what}" for gate, what in found.items()]
    return f"{figures:69}  {gate_tables.tile_name(job.launch.tile):9} {job.name} {' '.join(notes)}".rstrip()


HEADER = (
    " REG STACK LOCAL  SH KB CTA  MMA REGA  LOOP AHEAD   EXP SHFL WIDE  2B"
    "  rows/warps/stages (T: TMA, R: state read again for each tile), kernel"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = {arch(a): a for a in ARCHITECTURES}
    parser.add_argument(
        "--arch", nargs="+", choices=names, default=list(names), help="architectures to compile for (default: all)"
    )
    parser.add_argument(
        "--all", action="store_true", help="compile every map, dtype, option and size, which takes an hour or more"
    )
    parser.add_argument(
        "--match", default="*", help="pattern of the names of the kernels to compile (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="new file for the rows as JSON")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one per CPU core)")
    parser.add_argument("--readme", action="store_true", help="write the tables of kernels/README.md and nothing else")
    args = parser.parse_args()
    if args.json and args.json.exists():
        parser.error(f"expected --json to be a new file, but {args.json} exists; results are never overwritten")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("expected TRITON_INTERPRET to be unset or 0, got 1, which prevents compilation")
    if args.readme:
        try:
            return gate_tables.write()
        except ValueError as error:
            parser.error(str(error))
    arches = [names[name] for name in args.arch]
    chosen = [job for job in (everything if args.all else sample)(arches) if fnmatch.fnmatch(job.name, args.match)]
    assemblers = {arch(a): ptxas_version(a) for a in arches if a not in AMD}
    print(", ".join([f"triton {triton.__version__}", *(f"ptxas {v} for {a}" for a, v in assemblers.items())]))
    print(f"{len(chosen)} kernels")
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
        aside.write_text(json.dumps({"triton": triton.__version__, "ptxas": assemblers, "kernels": rows}, indent=1))
        os.replace(aside, args.json)
    print(f"{bad} of {len(chosen)} kernels fail" if bad else f"all {len(chosen)} kernels pass")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
