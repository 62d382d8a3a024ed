"""Run ablations of the recipe: `python -m benchmarks.ablations --suite small --seeds 3`.

Every run adds a row to OUTPUT_DIR/rows.json, so that an interrupted suite continues where it stopped, and small-all
continues small. At the end the rows are copied to benchmarks/results/ablations, and docs/results/ablations.md is
written from all results.

small takes about an hour on two CPU cores; middle and large need a GPU and a teacher from
`python -m linvideo.demo.train_teacher --world middle`.
"""

import argparse

from benchmarks import worlds
from benchmarks.ablations import ablations_report, suite
from benchmarks.ablations.settings import GROUPS, SETTINGS, SUITES


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.ablations", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=SUITES, default="small", help="default: small")
    parser.add_argument(
        "--groups",
        nargs="+",
        choices=GROUPS,
        metavar="GROUP",
        help=f"groups of settings to run (default: all): {', '.join(GROUPS)}",
    )
    worlds.add_options(parser, "ablations", "a result file, tables and plots")
    args = parser.parse_args(arguments)
    scale = SUITES[args.suite]
    worlds.check_options(parser, args, "ablations", scale.world)
    settings = [name for name in scale.settings if not args.groups or set(args.groups) & set(SETTINGS[name].groups)]
    try:
        rows = suite.run(scale, settings, args.seeds, args.teacher, args.output_dir, args.processes)
    except ValueError as error:
        parser.error(str(error))
    if not args.no_report:
        path = ablations_report.save(rows, args.suite, scale)
        print(
            "\n".join(
                f"wrote {x}" for x in [path, *ablations_report.write(ablations_report.FOLDER, ablations_report.DOCS)]
            )
        )


if __name__ == "__main__":
    main()
