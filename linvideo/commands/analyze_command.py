"""`linvideo analyze`."""

import argparse

from linvideo.commands.shared import (
    DEFAULTS,
    add_device,
    add_dtype,
    add_model,
    add_output_dir,
    add_prompts_file,
    add_settings,
    add_window,
    announce,
    extent,
    given,
    load,
    natural,
    number,
    positive,
    window_settings,
)

SUMMARY = "find out, without training, which layers can become linear and how much time that saves"
EXAMPLES = """
linvideo analyze Wan-AI/Wan2.1-T2V-1.3B-Diffusers --speedup 1.3 --output_dir analysis
linvideo analyze Wan-AI/Wan2.1-T2V-1.3B-Diffusers --kinds linear window --window.chunk 3 --output_dir analysis
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, "folder or Hub id of a stock pipeline")
    loading = parser.add_argument_group("loading")
    add_dtype(loading)
    add_device(loading)
    proposal = parser.add_argument_group("proposal and timing")
    what = 'the speedup of one forward that the proposed layers must reach, or "none" for no proposal; default: 1.3'
    proposal.add_argument("--speedup", type=speedup, metavar="FACTOR", default=1.3, help=what)
    size, what = ("HEIGHT", "WIDTH", "NUM_FRAMES"), "size of the timed video; default: the size of the sampled videos"
    proposal.add_argument("--timed_size", type=extent, nargs=3, metavar=size, help=what)
    layers = parser.add_argument_group("kinds of layers")
    what = (
        "what layers may become: linear, window (softmax attention to near latent frames and linear attention to all"
        " others) or both; default: linear"
    )
    layers.add_argument("--kinds", nargs="+", choices=["linear", "window"], default=["linear"], help=what)
    add_window(layers)
    video = parser.add_argument_group("sampled videos")
    add_prompts_file(video, "; default: linvideo's own captions")
    what = "the negative prompt that you generate with; default: empty"
    video.add_argument("--negative_prompt", metavar="TEXT", default="", help=what)
    what = "number of videos to sample, each from a prompt of its own; default: 4"
    video.add_argument("--num_trajectories", type=positive, metavar="N", default=4, help=what)
    add_settings(video, DEFAULTS, "as stored with the pipeline, otherwise {}")
    what = "flow shift of the scheduler; default: the pipeline's own"
    video.add_argument("--flow_shift", type=number, metavar="SHIFT", help=what)
    what = "seed of the noise and of all other random draws; default: 0"
    video.add_argument("--seed", type=natural, metavar="N", default=0, help=what)
    measurement = parser.add_argument_group("measurement")
    what = "number of training steps that fit the feature maps; default: 80"
    measurement.add_argument("--warmup_steps", type=natural, metavar="N", default=80, help=what)
    what = "number of states, taken from the sampled videos, on which errors are measured; default: 24"
    measurement.add_argument("--num_states", type=positive, metavar="N", default=24, help=what)
    what = "number of videos sampled at once, and of states in one forward; default: 1"
    measurement.add_argument("--batch_size", type=positive, metavar="N", default=1, help=what)
    add_output_dir(parser.add_argument_group("output"), "; without it, an interrupted analysis is continued")


def speedup(text: str) -> float | None:
    return None if text == "none" else float(text)


def run(args: argparse.Namespace) -> None:
    from linvideo import models
    from linvideo.evaluation.analysis_report import text, write_report
    from linvideo.evaluation.analyze import analyze, check_kinds
    from linvideo.reports.html_page import if_possible
    from linvideo.trajectories.collect import TrajectoryConfig
    from linvideo.trajectories.prompts import read_prompts_with_images, some_of
    from linvideo.transfer.sensitivity import SensitivityConfig
    from linvideo.transfer.warmup import WarmupConfig

    def trajectories_of(settings: dict) -> TrajectoryConfig:
        settings = {name: value for name, value in settings.items() if name != "negative_prompt"}
        settings |= {"num_trajectories": args.num_trajectories, "flow_shift": args.flow_shift}
        return TrajectoryConfig(**settings, batch_size=args.batch_size, shard_size=args.batch_size)

    trajectories_of(given(args))  # refuses bad values before a long load
    kinds, window = check_kinds(args.kinds, window_settings(args))
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
        kinds=kinds,
        window=window,
    )
    with if_possible():
        write_report(analysis, args.output_dir)
    print(text(analysis, args.output_dir))
