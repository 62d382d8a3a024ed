"""`linvideo evaluate`."""

import argparse
from pathlib import Path

from linvideo.commands.shared import (
    DEFAULTS,
    add_device,
    add_dtype,
    add_model,
    add_prompts_file,
    add_video,
    announce,
    given,
    load,
    load_teacher,
    positive,
    teachers_settings,
)

SUMMARY = "measure a converted pipeline, by its fidelity to the teacher or by VBench"
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
    suite = parser.add_argument_group("measurement")
    what = "fidelity: comparison with the teacher's videos from the same noise; vbench: prompts and scores of VBench"
    suite.add_argument("--suite", choices=["fidelity", "vbench"], required=True, help=what)
    what = "number of prompts, taken from the whole file (for vbench, per dimension); default: all"
    suite.add_argument("--num_prompts", type=positive, metavar="N", help=what)
    fidelity = parser.add_argument_group("suite fidelity")
    what = "folder or Hub id of the stock pipeline that MODEL was converted from; required"
    fidelity.add_argument("--teacher", metavar="TEACHER", help=what)
    add_prompts_file(fidelity, "; default: linvideo's own captions")
    vbench = parser.add_argument_group("suite vbench")
    what = "VBench's VBench_full_info.json; default: the one in the installed package"
    vbench.add_argument("--full_info", type=Path, metavar="FILE", help=what)
    what = f"VBench's names of the dimensions to score; default: the paper's six, {' '.join(DIMENSIONS)}"
    vbench.add_argument("--dimensions", nargs="+", metavar="NAME", default=DIMENSIONS, help=what)
    add_video(parser.add_argument_group("video"))
    loading = parser.add_argument_group("loading")
    add_dtype(loading)
    add_device(loading)
    output = parser.add_argument_group("output")
    what = "folder for measurements and videos; an interrupted evaluation in it is continued"
    output.add_argument("--output_dir", type=Path, metavar="FOLDER", required=True, help=what)


def run(args: argparse.Namespace) -> None:
    from linvideo.models.video_file import check_output

    check_output(args.output_dir / "video.mp4")  # before a long load
    {"fidelity": run_fidelity, "vbench": run_vbench}[args.suite](args)


def run_fidelity(args: argparse.Namespace) -> None:
    from linvideo.evaluation.evaluation_report import write_fidelity_report
    from linvideo.evaluation.fidelity import fidelity, summary
    from linvideo.progress import show_steps
    from linvideo.reports.html_page import if_possible
    from linvideo.trajectories.prompts import read_prompts, some_of

    if args.teacher is None:
        raise ValueError("--suite fidelity needs --teacher, the pipeline that MODEL was converted from")
    prompts = some_of(read_prompts(args.prompts_file), args.num_prompts)
    student = load(args.model, args.dtype).to(args.device)
    teacher = load_teacher(args.teacher, args.dtype, student).to(args.device)
    settings = DEFAULTS | teachers_settings(teacher, student) | given(args)
    announce(f"{len(prompts)} pairs of videos", teacher, settings, args)
    rows = []
    for name, pipeline in (("student", student), ("teacher", teacher)):
        show_steps(pipeline, desc=name, leave=False)
    for row in fidelity(student, teacher, prompts, args.output_dir, seed=args.seed, fps=args.fps, **settings):
        rows.append(row)
        print(f"[{len(rows)}/{len(prompts)}] PSNR {row['psnr']:.2f} dB, SSIM {row['ssim']:.4f}: {row['prompt'][:60]}")
    for name, (mean, spread) in summary(rows).items():
        print(f"{name:16} {mean:8.4f} +- {spread:.4f} over {len(rows)} prompts")
    with if_possible():
        write_fidelity_report(args.output_dir, args.model, args.teacher, given(args) | {"dtype": args.dtype})
    print(f"the measurements, videos and report.html are in {args.output_dir}")


def run_vbench(args: argparse.Namespace) -> None:
    import importlib.util

    from linvideo import models
    from linvideo.evaluation import vbench
    from linvideo.evaluation.evaluation_report import write_vbench_report
    from linvideo.progress import bar, show_steps
    from linvideo.reports.html_page import if_possible

    full_info = args.full_info or vbench.full_info_path()
    prompts = vbench.prompts_of(full_info, args.dimensions, args.num_prompts)
    pipeline = load(args.model, args.dtype).to(args.device)
    show_steps(pipeline, leave=False)
    settings = DEFAULTS | models.sampling_settings(pipeline) | given(args)
    announce(f"{vbench.VIDEOS_PER_PROMPT} videos for each of {len(prompts)} prompts, each", pipeline, settings, args)
    videos = vbench.generate_videos(pipeline, prompts, args.output_dir, fps=args.fps, **settings)
    for _ in bar(videos, desc="videos", unit="video", total=len(prompts) * vbench.VIDEOS_PER_PROMPT):
        pass
    scores = None
    if importlib.util.find_spec("vbench") is None:
        where, names = args.output_dir / "videos", " ".join(args.dimensions)
        print("for the scores, install the package vbench and run:")
        print(f'vbench evaluate --videos_path {where} --dimension "{names}"')
    else:
        scores = vbench.score(args.output_dir, args.dimensions, full_info, args.device)
        print(vbench.table(scores))
    with if_possible():
        write_vbench_report(args.output_dir, args.model, prompts, scores)
