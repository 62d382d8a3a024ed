"""Run ablations of the recipe: `python -m benchmarks.ablations --suite small --seeds 3`.

Every run adds a row to OUTPUT_DIR/rows.json, so that an interrupted suite continues where it stopped, and small-all
continues small. At the end the rows are copied to benchmarks/results/ablations, and docs/results/ablations.md and
headroom.md are written from all results.

small takes about an hour on two CPU cores. headroom takes about 90 minutes for each teacher that leaves something to
gain, and has a folder for each; the commands that make the teachers are in docs/demo.md. middle and large need a GPU
and a teacher from `python -m linvideo.demo.train_teacher --world middle`.
"""

import argparse
from pathlib import Path

from benchmarks import worlds
from benchmarks.ablations import ablations_report, headroom_report, suite
from benchmarks.ablations.settings import GROUPS, SETTINGS, SUITES, in_groups
from benchmarks.results import slug
from linvideo.demo.train_teacher import METRICS
from linvideo.models import load_pipeline
from linvideo.trajectories.atomic_files import read_json
from linvideo.trajectories.fingerprint import fingerprint


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
    described = None
    if scale.headroom:
        try:
            described = describe_teacher(args.teacher)
        except ValueError as error:
            parser.error(str(error))
        if args.output_dir is None:
            guided = "" if scale.guidance_scale is None else "unguided-"
            args.output_dir = Path("runs") / f"ablations-headroom-{guided}{slug(described['name'])}"
    worlds.check_options(parser, args, "ablations", scale.world)
    known = dict.fromkeys(group for name in scale.settings for group in SETTINGS[name].groups)
    groups = args.groups or known
    if not set(groups) <= set(known):
        parser.error(f"expected --groups of suite {args.suite}, which are {', '.join(known)}, got {', '.join(groups)}")
    chosen = in_groups(*groups)
    settings = [name for name in scale.settings if name in chosen]
    try:
        rows = suite.run(scale, settings, args.seeds, args.teacher, args.output_dir, args.processes)
    except ValueError as error:
        parser.error(str(error))
    if not args.no_report:
        written = [ablations_report.save(rows, args.suite, scale, described)]
        for report in (ablations_report, headroom_report):
            written += report.write(ablations_report.FOLDER, ablations_report.DOCS)
        print("\n".join(f"wrote {path}" for path in written))


def describe_teacher(folder: Path | None) -> dict:
    """Return what the results say of a teacher: its name, size, weights and the metrics from its training.

    Raises:
        ValueError: There is no folder, or train_teacher.py didn't write it.
    """
    if folder is None or not (folder / METRICS).is_file():
        raise ValueError(
            f"expected --teacher to be a folder from python -m linvideo.demo.train_teacher with {METRICS}, got {folder}"
        )
    transformer = load_pipeline(folder, text_encoder=None, vae=None).transformer
    size = sum(parameter.numel() for parameter in transformer.parameters())
    found = {"name": folder.resolve().name, "parameters": size, "weights": fingerprint(transformer)}
    return found | read_json(folder / METRICS)


if __name__ == "__main__":
    main()
