"""`linvideo check`."""

import argparse
from pathlib import Path

from linvideo.commands.shared import (
    add_device,
    add_dtype,
    add_model,
    add_settings,
    announce,
    given,
    load,
    refuse_existing_video,
)

SUMMARY = "try every part of a training run once, with the real weights, in a few minutes"
EXAMPLES = """
linvideo check Wan-AI/Wan2.1-T2V-1.3B-Diffusers --output check.mp4
"""
SIZE = {"height": 256, "width": 256, "num_frames": 17}  # small, so that a check takes only minutes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, "folder or Hub id of a stock pipeline")
    loading = parser.add_argument_group("loading")
    add_dtype(loading)
    add_device(loading)
    add_settings(parser.add_argument_group("video"), SIZE, "as stored with the pipeline, otherwise {}")
    output = parser.add_argument_group("output")
    what = "mp4 file for the short video that the converted model samples; default: check.mp4"
    output.add_argument("--output", type=Path, metavar="FILE", default=Path("check.mp4"), help=what)
    output.add_argument("--overwrite", action="store_true", help="replace an existing video")


def run(args: argparse.Namespace) -> int:
    from linvideo import models
    from linvideo.evaluation.check import STEPS, check_pipeline
    from linvideo.models.video_file import check_output
    from linvideo.progress import show_steps

    refuse_existing_video(args)
    check_output(args.output)  # before a long load
    pipeline = load(args.model, args.dtype).to(args.device)
    show_steps(pipeline, leave=False)
    settings = SIZE | models.sampling_settings(pipeline) | given(args)
    size = {name: settings[name] for name in SIZE}
    announce("check with videos", pipeline, size | {"num_inference_steps": STEPS}, args)
    failed = 0
    for finding in check_pipeline(pipeline, args.output, **size):
        failed += not finding.passed
        mark = "ok    " if finding.passed else "FAILED"
        print(f"{mark} {finding.name}: {finding.detail} ({finding.seconds:.1f} s)", flush=True)
    return min(failed, 1)
