"""Compare models in few steps: `python -m benchmarks.few_steps --world small --seeds 3`.

This converts the world's teacher as in the ablations' default run, distils it to 1, 2 and 4 steps, and compares the
results with the teacher and the converted model in the same number of steps. Every model adds a row to
OUTPUT_DIR/rows.json, so that interrupted work continues where it stopped. At the end the rows are copied to
benchmarks/results/few_steps, and docs/results/few_steps.md is written from all results.

small takes about an hour on two CPU cores; middle and large need a GPU and a teacher from
`python -m linvideo.demo.train_teacher --world middle`.
"""

import argparse

from benchmarks import worlds
from benchmarks.few_steps import few_steps_report, suite
from benchmarks.few_steps.few_steps_bench import SCALES


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.few_steps", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--world", choices=SCALES, default="small", help="default: small")
    worlds.add_options(parser, "few-steps", "a result file and tables")
    args = parser.parse_args(arguments)
    worlds.check_options(parser, args, "few-steps", args.world)
    scale = SCALES[args.world]
    try:
        rows = suite.run(scale, args.seeds, args.teacher, args.output_dir, args.processes)
    except ValueError as error:
        parser.error(str(error))
    if not args.no_report:
        path = few_steps_report.save(rows, args.world, scale)
        print(
            "\n".join(
                f"wrote {x}" for x in [path, few_steps_report.write(few_steps_report.FOLDER, few_steps_report.DOCS)]
            )
        )


if __name__ == "__main__":
    main()
