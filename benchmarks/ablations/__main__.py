"""Ablations of the recipe: `python -m benchmarks.ablations --suite small --seeds 3`.

Every run leaves a row in OUTPUT_DIR/rows.json: a suite that was interrupted goes on where it stopped, and small-all
continues small. At the end the rows go to benchmarks/results/ablations and docs/ablations.md is made of all results.

small takes about an hour on two CPU cores; middle and large need a GPU and a teacher of
`python -m linvideo.demo.train_teacher --world middle`.
"""

import argparse
import os
from pathlib import Path

import torch

from benchmarks.ablations import report, suite
from benchmarks.ablations.settings import GROUPS, SETTINGS, SUITES
from linvideo.demo.teacher import FOLDER as SMALL_TEACHER


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.ablations", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=SUITES, default="small")
    parser.add_argument("--seeds", type=int, default=3, help="how many; the seeds are 0, 1, ...")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, metavar="GROUP", help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--teacher", type=Path, help="pipeline folder; the small world's is part of linvideo")
    parser.add_argument("--output_dir", type=Path, help="default: runs/ablations-WORLD")
    parser.add_argument("--processes", type=int, help="default: one a CPU core, or one for the GPU")
    parser.add_argument("--no_report", action="store_true", help="rows only: no result file, tables and plots")
    args = parser.parse_args(arguments)
    scale = SUITES[args.suite]
    cuda = torch.cuda.is_available()
    if args.seeds < 1:
        parser.error(f"expected --seeds of at least 1, got {args.seeds}")
    if args.processes is not None and args.processes < 1:
        parser.error(f"expected --processes of at least 1, got {args.processes}")
    if args.teacher is None and scale.world != "small":
        parser.error(f"--suite {args.suite} needs --teacher, made by linvideo.demo.train_teacher --world {scale.world}")
    settings = [name for name in scale.settings if not args.groups or set(args.groups) & set(SETTINGS[name].groups)]
    folder = args.output_dir or Path("runs") / f"ablations-{scale.world}"
    processes = args.processes or (1 if cuda else os.cpu_count() or 1)
    if not cuda:
        torch.set_num_threads(1)  # as in the runs: the result names it
    try:
        rows = suite.run(scale, settings, args.seeds, args.teacher or SMALL_TEACHER, folder, processes)
    except ValueError as error:
        parser.error(str(error))
    if not args.no_report:
        path = report.save(rows, args.suite, scale)
        print("\n".join(f"wrote {x}" for x in [path, *report.write(report.FOLDER, report.DOCS)]))


if __name__ == "__main__":
    main()
