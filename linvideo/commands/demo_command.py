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
    what = "transfer,adm,distill or a part of it with transfer; distill takes about five minutes more"
    demo.add_argument("--stages", default="transfer", help=what)
    demo.add_argument("--videos", type=positive, default=48, help="videos per model that the metrics are taken over")
    demo.add_argument("--seed", type=natural, default=0, help="of the training run")
    add_device(parser.add_argument_group("where it runs"))
    add_output_dir(parser.add_argument_group("output"))


def run(args: argparse.Namespace) -> None:
    from linvideo.demo.make_demo import run_demo

    options = {"overwrite": args.overwrite, "device": args.device, "seed": args.seed, "videos": args.videos}
    run_demo(args.output_dir, stages=args.stages.split(","), **options)
