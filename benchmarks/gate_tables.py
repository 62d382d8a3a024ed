"""The tables of kernels/README.md that are derived from the machine code, between two markers.

`python -m benchmarks.static_gates --readme` writes them; tests/aot/test_gate_tables.py compares them with the code.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import triton
from linvideo_kernels.linear_attn.aot import CompileJob, compile_jobs
from linvideo_kernels.linear_attn.configs import AMD, Tile, arch

from benchmarks import clock_model, marked
from benchmarks.machine_code import ARCHITECTURES, Code, ptxas_version, read
from benchmarks.shapes import MODELS

README = Path(__file__).resolve().parents[1] / "kernels" / "README.md"
BEGIN = "<!-- written by python -m benchmarks.static_gates --readme -->"
END = "<!-- end of what static_gates writes -->"
TRITON = "3.7.1"  # the version that the figures are of
# kernel and use, as in the names of jobs -> label in the tables
USES = {
    "accumulate_state-plain": "accumulate_state, forward",
    "accumulate_state-factors": "accumulate_state, backward",
    "apply_state-normalize": "apply_state, o",
    "apply_state-plain": "apply_state, dv",
    "map_grad-normalize_factors": "map_grad, queries",
    "map_grad-keys": "map_grad, keys",
    "project_grad-plain": "project_grad",
}
WAN = [name for name in MODELS if name.startswith("wan2.1-")]


def tile_name(tile: Tile) -> str:
    """Return rows/warps/stages and letters: T for rows read through TMA, R for a state read again for each tile, P for
    phi^T v in place of (v^T phi)^T, Z for z summed in registers."""
    flags = (tile.tma, "T"), (not tile.keeps, "R"), (not tile.value_first, "P"), (not tile.z_by_dot, "Z")
    return f"{tile.block}/{tile.warps}/{tile.stages}{''.join(letter for is_set, letter in flags if is_set)}"


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows))


def per_row(job: CompileJob, code: Code) -> float:
    """Return the instructions in the loop per row and SM scheduler."""
    return code.loop * job.launch.tile.warps / 4 / job.launch.tile.block


def tiles() -> str:
    """Return the table of NVIDIA's architectures; sm_86 has the tiles of sm_89."""
    return by_architecture(
        [a for a in ARCHITECTURES if a not in AMD and a != 86],
        lambda job, code: f"{per_row(job, code):.1f}, {'-' if code.ahead is None else f'{code.ahead:.1f}'}",
    )


def amd_tiles() -> str:
    """Return the table of AMD's larger GPUs."""
    return by_architecture([942, 950], lambda job, code: str(code.local))


def by_architecture(capabilities: list[int], more: Callable[[CompileJob, Code], str]) -> str:
    """Return a table of each use's tile, registers, KB of shared memory, programs per SM and what `more` gives."""
    cells: dict[str, list[str]] = {use: [] for use in USES}
    for capability in capabilities:
        for job in compile_jobs(128, "hedgehog", torch.bfloat16, capability):
            use = f"{job.launch.kernel.__name__}-{job.name.rpartition('-')[2]}"
            if use in USES:
                code = read(job)
                cells[use].append(
                    f"{tile_name(job.launch.tile)}: {code.registers}, {code.shared / 1024:.0f}, {code.resident}, "
                    f"{more(job, code)}"
                )
    return table(["", *map(arch, capabilities)], [[USES[use], *row] for use, row in cells.items()])


def passes(compiled: dict[str, tuple[CompileJob, Code]]) -> str:
    """Return the table of the clock model's figures for each pass on sm_90."""
    rows = []
    for use, (job, code) in compiled.items():
        clocks = clock_model.clocks(job, code)
        times = [f"{1e6 * clock_model.seconds(job, code, MODELS[name]):.0f}" for name in WAN]
        waves = [clock_model.utilisation(job, code, MODELS[name]) for name in WAN]
        rows.append(
            [USES.get(use, use.replace("-", ", ").replace("normalize_cos", "o with RoPE").replace("cos", "keys")),
             tile_name(job.launch.tile), str(code.resident), str(code.register_a),
             *(f"{value:.0f}" for value in clocks), f"**{clocks.total:.0f}**", f"{100 * min(waves):.0f}%", *times]
        )  # fmt: skip
    header = [
        "",
        "tile",
        "programs",
        "A in registers",
        "tensor",
        "issue",
        "MUFU",
        "memory",
        "serial",
        "clocks",
        "waves",
    ]
    return table([*header, *(name.removeprefix("wan2.1-") for name in WAN)], rows)


def ops(compiled: dict[str, tuple[CompileJob, Code]]) -> str:
    """Return the table of the predicted time of each op on sm_90, next to its limit."""
    rows = []
    for name, op in clock_model.OPS.items():
        pairs = [clock_model.predict(op, compiled, MODELS[shape]) for shape in WAN]
        rows.append([name, *(f"{1e3 * time:.2f} / {1e3 * limit:.2f} = {time / limit:.1f}" for time, limit in pairs)])
    return table(["ms", *(name.removeprefix("wan2.1-") for name in WAN)], rows)


def text() -> str:
    """Return what stands between the markers."""
    compiled, gpu = clock_model.kernels(), clock_model.GPUS[90]
    assemblers = ", ".join(f"{ptxas_version(a)} for sm_{a}" for a in (90, 100))
    gap, prepare = 1e6 * clock_model.GAP, 1e6 * clock_model.PREPARE
    return f"""
Triton {triton.__version__} (ptxas {assemblers}), D = 128, hedgehog, bf16. Each cell has the tile,
then registers, KB of shared memory, programs per SM, instructions in the loop per row and SM scheduler, and the number
of tiles that the loop loads ahead. A tile is written as rows/warps/stages and letters. T: rows are read through TMA. R:
the state is read again for each tile. P: accumulate_state forms phi^T v in place of (v^T phi)^T. Z: it sums z in
registers and not by a product.

{tiles()}

AMD's GPUs have their own tiles. After the tile come registers per thread (including those that only matrix instructions
can use), KB of LDS, programs per compute unit, and registers spilled. **Compiled and gated, not run.**

{amd_tiles()}

**A model, not a measurement** (benchmarks/clock_model.py), sm_90, with rates of an {gpu.name}:
{gpu.flops / 1e12:.0f} TFLOP/s, {gpu.bandwidth / 1e12:.1f} TB/s, {gpu.clock / 1e9:.3f} GHz. For each pass
the table has the clocks of an SM, per row and head, that it needs of the tensor cores, of instruction issue, of the
unit for exponentials (MUFU) and of memory. "serial" is the time of one program, in which these follow each other,
divided by the number of programs on an SM. The largest of the five is the time of the pass. "waves" is the share of the
time in which the grid fills the SMs, for the worst of four shapes of Wan 2.1, whose microseconds follow. "A in
registers" counts the asynchronous products that take their first operand from registers.

{passes(compiled)}

The next table has the time of the whole op in milliseconds, as predicted / limit = ratio. The limit is the least work
at full rate: 12 D² flops and 4 rows moved in a forward, 40 D² and 11 rows with the backward. The prediction assumes
{gap:.0f} us between launches, {prepare:.0f} us for each prepare_state, and a host that keeps up.

{ops(compiled)}
"""


def replaced(readme: str, new: str) -> str:
    """Return the README with `new` between the markers."""
    return marked.replaced(readme, BEGIN, END, new, README)


def write() -> None:
    """Write the tables into the README.

    Raises:
        ValueError: This is another Triton than the figures are of, or the README doesn't have the markers.
    """
    if triton.__version__ != TRITON:
        raise ValueError(f"the README has the figures of Triton {TRITON}, this is {triton.__version__}")
    marked.fill(README, BEGIN, END, text())
