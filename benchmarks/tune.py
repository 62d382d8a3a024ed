"""Search tiles for the kernels and print rows for the table: `python -m benchmarks.tune --kernel apply_state-o [...]`.

This compiles every candidate ahead of time and drops those that fail a static gate. On a CUDA device the others are
compared with the shipped tile and timed inside the pass that launches the kernel. Without one they are ranked by the
clocks that a model predicts (clock_model.py). Shipped code never tunes: rows are added by hand to
linvideo_kernels/linear_attn/configs.py.
"""

import argparse
import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from linvideo_kernels.linear_attn import configs, passes
from linvideo_kernels.linear_attn.aot import OPTIONS, compile_jobs
from linvideo_kernels.linear_attn.launch import target_of

from benchmarks import clock_model, gate_tables, measure, static_gates
from benchmarks.measure import attempt, dtype_name, reason
from benchmarks.shapes import SHAPES
from linvideo.evaluation.latency import time_call


class Use(NamedTuple):
    """One of the uses of a kernel, each of which has its own tile in the table."""

    kernel: str
    ran_by: str  # function of passes.py that launches it
    jobs: str  # pattern for the end of its jobs' names
    options: frozenset = frozenset()  # options of configs.tile


USES = {
    "accumulate_state-forward": Use("accumulate_state", "state", r"plain"),
    "accumulate_state-backward": Use("accumulate_state", "apply_backward", r"factors", frozenset({"factors"})),
    "apply_state-o": Use("apply_state", "apply", r"normalize\w*"),
    "apply_state-dv": Use("apply_state", "state_backward", r"plain"),
    "map_grad-queries": Use("map_grad", "apply_backward", r"normalize\w*"),
    "map_grad-keys": Use("map_grad", "state_backward", r"keys\w*", frozenset({"keys"})),
    "project_grad": Use("project_grad", "apply_backward", r"\w+"),
}
# Tiles that might be faster than those of the table, for hedgehog on sm_90, D = 128, 16 bits.
RIVALS = {
    "accumulate_state-forward": (
        configs.Tile(64, 4, 1, resident=2, tma=True),
        configs.Tile(64, 4, 1, resident=2, tma=True, value_first=False),
        configs.Tile(64, 4, 3, tma=True),
    ),
    "accumulate_state-backward": (configs.Tile(64, 4, 3, tma=True), configs.Tile(128, 8, 2, tma=True, z_by_dot=False)),
    "apply_state-o": (configs.Tile(128, 8, 3, tma=True), configs.Tile(64, 4, 1, resident=2)),
    "map_grad-queries": (configs.Tile(64, 8, 2), configs.Tile(64, 8, 4)),
    "map_grad-keys": (configs.Tile(64, 8, 2), configs.Tile(128, 8, 2)),
    "project_grad": (configs.Tile(64, 4, 1, resident=2), configs.Tile(64, 8, 3)),
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@contextmanager
def using(kernel: str, tile: configs.Tile) -> Iterator[None]:
    """Replace the table's tile for one kernel inside the block."""
    table = configs.tile
    configs.tile = lambda name, *args, **kwargs: tile if name == kernel else table(name, *args, **kwargs)
    try:
        yield
    finally:
        configs.tile = table


def candidates(kernel: str, capability: int, options: list[str]) -> list[configs.Tile]:
    """Return all tiles that the kernel can have on an architecture."""
    unfit = configs.NO_DESCRIPTOR
    descriptors = capability >= 90 and kernel in unfit and not unfit[kernel] & set(options)
    axes = {
        "block": (16, 32, 64, 128) if capability not in (90, 100) else (64, 128),
        "warps": (4, 8),
        "stages": (1, 2, 3),
        "keeps": (True, False) if kernel in ("apply_state", "map_grad") else (True,),
        "tma": (False, True) if descriptors else (False,),
        "value_first": (True, False) if kernel == "accumulate_state" else (True,),
        "z_by_dot": (True, False) if kernel == "accumulate_state" and capability // 10 == 9 else (True,),
    }
    return [configs.Tile(**dict(zip(axes, row, strict=True))) for row in itertools.product(*axes.values())]


def compiled(use: Use, tiles, compile_options: dict) -> list[tuple[configs.Tile, float]]:
    """Return the tiles that pass the gates with their predicted clocks per row and head, the fastest first.

    `resident` of each tile is filled in.
    """
    jobs, owners = [], []
    for tile in tiles:
        with using(use.kernel, tile):
            made = [job for job in compile_jobs(**compile_options) if job.launch.kernel.__name__ == use.kernel]
        made = [job for job in made if re.fullmatch(use.jobs, job.name.rpartition("-")[2])]
        jobs, owners = jobs + made, owners + [tile] * len(made)
    results = list(static_gates.check_all(jobs))
    good = []
    for tile in tiles:
        mine = [(job, *result) for owner, job, result in zip(owners, jobs, results, strict=True) if owner == tile]
        if any(code is None for _, code, _ in mine):
            continue
        if not all(static_gates.excused(gate, job.name) for job, _, found in mine for gate in found):
            continue
        tile = tile._replace(resident=min(code.resident for _, code, _ in mine))
        good.append((tile, max(clock_model.clocks(job, code).total for job, code, _ in mine)))
    return sorted(good, key=lambda row: row[1])


def calls(shape, dtype: torch.dtype, feature_map: str, precision: str, device: str = "cuda") -> dict:
    """Return the four passes at a shape, on random rows, without rope and mix, for which there are only the gates."""
    batch, length, heads, dim, *_ = shape
    torch.manual_seed(0)
    q, k, v, do = (torch.randn(batch, length, heads, dim, device=device, dtype=dtype) for _ in range(4))
    weight = None
    if configs.signs(feature_map) == 2:
        weight = (torch.eye(dim, device=device) + 0.02 * torch.randn(heads, dim, dim, device=device)).to(dtype)
    keys, settings = (weight, None, None, None), (feature_map, 1.0, True, 1e-6, precision)
    state, z, _ = passes.state(k, v, *keys, feature_map, precision, False)
    dstate, dz = torch.randn_like(state), torch.randn_like(z)
    rest = (weight, None, None, None, None)
    _, _, _, *prepared = passes.apply(q, state, z, *rest, *settings, True)
    return {
        "state": lambda: passes.state(k, v, *keys, feature_map, precision, False),
        "state_backward": lambda: passes.state_backward(dstate, dz, k, v, *keys, state, z, feature_map, precision),
        "apply": lambda: passes.apply(q, state, z, *rest, *settings, False),
        "apply_backward": lambda: passes.apply_backward(do, q, z, *rest, prepared, *settings),
    }


def difference(a, b) -> torch.Tensor:
    """Return the largest relative difference between two tuples of results; NaN if a result has one."""
    pairs = [(x.double(), y.double()) for x, y in zip(a, b, strict=True) if x is not None]
    return torch.stack([(x - y).norm() / y.norm().clamp(min=1e-300) for x, y in pairs]).max()


def rows_of(shape_name: str, dtype: torch.dtype, device: str, attempt: Callable = attempt) -> Iterator[dict]:
    """Yield the rows of the suite "tile": the main kernels of hedgehog with the table's tile and with RIVALS."""
    made = calls(SHAPES[shape_name], dtype, "hedgehog", "ieee", device)
    capability = target_of(torch.empty(0, device=device)).capability
    for name, rivals in RIVALS.items():
        use = USES[name]
        shipped = configs.tile(use.kernel, SHAPES[shape_name].head_dim, dtype, capability, "hedgehog", use.options)
        expected = made[use.ran_by]()
        for tile in dict.fromkeys((shipped, *rivals)):
            row = {"suite": "tile", "shape": shape_name, "dtype": dtype_name(dtype), "kernel": name}
            row |= {"tile": gate_tables.tile_name(tile), "shipped": tile == shipped}
            yield attempt(row, lambda u=use, t=tile, e=expected: time_tile(u, t, made, e, device, measure.SECONDS / 2))


def time_tile(
    use: Use, tile: configs.Tile, made: dict, expected: tuple, device: str = "cuda", seconds: float = 0.3
) -> dict:
    """Time a tile.

    Returns:
        "ms": Times of the function that launches the kernel.
        "difference": Largest relative difference of its results from `expected`.
    """
    call = made[use.ran_by]
    with using(use.kernel, tile):
        return {"ms": list(time_call(call, device, seconds)), "difference": difference(call(), expected).item()}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--kernel", nargs="+", choices=USES, default=list(USES), help="kernels to search tiles for (default: all)"
    )
    parser.add_argument(
        "--top", type=int, help="number of tiles to time per kernel, those with the fewest clocks (default: all)"
    )
    parser.add_argument("--head_dim", type=int, default=128, help="size of a head (default: %(default)s)")
    parser.add_argument("--feature_map", default="hedgehog", choices=static_gates.MAPS[:-1], help="default: hedgehog")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: bfloat16")
    parser.add_argument(
        "--arch",
        choices=[f"sm_{a}" for a in clock_model.GPUS],
        help="architecture to compile for (default: this device's)",
    )
    parser.add_argument("--options", nargs="*", choices=OPTIONS, default=[], help="options of the op to compile for")
    parser.add_argument("--fp32_precision", choices=["ieee", "tf32x3"], default="ieee", help="default: ieee")
    parser.add_argument(
        "--shape",
        choices=SHAPES,
        default="wan2.1-1.3b-480p",
        help="attention shape to time on a GPU (default: %(default)s)",
    )
    return parser


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    here = target_of(torch.empty(0, device="cuda")).capability if torch.cuda.is_available() else None
    capability = int(args.arch.removeprefix("sm_")) if args.arch else here
    if capability is None:
        parser.error("expected --arch, because there is no CUDA device to take it from")
    if capability not in clock_model.GPUS:
        parser.error(
            f"expected a GPU of {', '.join(map(configs.arch, clock_model.GPUS))}, got {configs.arch(capability)}"
        )
    dtype = DTYPES[args.dtype]
    for name in args.kernel:
        search(name, args, dtype, capability, timed=capability == here)


def search(name: str, args: argparse.Namespace, dtype: torch.dtype, capability: int, timed: bool) -> None:
    """Print the tiles that pass, and the times of the best of them."""
    use = USES[name]
    good = compiled(
        use,
        candidates(use.kernel, capability, args.options),
        {"head_dim": args.head_dim, "feature_map": args.feature_map, "dtype": dtype, "capability": capability,
         "options": tuple(args.options), "precision": args.fp32_precision},
    )  # fmt: skip
    options = use.options | {*args.options, *({"tf32x3"} & {args.fp32_precision})}
    shipped = configs.tile(use.kernel, args.head_dim, dtype, capability, args.feature_map, options)
    print(f"{name}: {len(good)} tiles pass the gates; predicted clocks per row and head")
    for tile, cost in good:
        mark = "  <- shipped" if tile._replace(resident=0) == shipped._replace(resident=0) else ""
        print(f"  {cost:6.1f}  {tile}{mark}")
    if not timed:
        return
    batch, length, heads, *_ = SHAPES[args.shape]
    made = calls((batch, length, heads, args.head_dim), dtype, args.feature_map, args.fp32_precision)
    expected = made[use.ran_by]()
    print(f"milliseconds of passes.{use.ran_by} at {args.shape} (median), difference from shipped")
    for tile in [shipped, *(tile for tile, _ in good[: args.top])]:
        try:
            found = time_tile(use, tile, made, expected)
        except Exception as error:  # a tile that doesn't launch shouldn't end the search
            print(f"  {reason(error)}  {tile}", flush=True)
            continue
        print(f"  {found['ms'][0]:8.3f}  {found['difference']:.1e}  {tile}", flush=True)


if __name__ == "__main__":
    main()
