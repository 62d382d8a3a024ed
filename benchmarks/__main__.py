"""Measure on this device: `python -m benchmarks [--suite op,block,model,train] [--part 1/2]`, and write the report.

Each suite gets a new file in benchmarks/results, and each row is written as soon as it is measured, so a run that is
cut short loses nothing. On a CPU only the op suite runs, at small shapes; the other suites, and the shapes that matter,
need a CUDA GPU. Estimated for an H100, op takes half an hour, block and model together 25 minutes, and train 5 minutes;
--part and --time_limit split the work.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks import measure, op, report, results, tables
from benchmarks.peers import PEERS, named
from benchmarks.shapes import SHAPES, TINY, TINY_SHAPE, WAN

SUITES = ("op", "block", "model", "train")
Job = tuple[str, Callable[[], Iterator[dict]]]  # label for the log, function that yields the rows


def jobs(
    suites: list[str],
    names: list[str] | None,
    dtype: torch.dtype,
    device: str,
    tiny: bool,
    peers: list[str] | None = None,
) -> list[Job]:
    """Return one job for each shape of the op suite, and for each model of the others one eager and one compiled."""
    made: list[Job] = []
    if "op" in suites:
        shapes = [TINY_SHAPE] if tiny else names or op.default_shapes(device)
        made += [(f"op {n}", lambda n=n: op.rows_of(n, dtype, device, peers)) for n in shapes if n in SHAPES]
    models = {"tiny": TINY} if tiny else {name: wan for name, wan in WAN.items() if not names or name in names}
    if parts := set(suites) & {"block", "model"}:
        from benchmarks import wan as blocks

        label = "+".join(sorted(parts))
        for name, model in models.items():
            for compiled in (False, True):
                arguments = (name, parts, compiled, device, dtype, model)
                made.append((f"{label} {name}{', compiled' * compiled}", lambda a=arguments: blocks.rows_of(*a)))
    if "train" in suites:
        from benchmarks import train_steps

        chosen = {name: wan for name, wan in models.items() if tiny or names or name == "1.3b-480p"}
        for name, model in chosen.items():
            made.append((f"train {name}", lambda n=name, m=model: train_steps.rows_of(n, device, dtype, m)))
    return made


def run(todo: list[Job], environment: dict, folder: Path, time_limit: float) -> list[Path]:
    """Run the jobs and return their files. No row is started after `time_limit` seconds."""
    files = {suite: results.ResultFile(environment, folder) for suite in SUITES}
    begun = time.monotonic()
    for number, (name, job) in enumerate(todo, 1):
        started, rows, why = time.monotonic(), job(), ""
        try:
            while time.monotonic() - begun <= time_limit and (row := next(rows, None)) is not None:
                files[row["suite"]].add(row)
        except Exception as error:  # for example a model that is too large for this GPU: the next one may fit
            why = f", ended by {measure.reason(error)}"
        print(f"[{number}/{len(todo)}] {name}: {time.monotonic() - started:.0f} s{why}", flush=True)
        if time.monotonic() - begun > time_limit:
            print(f"stopped at the time limit in: {', '.join(name for name, _ in todo[number - 1 :])}")
            break
    return [file.path for file in files.values() if file.path is not None]


def main(arguments: list[str] | None = None) -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", default="op", help=f"comma-separated list of {', '.join(SUITES)} (default: op)")
    parser.add_argument(
        "--shapes", nargs="+", choices=[*SHAPES, *WAN], help="shapes and models to measure (default: all)"
    )
    parser.add_argument("--peers", nargs="+", metavar="WORD", help="op: words; only peers with one in their name run")
    parser.add_argument("--part", default="1/1", help="i/n: the part of the work to do, to fit a time limit")
    dtypes = ["bfloat16", "float16", "float32"]
    parser.add_argument("--dtype", choices=dtypes, default="bfloat16" if cuda else "float32")
    parser.add_argument("--output_dir", type=Path, default=results.FOLDER, help="default: benchmarks/results")
    parser.add_argument("--time_limit", type=float, default=float("inf"), help="seconds after which no row is started")
    parser.add_argument("--no_report", action="store_true", help="write the results only, no tables and plots")
    parser.add_argument("--tiny", action="store_true", help="run each suite at one tiny shape, to see that it works")
    args = parser.parse_args(arguments)
    suites = args.suite.split(",")
    if unknown := sorted(set(suites) - set(SUITES)):
        parser.error(f"expected --suite to be a list of {', '.join(SUITES)}, got {', '.join(unknown)}")
    part, _, parts = args.part.partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        parser.error(f"expected --part i/n with 1 <= i <= n, got {args.part}")
    if not cuda and not args.tiny and set(suites) != {"op"}:
        parser.error(f"expected a CUDA GPU for --suite {args.suite}, found none; on a CPU only --suite op runs")
    if args.tiny:
        measure.SECONDS = 0.01
    dtype, device = getattr(torch, args.dtype), "cuda" if cuda else "cpu"
    if unmatched := [word for word in args.peers or () if not named([word])]:
        parser.error(
            f"expected --peers to be words that are in the names {', '.join(PEERS)}; got {', '.join(unmatched)}"
        )
    if args.peers and "op" not in suites:
        parser.error(f"expected --suite to include op, which --peers is for; got --suite {args.suite}")
    todo = jobs(suites, args.shapes, dtype, device, args.tiny, args.peers)[int(part) - 1 :: int(parts)]
    if not todo:
        parser.error("nothing to measure: --shapes and --part leave none of the work of --suite")
    environment = results.environment({args.dtype: measure.rates(device, dtype)})
    print(results.versions(environment))
    print(f"{environment['device']}: {environment['rates']}", flush=True)
    paths = run(todo, environment, args.output_dir, args.time_limit)
    print("\n".join(f"wrote {path}" for path in paths), flush=True)
    for document in map(results.read, paths):
        print("\n".join(tables.sections([(row, environment) for row in document["rows"]])))
    if not cuda:
        print("This was a CPU: whole models, and the shapes that matter, need a CUDA GPU.")
    if args.no_report:
        return
    own = [] if args.output_dir == results.FOLDER else [f"--results={args.output_dir}", f"--output={args.output_dir}"]
    report.main(own)


if __name__ == "__main__":
    main()
