"""`linvideo collect`."""

import argparse

from linvideo.commands.shared import TEACHER, add_config_options, announce_run, read_training_config

SUMMARY = "sample the trajectories of a run, or one worker's share of them, without training"
EXAMPLES = """
linvideo collect --config demo --output_dir run --worker 0/4
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_options(parser, TEACHER)
    parser.description += "\n\nTakes the options of linvideo train as well (see linvideo train --help)."
    part = parser.add_argument_group("division among workers")
    what = "this worker's number and the number of workers: 0/4 to 3/4 for four of them; default: 0/1, all of the work"
    part.add_argument("--worker", metavar="NUMBER/COUNT", default="0/1", help=what)


def run(args: argparse.Namespace) -> None:
    from linvideo.transfer import TrainConfig, collect

    number, _, count = args.worker.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise ValueError(f"--worker must be number/count, with a number from 0 to count - 1, got {args.worker}")
    # resumes because the folder is not empty once another worker has begun
    config = read_training_config(args, TrainConfig, last=["--resume_from_checkpoint", "latest"])
    announce_run(config, {})
    store = collect(config, int(number), int(count))
    missing = len(store.missing_shards())
    print(
        f"{store.num_shards - missing} of {store.num_shards} shards are in {store.path}; to train on them, run linvideo"
        " train with the same options and --resume_from_checkpoint latest"
    )
