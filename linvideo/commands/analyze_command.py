"""`linvideo analyze`."""

import argparse
from pathlib import Path

from linvideo.commands.shared import (
    DEFAULTS,
    add_device,
    add_dtype,
    add_model,
    add_output_dir,
    add_setting,
    announce,
    extent,
    given,
    load,
    natural,
    number,
    positive,
)

SUMMARY = "which layers can become linear and what that saves, without training; an interrupted run is continued"
EXAMPLES = """
linvideo analyze Wan-AI/Wan2.1-T2V-1.3B-Diffusers --speedup 1.3 --output_dir analysis
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, "stock pipeline folder or Hub id")
    loading = parser.add_argument_group("how it is loaded")
    add_dtype(loading)
    add_device(loading)
    proposal = parser.add_argument_group("what is proposed and timed")
    what = 'wanted of one forward; "none" makes no proposal'
    proposal.add_argument("--speedup", type=speedup, default=1.3, help=what)
    size, what = ("HEIGHT", "WIDTH", "NUM_FRAMES"), "of the timed video; default: as sampled"
    proposal.add_argument("--timed_size", type=extent, nargs=3, metavar=size, help=what)
    video = parser.add_argument_group("videos that are sampled")
    what = "one caption a line, or .jsonl with caption and image; default: linvideo's own captions"
    video.add_argument("--prompts_file", type=Path, help=what)
    video.add_argument("--negative_prompt", default="", help="the one you generate with")
    video.add_argument("--num_trajectories", type=positive, default=4, help="videos sampled, each for another prompt")
    for name, value in DEFAULTS.items():
        add_setting(video, name, value, f"default: as the pipeline's folder says, else {value}")
    video.add_argument("--flow_shift", type=number, help="of the scheduler; default: the pipeline's own")
    video.add_argument("--seed", type=natural, default=0, help="of noise and of what is drawn")
    measurement = parser.add_argument_group("measurement")
    measurement.add_argument("--warmup_steps", type=natural, default=80, help="of the feature maps")
    what = "of the videos, that errors are measured on"
    measurement.add_argument("--num_states", type=positive, default=24, help=what)
    measurement.add_argument("--batch_size", type=positive, default=1, help="videos sampled at once, states a forward")
    add_output_dir(parser.add_argument_group("output"))


def speedup(text: str) -> float | None:
    return None if text == "none" else float(text)


def run(args: argparse.Namespace) -> None:
    from linvideo import models
    from linvideo.evaluation.analysis_report import text, write_report
    from linvideo.evaluation.analyze import analyze
    from linvideo.trajectories.collect import TrajectoryConfig
    from linvideo.trajectories.prompts import read_prompts_with_images, some_of
    from linvideo.transfer.sensitivity import SensitivityConfig
    from linvideo.transfer.warmup import WarmupConfig

    def trajectories_of(settings: dict) -> TrajectoryConfig:
        settings = {name: value for name, value in settings.items() if name != "negative_prompt"}
        settings |= {"num_trajectories": args.num_trajectories, "flow_shift": args.flow_shift}
        return TrajectoryConfig(**settings, batch_size=args.batch_size, shard_size=args.batch_size)

    trajectories_of(given(args))  # refuses before a long load
    warmup = WarmupConfig(max_train_steps=args.warmup_steps, batch_size=args.batch_size)
    sensitivity = SensitivityConfig(num_states=args.num_states, batch_size=args.batch_size)
    prompts = some_of(read_prompts_with_images(args.prompts_file), args.num_trajectories)
    captions, images = (list(each) for each in zip(*prompts, strict=True))
    timed_size = None if args.timed_size is None else tuple(args.timed_size)
    pipeline = load(args.model, args.dtype).to(args.device)
    settings = DEFAULTS | models.sampling_settings(pipeline) | given(args)
    what = f"analyze with {args.num_trajectories} trajectories"
    announce(what, pipeline, settings, args)
    analysis = analyze(
        pipeline,
        captions,
        args.output_dir,
        trajectories_of(settings),
        warmup,
        sensitivity,
        negative_prompt=args.negative_prompt,
        timed_size=timed_size,
        speedup=args.speedup,
        seed=args.seed,
        overwrite=args.overwrite,
        images=images,
    )
    write_report(analysis, args.output_dir)
    print(text(analysis, args.output_dir))
