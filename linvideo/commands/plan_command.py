"""`linvideo plan`."""

import argparse

from linvideo.commands.shared import add_config_options, number, positive, read_config

SUMMARY = "memory, disk and pace of a training run before it starts; takes linvideo train's options too"
EXAMPLES = """
linvideo plan wan2.1-14b --gpus 8 --gpu_memory 141
linvideo plan --config demo
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = "a known name such as wan2.1-14b or wan2.1-i2v-14b, a stock pipeline folder or a Hub id"
    add_config_options(parser, f"{what}; default: the config's")
    gpus = parser.add_argument_group("GPUs")
    gpus.add_argument("--gpus", type=positive, default=1, help="how many; default: 1")
    gpus.add_argument("--gpu_memory", type=number, default=80.0, help="of one GPU, in GB of 10^9 bytes; default: 80")
    gpus.add_argument("--forward_seconds", type=number, help="of the teacher with one video on one GPU, as measured")
    run = parser.add_argument_group("the run")
    for name in ("height", "width", "num_frames"):
        run.add_argument(f"--{name}", type=positive, help="of a video; default: the config's")
    run.add_argument("--critic", action="store_true", help="with a fake-score network, as linvideo distill has")
    parser.add_argument_group("output").add_argument("--json", action="store_true", help="print the plan as JSON")


def run(args: argparse.Namespace) -> None:
    import json

    from linvideo.planning.plan import make_plan
    from linvideo.planning.plan_text import text
    from linvideo.planning.sizes import read_sizes
    from linvideo.transfer import TrainConfig

    video = {f"--trajectories.{name}": getattr(args, name) for name in ("height", "width", "num_frames")}
    video = [word for name, value in video.items() if value is not None for word in (name, str(value))]
    # nothing trains here: any folder will do, and the device may be elsewhere
    config = read_config(args, TrainConfig, first=["--output_dir", "run"], last=[*video, "--device", "cpu"])
    if config.pretrained_model_name_or_path is None:
        raise ValueError("plan needs MODEL, a known name, pipeline folder or Hub id, got none")
    sizes = read_sizes(config.pretrained_model_name_or_path, config.trajectories)
    result = make_plan(sizes, config, args.gpus, args.gpu_memory, args.critic, args.forward_seconds)
    print(json.dumps(result, indent=2) if args.json else text(result))
