"""Few steps: `python -m benchmarks.few_steps --world small --seeds 3`.

Converts the world's teacher as the ablations' default run does, distils it to 1, 2 and 4 steps, and sets the results
beside teacher and converted model at as many steps. Every model leaves a row in OUTPUT_DIR/rows.json: work that was
interrupted goes on where it stopped. At the end the rows go to benchmarks/results/few_steps and docs/few_steps.md is
made of all results.

small takes about an hour on two CPU cores; middle and large need a GPU and a teacher of
`python -m linvideo.demo.train_teacher --world middle`.
"""

import argparse
import os
from pathlib import Path

import torch

from benchmarks.few_steps import report, suite
from benchmarks.few_steps.run import SCALES
from linvideo.demo.teacher import FOLDER as SMALL_TEACHER


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.few_steps", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--world", choices=SCALES, default="small")
    parser.add_argument("--seeds", type=int, default=3, help="how many; the seeds are 0, 1, ...")
    parser.add_argument("--teacher", type=Path, help="pipeline folder; the small world's is part of linvideo")
    parser.add_argument("--output_dir", type=Path, help="default: runs/few-steps-WORLD")
    parser.add_argument("--processes", type=int, help="default: one a CPU core, or one for the GPU")
    parser.add_argument("--no_report", action="store_true", help="rows only: no result file and tables")
    args = parser.parse_args(arguments)
    cuda = torch.cuda.is_available()
    for name in ("seeds", "processes"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"expected --{name} of at least 1, got {value}")
    if args.teacher is None and args.world != "small":
        parser.error(f"--world {args.world} needs --teacher, made by linvideo.demo.train_teacher --world {args.world}")
    folder = args.output_dir or Path("runs") / f"few-steps-{args.world}"
    processes = args.processes or (1 if cuda else os.cpu_count() or 1)
    if not cuda:
        torch.set_num_threads(1)  # as in the runs: the result names it
    scale = SCALES[args.world]
    try:
        rows = suite.run(scale, args.seeds, args.teacher or SMALL_TEACHER, folder, processes)
    except ValueError as error:
        parser.error(str(error))
    if not args.no_report:
        path = report.save(rows, args.world, scale)
        print("\n".join(f"wrote {x}" for x in [path, report.write(report.FOLDER, report.DOCS)]))


if __name__ == "__main__":
    main()
