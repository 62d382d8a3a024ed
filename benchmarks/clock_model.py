"""How long each pass should take: a model based on figures of the machine code, not a measurement.

For one row of one head, in clocks of an SM, a pass needs

    tensor   the flops of its products at the rate of the tensor cores
    issue    the instructions of its loop: one per clock for each of the four schedulers
    MUFU     the exponentials of its loop: 16 per clock
    memory   the rows that it reads and writes, at the SM's share of the bandwidth

and cannot be faster than any of them. Within one program the products and the rest run one after the other, because the
rest works on the results of the products; the time for memory is added unless the loop loads ahead (Code.prefetches). R
programs on an SM fill each other's gaps. So with serial = (tensor + max(issue, MUFU) [+ memory]) / R

    clocks = max(tensor, issue, MUFU, memory, serial)

The model leaves out barriers, bank conflicts, latencies within a warp, and L2. It is within 30% of an independent
estimate of the same kernels (tests/aot/test_clock_model.py). For a whole op it adds GAP and PREPARE below, writing and
reading the partial sums, and the tail of each grid: programs run in waves of as many as fit on the GPU.
"""

from typing import NamedTuple

import torch
from linvideo_kernels.linear_attn import configs
from linvideo_kernels.linear_attn.aot import CompileJob, compile_jobs

from benchmarks.machine_code import Code, exponentials_due, read
from benchmarks.shapes import Shape


class Gpu(NamedTuple):
    name: str
    flops: float  # dense 16-bit products, per second
    bandwidth: float  # bytes per second
    sm_count: int
    clock: float  # Hz


# The rates of the H200 are those that large products and copies are known to reach; the others are from data sheets and
# serve to rank tiles. There is no model of AMD's GPUs, whose units overlap in another way.
GPUS = {
    80: Gpu("A100", 312e12, 2.04e12, 108, 1.41e9),
    86: Gpu("RTX 3090", 71e12, 0.94e12, 82, 1.70e9),
    89: Gpu("RTX 4090", 165e12, 1.01e12, 128, 2.52e9),
    90: Gpu("H200", 790e12, 4.3e12, 132, 1.755e9),
    100: Gpu("B200", 2250e12, 8.0e12, 148, 1.85e9),
    120: Gpu("RTX 5090", 209e12, 1.79e12, 170, 2.41e9),
}
GAP = 2e-6  # assumed seconds between two launches
PREPARE = 5e-6  # assumed seconds of prepare_state, each program of which reads the state of a head twice
# Number of rows that each pass reads and writes, per row of a head.
MOVED = {"accumulate_state": 2, "apply_state": 2, "map_grad": 3, "project_grad": 3, "rotate_rows": 2, "mix_grad": 3}
PARTIALS = ("accumulate_state", "project_grad", "mix_grad")  # each program writes a partial sum


class Clocks(NamedTuple):
    """Clocks of an SM for one row of one head."""

    tensor: float
    issue: float
    exponentials: float
    memory: float
    serial: float  # clocks of one program, divided by the number of programs on an SM

    @property
    def total(self) -> float:
        return max(self)

    @property
    def bound(self) -> str:
        """The name of the largest part, which is the total."""
        return self._fields[self.index(self.total)]


def clocks(job: CompileJob, code: Code) -> Clocks:
    """Return the clocks of a kernel that walks over rows."""
    gpu, constexprs, tile = GPUS[job.capability], job.launch.constexprs, job.launch.tile
    rounds = halves(job) / tile.block  # of the loop, for one row
    per_clock = gpu.sm_count * gpu.clock
    tensor = flops(job) / (gpu.flops / per_clock)
    issue = rounds * code.loop * tile.warps / 4
    exponentials = rounds * code.exponentials * exponentials_due(job) / 16
    size = 4 if "-fp32-" in job.name else 2
    mixed = "mix" in job.name.split("-") and job.launch.kernel.__name__ == "apply_state"
    moved = (MOVED[job.launch.kernel.__name__] + mixed) * constexprs["D"] * size
    memory = moved / (gpu.bandwidth / per_clock)
    serial = tensor + max(issue, exponentials) + (0.0 if code.prefetches else memory)
    return Clocks(tensor, issue, exponentials, memory, serial / code.resident)


def halves(job: CompileJob) -> int:
    """Return the number of programs that walk over the same rows, each for one half of the features."""
    return job.launch.constexprs["SIGNS"] if job.launch.kernel.__name__ == "accumulate_state" else 1


def flops(job: CompileJob) -> float:
    """Return the flops on tensor cores for a row of a head, padding included, in flops at the 16-bit rate."""
    constexprs, name = job.launch.constexprs, job.launch.kernel.__name__
    square = 2 * constexprs["WIDTH"] ** 2
    if name in ("rotate_rows", "mix_grad") or constexprs["PRECISION"] == "ieee" and "-fp32-" in job.name:
        return 0  # products on CUDA cores count as instructions
    weighted = configs.signs(constexprs.get("FEATURE_MAP", "hedgehog")) == 2
    signs = constexprs.get("SIGNS", 1)
    products = {
        "accumulate_state": signs * (weighted + 1),
        "apply_state": weighted + signs,
        "map_grad": weighted + signs,
        "project_grad": 2,
    }[name]
    return products * square * (6 if "-fp32-" in job.name else 1)  # three products at half the rate


def dealt_out(job: CompileJob, shape: Shape) -> tuple[configs.Work, int]:
    """Return the work items of a kernel, and the number of programs for each."""
    programs = shape.heads * halves(job)
    sm_count, partials = GPUS[job.capability].sm_count, job.launch.kernel.__name__ in PARTIALS
    return configs.deal_out(job.launch.tile, shape.tokens, shape.batch, None, programs, sm_count, partials), programs


def utilisation(job: CompileJob, code: Code, shape: Shape) -> float:
    """Return the share of its time in which a grid keeps all SMs busy, if programs of one length run in waves."""
    if job.launch.kernel.__name__ == "rotate_rows":
        return 1.0  # one tile per program, so there are thousands of programs
    work, programs = dealt_out(job, shape)
    slots = code.resident * GPUS[job.capability].sm_count
    waves = -(-work.items * programs // slots)
    return shape.batch * shape.tokens * programs / (waves * slots * work.rows)


def seconds(job: CompileJob, code: Code, shape: Shape) -> float:
    """Return the seconds of one launch, including those for writing and reading its partial sums."""
    gpu, kernel = GPUS[job.capability], job.launch.kernel.__name__
    rows = shape.batch * shape.tokens * shape.heads / gpu.sm_count  # per SM
    walk = rows * clocks(job, code).total / gpu.clock / utilisation(job, code, shape)
    if kernel not in ("accumulate_state", "project_grad"):
        return walk
    work, programs = dealt_out(job, shape)
    return walk + 2 * 4 * work.items * programs * job.launch.constexprs["WIDTH"] ** 2 / gpu.bandwidth


class Op(NamedTuple):
    passes: tuple[str, ...]  # kernel and use, as in the names of jobs
    prepares: int  # launches of prepare_state
    sums: int  # launches that sum partial results: reduce_state, and PyTorch's sum for a weight
    flops: int  # least flops for a row of a head, in units of D^2
    rows: int  # least number of rows to move


FORWARD = Op(("accumulate_state-plain", "apply_state-normalize"), 1, 1, 12, 4)
OPS = {
    "forward": FORWARD,
    "forward, RoPE": FORWARD._replace(
        passes=("rotate_rows-cos", "accumulate_state-plain", "apply_state-normalize_cos"),
    ),
    "forward + backward": Op(
        (
            *FORWARD.passes, "map_grad-normalize_factors", "project_grad-plain", "accumulate_state-factors",
            "apply_state-plain", "map_grad-keys", "project_grad-plain",
        ), 2, 4, 40, 11,
    ),
}  # fmt: skip


def kernels(head_dim: int = 128) -> dict[str, tuple[CompileJob, Code]]:
    """Compile every pass of the ops for hedgehog in bf16 on sm_90."""
    made = {}
    for options in ((), ("rope",)):
        for job in compile_jobs(head_dim, "hedgehog", torch.bfloat16, 90, options=options):
            made.setdefault(f"{job.launch.kernel.__name__}-{job.name.rpartition('-')[2]}", job)
    wanted = dict.fromkeys(name for op in OPS.values() for name in op.passes)
    return {name: (made[name], read(made[name])) for name in wanted}


def predict(op: Op, compiled: dict[str, tuple[CompileJob, Code]], shape: Shape) -> tuple[float, float]:
    """Return the seconds of an op and its limit, which is the least work at full rate and nothing else."""
    gpu, rows = GPUS[90], shape.batch * shape.tokens * shape.heads
    launches = len(op.passes) + op.prepares + op.sums
    total = sum(seconds(*compiled[name], shape) for name in op.passes) + op.prepares * PREPARE + launches * GAP
    moved = op.rows * 2 * shape.head_dim * rows
    return total, max(op.flops * shape.head_dim**2 * rows / gpu.flops, moved / gpu.bandwidth)
