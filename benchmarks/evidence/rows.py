"""The measurements of `make evidence`, in a process of their own: if the GPU's context is lost, another one continues.

`python -m benchmarks.evidence.rows --seconds S --output_dir DIR` starts no row after S seconds. Rows that DIR already
has from a run on the same card are not measured again.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import launches, measure, op, results
from benchmarks.peers import OURS, WINDOW
from benchmarks.shapes import INTERPRETED_SHAPE, TINY, TINY_SHAPE, TOKENS, WAN
from linvideo.ops.library import uses_kernels

TILES = "tiles"
LOST = 3  # exit status of a process that can't use the GPU any more
SMALL, LARGE = "wan2.1-1.3b-480p", "wan2.1-14b-720p"
ROPE = f"{OURS}, RoPE"
HEADLINE = ["linvideo hedgehog", "linvideo window", "linvideo elu", "SDPA flash", "SDPA cuDNN", "flash-attn"]
REST = ["relu", "softmax map", "identity", "Flex", "SLA", "Sage", "flash_bla"]


class Part(NamedTuple):
    name: str
    seconds: float  # time after which none of its rows is started
    rows: Callable[[], Iterator[dict]]


def parts(device: str, dtype: torch.dtype, dry_run: bool, attempt: Callable = measure.attempt) -> list[Part]:
    """Return what is measured, the most valuable first; with dry_run everything is at tiny sizes."""
    small, large = (TINY_SHAPE, TINY_SHAPE) if dry_run else (SMALL, LARGE)
    sweep = [TINY_SHAPE] if dry_run else list(TOKENS)

    def ops(shapes: list[str], words: list[str]) -> Iterator[dict]:
        return itertools.chain.from_iterable(op.rows_of(name, dtype, device, words, attempt) for name in shapes)

    def tiles() -> Iterator[dict]:
        from benchmarks import tune

        return tune.rows_of(INTERPRETED_SHAPE if dry_run else small, dtype, device, attempt)

    def models() -> Iterator[dict]:
        from benchmarks import wan

        # Whole forwards of the large model would take a minute each; they can be composed of its blocks.
        chosen = {"1.3b-480p": WAN["1.3b-480p"], "14b-720p": WAN["14b-720p"]._replace(linear_layers=())}
        for name, model in ({"tiny": TINY} if dry_run else chosen).items():
            for compiled in (False, True):
                yield from wan.rows_of(name, {"block", "model"}, compiled, device, dtype, model, attempt)

    def training() -> Iterator[dict]:
        from benchmarks import train_steps

        name, model = ("tiny", TINY) if dry_run else ("1.3b-480p", WAN["1.3b-480p"])
        return train_steps.rows_of(name, device, dtype, model, attempt)

    runs_kernels = uses_kernels(torch.empty(0, device=device))  # true on a CPU only in Triton's interpreter
    return [
        Part("headline", 120, lambda: ops([small, large], HEADLINE)),
        Part("kernel by kernel", 30, lambda: launches.rows_of(small, dtype, device, (OURS, ROPE, WINDOW))),
        Part("eager and compiled", 60, lambda: ops([small, large], ["eager", "compiled"])),
        *([Part(TILES, 90, tiles)] if runs_kernels else []),
        Part("blocks and models", 150, models),
        Part("training", 90, training),
        Part("over the number of tokens", 60, lambda: ops(sweep, [OURS, WINDOW, "SDPA"])),
        Part("other maps and peers", 60, lambda: ops([small], REST)),
        Part("fla", 120, lambda: ops([small], ["fla "])),
    ]


def run(seconds: float, folder: Path, dry_run: bool, skip_absent: bool, only: str | None = None) -> int:
    """Measure what is missing in `folder` and return the exit status.

    Args:
        seconds: Time after which no row is started.
        folder: Folder with the results of earlier runs, to which this one adds a file.
        dry_run: Whether to measure at tiny sizes on the CPU.
        skip_absent: Whether to skip what failed in an earlier run.
        only: Name of the only part to measure. None means all.
    """
    begun = time.monotonic()
    device = "cpu" if dry_run else "cuda"
    dtype = torch.float32 if dry_run else torch.bfloat16
    environment = results.environment({measure.dtype_name(dtype): measure.rates(device, dtype)})
    print(f"{environment['device']}: {environment['rates']}", flush=True)
    known = known_rows(folder, environment["device"], skip_absent)
    file = results.ResultFile(environment, folder, "evidence")

    def attempt(row: dict, action: Callable[[], dict]) -> dict:
        return known.get(results.key(row)) or measure.attempt(row, action)

    for part in parts(device, dtype, dry_run, attempt):
        if only not in (None, part.name):
            continue
        end = min(time.monotonic() + part.seconds, begun + seconds)
        print(f"{part.name}: {max(0.0, end - time.monotonic()):.0f} s at most", flush=True)
        try:
            rows = part.rows()
            while time.monotonic() < end and (row := next(rows, None)) is not None:
                found = known.get(results.key(row), {})
                if found != row and "ms" not in found:
                    file.add(row)
                    known[results.key(row)] = row
                    print(f"  {describe(row)}", flush=True)
                if lost(device):
                    return LOST
        except Exception as error:  # for example a missing package, or a model that is too large
            print(f"  ended by {measure.reason(error)}", flush=True)
            if lost(device):
                return LOST
        finally:
            torch._dynamo.reset()
            if device == "cuda":
                torch.cuda.empty_cache()
    return 0


def known_rows(folder: Path, device: str, with_absent: bool) -> dict[tuple, dict]:
    """Return the rows of earlier runs on this device, by results.key; failed ones only if with_absent is set."""
    documents = [d for d in results.load(folder) if d["environment"]["device"] == device]
    rows = [row for document in documents for row in document["rows"]]
    return {results.key(row): row for row in rows if "ms" in row or with_absent}


def lost(device: str) -> bool:
    """Whether this process can't use the GPU any more, for example after an illegal memory access."""
    if device == "cpu":
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"  the GPU's context is lost: {measure.reason(error)}", flush=True)
        return True
    return False


def describe(row: dict) -> str:
    """Describe a row in one line."""
    name = " ".join(str(part) for part in results.key(row)[1:])
    if "absent" in row:
        return f"{name}: absent, {row['absent']}"
    host = f", host {row['host_ms']:.3f}" if "host_ms" in row else ""
    kernel = f" {row['kernel'][:60]}" if row["suite"] == "kernel" else ""
    return f"{row['suite']} {name}{kernel}: {' '.join(f'{ms:.4f}' for ms in row['ms'])} ms{host}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, required=True, help="time after which no row is started")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the results")
    parser.add_argument("--dry_run", action="store_true", help="measure at tiny sizes on the CPU")
    parser.add_argument("--only", metavar="PART", help="name of the only part to measure")
    parser.add_argument("--skip_absent", action="store_true", help="skip what failed in an earlier run")
    args = parser.parse_args()
    if args.dry_run:
        measure.SECONDS = 0.01
    sys.exit(run(args.seconds, args.output_dir, args.dry_run, args.skip_absent, args.only))


if __name__ == "__main__":
    main()
