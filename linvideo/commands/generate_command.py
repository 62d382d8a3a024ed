"""`linvideo generate`."""

import argparse
from pathlib import Path

from linvideo.commands.shared import (
    add_device,
    add_dtype,
    add_model,
    add_prompts_file,
    add_video,
    announce,
    given,
    load,
    load_teacher,
    print_transformers,
    refuse_existing_video,
    teachers_settings,
    whole_number,
)

SUMMARY = "generate videos with a converted or stock pipeline, and report their time and memory"
EXAMPLES = """
linvideo generate run/pipeline --prompt "a red kite over a grey sea" --output kite.mp4
linvideo generate run/pipeline --prompts_file captions.txt --num_videos_per_prompt 2 --output videos
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    prompts = parser.add_argument_group("prompts")
    prompt = prompts.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="caption of the video")
    add_prompts_file(prompt, "; --output is then a folder")
    what = "first frame of the video, for a pipeline that takes an image; goes with --prompt"
    prompts.add_argument("--image", type=Path, metavar="FILE", help=what)
    what = "number of videos per prompt, with the seeds --seed, --seed + 1, ...; --output is then a folder; default: 1"
    prompts.add_argument("--num_videos_per_prompt", type=whole_number(1, 10_000), metavar="N", default=1, help=what)
    what = "a second pipeline, whose video from the same noise is shown on the left of each file"
    prompts.add_argument("--compare", metavar="TEACHER", help=what)
    add_video(parser.add_argument_group("video"))
    loading = parser.add_argument_group("loading and computation")
    add_dtype(loading)
    add_device(loading)
    what = "attention backend of softmax and window layers, a name that diffusers' set_attention_backend knows"
    loading.add_argument("--attention_backend", metavar="NAME", help=what)
    what = "keep weights in CPU memory, and move them to the GPU only for their computation: model by model, or layer"
    loading.add_argument("--cpu_offload", choices=["model", "sequential"], help=f"{what} by layer (sequential)")
    loading.add_argument("--vae_tiling", action="store_true", help="decode in tiles, which takes less GPU memory")
    output = parser.add_argument_group("output")
    what = "mp4 file, or folder for several videos; default: output.mp4 or outputs"
    output.add_argument("--output", type=Path, metavar="PATH", help=what)
    output.add_argument("--overwrite", action="store_true", help="replace existing videos")


def run(args: argparse.Namespace) -> None:
    from linvideo import models
    from linvideo.evaluation.sampling import add_to_index, make_videos, read_index, summary
    from linvideo.models.video_file import check_output

    jobs = video_jobs(args)
    if args.cpu_offload is not None and (args.device == "cpu" or args.compare):
        raise ValueError("--cpu_offload needs a GPU, and excludes --compare, because its two pipelines share parts")
    check_output(jobs[0].path)  # before a long load
    numbered = jobs[0].path != args.output
    if numbered:
        read_index(jobs[0].path.parent)
    pipeline = load(args.model, args.dtype)
    models.video_transformers(pipeline)  # refuses other pipelines before a long load of the teacher
    settings, asked, teacher, of_teacher = models.sampling_settings(pipeline), given(args), None, None
    if args.compare is None:
        settings |= asked
    else:
        teacher = load_teacher(args.compare, args.dtype, pipeline)
        # a distilled model keeps its own steps and guidance; those that the user gave go to the other model
        of_teacher = teachers_settings(teacher, pipeline) | asked | models.own_settings(teacher)
        settings |= asked | models.own_settings(pipeline)
    announce(f"{len(jobs)} video{'s' * (len(jobs) > 1)}", pipeline, settings, args)
    for part in filter(None, (pipeline, teacher)):
        place(part, args)
    made = []
    for video in make_videos(pipeline, jobs, settings, teacher, of_teacher, args.fps, args.overwrite):
        made.append(video)
        if numbered:
            add_to_index(video.job.path.parent, video.job)
        compared = "" if video.psnr is None else f", PSNR {video.psnr:.2f} dB and SSIM {video.ssim:.4f} to the teacher"
        print(f"wrote {video.job.path}, seed {video.job.seed}{compared}", flush=True)
    print_transformers(pipeline)
    print(summary(made, args.device))


def video_jobs(args: argparse.Namespace) -> list:
    """Return a job for each prompt and seed. A single video of --prompt is the file --output, several fill a folder."""
    from linvideo.evaluation.sampling import Job
    from linvideo.trajectories.prompts import Prompt, read_prompts_with_images

    if args.prompts_file is None:
        prompts = [Prompt(args.prompt, args.image)]
    elif args.image is None:
        prompts = read_prompts_with_images(args.prompts_file)
    else:
        raise ValueError("--image goes with --prompt; a --prompts_file names its images in the lines of a .jsonl file")
    seeds = range(args.seed, args.seed + args.num_videos_per_prompt)
    if args.prompts_file is None and len(seeds) == 1:
        args.output = args.output or Path("output.mp4")
        refuse_existing_video(args)
        return [Job(prompts[0], args.seed, args.output)]
    folder = args.output or Path("outputs")
    if folder.suffix == ".mp4" or folder.is_file():
        raise ValueError(f"--output must name a folder when there are several videos, got {folder}")
    jobs = [Job(prompt, seed, folder / f"{i:04d}-{seed}.mp4") for i, prompt in enumerate(prompts) for seed in seeds]
    there = [job.path for job in jobs if job.path.exists()]
    if there and not args.overwrite:
        raise ValueError(f"{there[0]} exists; choose another --output or pass --overwrite")
    return jobs


def place(pipeline, args: argparse.Namespace) -> None:
    """Move a pipeline to the device as the options say. The same options exist in diffusers-cli."""
    from linvideo import models

    if args.attention_backend is not None:
        for transformer in models.video_transformers(pipeline).values():
            models.choose_backend(transformer, args.attention_backend, args.device)
    if args.vae_tiling:
        pipeline.vae.enable_tiling()
    if args.cpu_offload is None:
        pipeline.to(args.device)
    else:
        name = {"model": "enable_model_cpu_offload", "sequential": "enable_sequential_cpu_offload"}[args.cpu_offload]
        getattr(pipeline, name)(device=args.device)
