"""`linvideo evaluate`."""

import argparse
from pathlib import Path

from linvideo.commands.shared import (
    DEFAULTS,
    add_device,
    add_dtype,
    add_model,
    add_video,
    announce,
    given,
    load,
    load_teacher,
    positive,
    teachers_settings,
)

SUMMARY = "measure a converted pipeline; an interrupted evaluation is continued"
EXAMPLES = """
linvideo evaluate run/pipeline --suite fidelity --teacher Wan-AI/Wan2.1-T2V-1.3B-Diffusers --output_dir fidelity
linvideo evaluate run/pipeline --suite vbench --full_info VBench_full_info.json --output_dir vbench
"""
DIMENSIONS = [
    "imaging_quality",
    "aesthetic_quality",
    "motion_smoothness",
    "dynamic_degree",
    "background_consistency",
    "subject_consistency",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    suite = parser.add_argument_group("what is measured")
    suite.add_argument("--suite", choices=["fidelity", "vbench"], required=True, help="against its teacher, or VBench")
    what = "only so many, from all over the file (vbench: of each dimension)"
    suite.add_argument("--num_prompts", type=positive, help=what)
    fidelity = parser.add_argument_group("fidelity")
    fidelity.add_argument("--teacher", help="the stock pipeline folder or Hub id")
    what = "one caption a line; default: linvideo's own captions"
    fidelity.add_argument("--prompts_file", type=Path, help=what)
    vbench = parser.add_argument_group("vbench")
    what = "its VBench_full_info.json; default: the installed package's"
    vbench.add_argument("--full_info", type=Path, help=what)
    vbench.add_argument("--dimensions", nargs="+", default=DIMENSIONS, help="default: the paper's six")
    add_video(parser.add_argument_group("video"))
    loading = parser.add_argument_group("how it is loaded")
    add_dtype(loading)
    add_device(loading)
    output = parser.add_argument_group("output")
    output.add_argument("--output_dir", type=Path, required=True, help="folder of rows and videos, which is continued")


def run(args: argparse.Namespace) -> None:
    from linvideo.models.video_file import check_output

    check_output(args.output_dir / "video.mp4")  # before a long load
    {"fidelity": run_fidelity, "vbench": run_vbench}[args.suite](args)


def run_fidelity(args: argparse.Namespace) -> None:
    from linvideo.evaluation.fidelity import fidelity, summary
    from linvideo.trajectories.prompts import read_prompts, some_of

    if args.teacher is None:
        raise ValueError("--suite fidelity needs --teacher, the pipeline that the model was converted from")
    prompts = some_of(read_prompts(args.prompts_file), args.num_prompts)
    student = load(args.model, args.dtype).to(args.device)
    teacher = load_teacher(args.teacher, args.dtype, student).to(args.device)
    settings = DEFAULTS | teachers_settings(teacher, student) | given(args)
    announce(f"{len(prompts)} prompts, a video by each model", teacher, settings, args)
    rows = []
    for name, pipeline in (("student", student), ("teacher", teacher)):
        pipeline.set_progress_bar_config(desc=name, leave=False)
    for row in fidelity(student, teacher, prompts, args.output_dir, seed=args.seed, fps=args.fps, **settings):
        rows.append(row)
        print(f"[{len(rows)}/{len(prompts)}] PSNR {row['psnr']:.2f} dB, SSIM {row['ssim']:.4f}: {row['prompt'][:60]}")
    for name, (mean, spread) in summary(rows).items():
        print(f"{name:16} {mean:8.4f} +- {spread:.4f} over {len(rows)} prompts")
    print(f"rows and videos are in {args.output_dir}")


def run_vbench(args: argparse.Namespace) -> None:
    import importlib.util

    from linvideo import models
    from linvideo.evaluation import vbench

    full_info = args.full_info or vbench.full_info_path()
    prompts = vbench.prompts_of(full_info, args.dimensions, args.num_prompts)
    pipeline = load(args.model, args.dtype).to(args.device)
    pipeline.set_progress_bar_config(leave=False)
    settings = DEFAULTS | models.sampling_settings(pipeline) | given(args)
    announce(f"{len(prompts)} prompts, {vbench.VIDEOS_PER_PROMPT} videos each,", pipeline, settings, args)
    for finished, total in vbench.generate_videos(pipeline, prompts, args.output_dir, fps=args.fps, **settings):
        print(f"\rvideo {finished} of {total}", end="", flush=True)
    print()
    if importlib.util.find_spec("vbench") is None:
        where, names = args.output_dir / "videos", " ".join(args.dimensions)
        print(f'scores need the package vbench: vbench evaluate --videos_path {where} --dimension "{names}"')
        return
    print(vbench.table(vbench.score(args.output_dir, args.dimensions, full_info, args.device)))
