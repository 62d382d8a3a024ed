"""`linvideo demo`."""

import argparse

from linvideo.commands.shared import add_device, add_output_dir, natural, positive

SUMMARY = "convert the embedded model, compare it with its teacher and write a report"
EXAMPLES = """
linvideo demo --output_dir demo
linvideo demo --output_dir demo --stages transfer,adm,distill
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    demo = parser.add_argument_group("what is made")
    what = "transfer, with adm or distill after a comma, or both; distill takes about five minutes more"
    demo.add_argument("--stages", default="transfer", help=what)
    demo.add_argument(
        "--videos",
        type=positive,
        default=48,
        help="number of videos of each model to judge; default: 48",
    )
    demo.add_argument("--seed", type=natural, default=0, help="seed of the training run; default: 0")
    add_device(parser.add_argument_group("where it runs"))
    add_output_dir(parser.add_argument_group("output"))


def run(args: argparse.Namespace) -> None:
    from linvideo.demo.make_demo import run_demo

    options = {"overwrite": args.overwrite, "device": args.device, "seed": args.seed, "videos": args.videos}
    run_demo(args.output_dir, stages=args.stages.split(","), **options)
