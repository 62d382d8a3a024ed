"""`linvideo plan`."""

import argparse

from linvideo.commands.shared import SETTINGS, add_config_options, number, positive, read_config

SUMMARY = "estimate the memory, disk space and pace of a training run before it starts"
EXAMPLES = """
linvideo plan wan2.1-14b --gpus 8 --gpu_memory 141
linvideo plan --config demo
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = "known name such as wan2.1-14b or wan2.1-i2v-14b, or folder or Hub id of a stock pipeline;\n"
    add_config_options(parser, f"{what}default: the config's pretrained_model_name_or_path")
    parser.description += "\n\nTakes the options of linvideo train as well (see linvideo train --help)."
    gpus = parser.add_argument_group("GPUs")
    gpus.add_argument("--gpus", type=positive, metavar="N", default=1, help="number of GPUs; default: 1")
    what = "memory of one GPU, in GB of 10^9 bytes; default: 80"
    gpus.add_argument("--gpu_memory", type=number, metavar="GB", default=80.0, help=what)
    what = "measured time of one forward of the teacher with one video on one GPU; with it, the plan includes hours"
    gpus.add_argument("--forward_seconds", type=number, metavar="SECONDS", help=what)
    run = parser.add_argument_group("training run")
    for name in ("height", "width", "num_frames"):
        metavar, what = SETTINGS[name]
        run.add_argument(f"--{name}", type=positive, metavar=metavar, help=f"{what}; default: the config's")
    run.add_argument("--critic", action="store_true", help="include the fake-score network of linvideo distill")
    parser.add_argument_group("output").add_argument("--json", action="store_true", help="print the plan as JSON")


def run(args: argparse.Namespace) -> None:
    import json

    from linvideo.planning.plan import make_plan
    from linvideo.planning.plan_text import text
    from linvideo.planning.sizes import read_sizes
    from linvideo.transfer import TrainConfig

    video = {f"--trajectories.{name}": getattr(args, name) for name in ("height", "width", "num_frames")}
    video = [word for name, value in video.items() if value is not None for word in (name, str(value))]
    # nothing is trained here: any folder will do, and this machine needs no GPU
    config = read_config(args, TrainConfig, first=["--output_dir", "run"], last=[*video, "--device", "cpu"])
    if config.pretrained_model_name_or_path is None:
        raise ValueError("plan needs MODEL (a known name, a pipeline folder or a Hub id), but got none")
    sizes = read_sizes(config.pretrained_model_name_or_path, config.trajectories)
    result = make_plan(sizes, config, args.gpus, args.gpu_memory, args.critic, args.forward_seconds)
    print(json.dumps(result, indent=2) if args.json else text(result))
