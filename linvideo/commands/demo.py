"""`linvideo demo`."""

import argparse

from linvideo.commands.shared import add_device, add_output_dir, natural, positive

SUMMARY = "convert the embedded model, compare it with its teacher and write a report"
EXAMPLES = """
linvideo demo --output_dir demo
linvideo demo --output_dir demo --stages transfer,adm,distill
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_output_dir(parser)
    add_device(parser)
    parser.add_argument("--seed", type=natural, default=0)
    parser.add_argument("--videos", type=positive, default=48, help="videos per model that the metrics are taken over")
    what = "transfer,adm,distill or a part of it with transfer; distill takes about five minutes more"
    parser.add_argument("--stages", default="transfer", help=what)


def run(args: argparse.Namespace) -> None:
    from linvideo.demo.make_demo import run_demo

    options = {"overwrite": args.overwrite, "device": args.device, "seed": args.seed, "videos": args.videos}
    run_demo(args.output_dir, stages=args.stages.split(","), **options)
