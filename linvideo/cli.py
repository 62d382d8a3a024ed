"""The `linvideo` command: flags in, one call of the Python API, a readable answer out.

Bad input ends with one line on standard error and exit status 2.
"""

import argparse
import math
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

# Before PyTorch is imported: OpenMP's threads wait for each other by spinning, which takes many times the processor
# time, and the wall time too, where other programs want the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

DTYPES = ("float32", "float16", "bfloat16")
DEFAULTS = {"height": 480, "width": 832, "num_frames": 81, "num_inference_steps": 50, "guidance_scale": 5.0}  # Wan's
LARGEST = 100_000  # as training.trajectories.LARGEST, without its imports
OUT_OF_MEMORY = ("can't allocate memory", "out of memory")  # in PyTorch's messages, of the host and of GPUs
CHECKED = {"height": 256, "width": 256, "num_frames": 17}  # small, so that a check takes minutes
DIMENSIONS = [
    "imaging_quality",
    "aesthetic_quality",
    "motion_smoothness",
    "dynamic_degree",
    "background_consistency",
    "subject_consistency",
]


def demo(args: argparse.Namespace) -> None:
    from linvideo.demo.make_demo import run_demo

    options = {"overwrite": args.overwrite, "device": args.device, "seed": args.seed, "videos": args.videos}
    run_demo(args.output_dir, stages=args.stages.split(","), **options)


def convert(args: argparse.Namespace) -> None:
    from linvideo import models
    from linvideo.workspace import remove_dead

    remove_dead(args.output_dir.resolve().parent)  # a killed call may have left what stood there in a folder next to it
    refuse_existing(args)
    pipeline = load(args)
    if "all" in args.layers and len(args.layers) > 1:
        raise ValueError("--layers takes layer numbers or all, got both")
    layers = "all" if args.layers == ["all"] else [layer for some in args.layers for layer in some]
    converted = models.convert(pipeline, layers, mode=args.mode, feature_map=args.feature_map, copy=False)
    how, state = models.Training(f"conversion ({args.mode})"), "untrained"
    if args.feature_maps is not None:
        from linvideo.transfer.warmup import load_feature_maps

        if getattr(pipeline, "transformer_2", None) is not None:
            raise ValueError("--feature_maps are of one transformer, got a pipeline with two")
        load_feature_maps(models.wan_transformer(converted), args.feature_maps)
        how, state = (
            replace(how, untrained="only the feature maps are fitted"),
            "fitted, all other weights as they were",
        )
    models.save_pipeline(converted, args.output_dir, overwrite=args.overwrite, training=how)
    if len(print_transformers(converted)) > 1:
        print("both experts were converted, with the same layers")
    print(f"saved to {args.output_dir}; its new linear layers are {state}: `linvideo train` makes good ones, of Wan")


def train(argv: list[str]) -> None:
    from linvideo.run import load_config
    from linvideo.run.parallel import disconnect
    from linvideo.transfer import TrainConfig, Trainer

    config = load_config(argv, TrainConfig)
    selection = config.selection.max_train_steps if config.selection.method == "learned" else 0
    stages = {"warm-up": config.warmup.max_train_steps, "selection": selection, "fine-tuning": config.max_train_steps}
    announce_run(config, stages)
    result = Trainer(config).train()
    disconnect()  # not after an error: the others may wait in a collective that this process will not join
    if result.pipeline is not None:  # of several processes the first has it
        print(f"linear layers: {result.layers_linear}; saved the converted pipeline to {result.pipeline_path}")


def announce_run(config, stages: dict[str, int]) -> None:
    """Say what a run is about to do, before it takes its time; of several processes only the first does."""
    if os.environ.get("RANK", "0") != "0":
        return
    video = config.trajectories
    print(
        f"run in {config.output_dir}: {video.num_trajectories} trajectories of {video.height}x{video.width},"
        f" {video.num_frames} frames, {video.num_inference_steps} steps, guidance {video.guidance_scale:g}"
        + "".join(f", then {count} steps of {name}" for name, count in stages.items() if count),
        flush=True,
    )


def distill(argv: list[str]) -> None:
    from linvideo.distillation import DistillConfig, Distiller
    from linvideo.run import load_config
    from linvideo.run.parallel import disconnect

    config = load_config(argv, DistillConfig)
    announce_run(config, {"regression": config.regression.max_train_steps, "DMD": config.max_train_steps})
    result = Distiller(config).train()
    disconnect()  # not after an error, see train
    if result.pipeline is not None:
        print(f"timesteps: {result.timesteps}; saved the distilled pipeline to {result.pipeline_path}")


def collect(args: argparse.Namespace) -> None:
    from linvideo.run import load_config
    from linvideo.transfer import TrainConfig, Trainer

    number, _, count = args.worker.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise ValueError(f"--worker must be number/count with number from 0 to count - 1, got {args.worker}")
    # the folder is not empty once another worker has begun
    config = load_config([*args.train_options, "--resume_from_checkpoint", "latest"], TrainConfig)
    announce_run(config, {})
    store = Trainer(config).collect(int(number), int(count))
    missing = len(store.missing_shards())
    print(
        f"{store.num_shards - missing} of {store.num_shards} shards are in {store.path}; linvideo train with the same"
        " options and --resume_from_checkpoint latest goes on from there"
    )


def plan(args: argparse.Namespace) -> None:
    import json

    from linvideo.planning.plan import make_plan
    from linvideo.planning.plan_text import text
    from linvideo.planning.sizes import read_sizes
    from linvideo.run import load_config
    from linvideo.transfer import TrainConfig

    video = {f"--trajectories.{name}": getattr(args, name) for name in ("height", "width", "num_frames")}
    video = [word for name, value in video.items() if value is not None for word in (name, str(value))]
    # nothing trains here: any folder will do, and the device may be elsewhere
    config = load_config(["--output_dir", "run", *args.train_options, *video, "--device", "cpu"], TrainConfig)
    model = args.model or config.pretrained_model_name_or_path
    if model is None:
        raise ValueError("plan needs --model, a known name, pipeline folder or Hub id, got none")
    sizes = read_sizes(model, config.trajectories)
    result = make_plan(sizes, config, args.gpus, args.gpu_memory, args.critic, args.forward_seconds)
    print(json.dumps(result, indent=2) if args.json else text(result))


def generate(args: argparse.Namespace) -> None:
    from linvideo import models
    from linvideo.evaluation.sampling import add_to_index, make_videos, read_index, summary
    from linvideo.models.video_file import check_output

    jobs = video_jobs(args)
    if args.cpu_offload is not None and (args.device == "cpu" or args.compare):
        raise ValueError("--cpu_offload needs a GPU and goes without --compare, whose two pipelines share parts")
    check_output(jobs[0].path)  # before a long load
    numbered = jobs[0].path != args.output
    if numbered:
        read_index(jobs[0].path.parent)
    pipeline = load(args)
    models.video_transformers(pipeline)  # before a long load of the teacher
    settings, asked, teacher, of_teacher = models.sampling_settings(pipeline), given(args), None, None
    if args.compare is None:
        settings |= asked
    else:
        teacher = load_teacher(args.compare, args, pipeline)
        # of a distilled model steps and guidance are its own, those asked for are the other's
        of_teacher = teachers_settings(teacher, pipeline) | asked | models.own_settings(teacher)
        settings |= asked | models.own_settings(pipeline)
    announce(f"{len(jobs)} videos", pipeline, settings, args)
    for part in filter(None, (pipeline, teacher)):
        place(part, args)
    made = []
    for video in make_videos(pipeline, jobs, settings, teacher, of_teacher, args.fps, args.overwrite):
        made.append(video)
        if numbered:
            add_to_index(video.job.path.parent, video.job)
        beside = "" if video.psnr is None else f", PSNR {video.psnr:.2f} dB and SSIM {video.ssim:.4f} to the teacher"
        print(f"wrote {video.job.path}, seed {video.job.seed}{beside}", flush=True)
    print_transformers(pipeline)
    print(summary(made, args.device))


def video_jobs(args: argparse.Namespace) -> list:
    """One for each prompt and seed; a video of --prompt goes to the file --output, several to the folder."""
    from linvideo.evaluation.sampling import Job
    from linvideo.trajectories.prompts import Prompt, read_prompts_with_images

    if args.prompts_file is None:
        prompts = [Prompt(args.prompt, args.image)]
    elif args.image is None:
        prompts = read_prompts_with_images(args.prompts_file)
    else:
        raise ValueError("--image goes with --prompt; a .jsonl --prompts_file names an image in each line")
    seeds = range(args.seed, args.seed + args.num_videos_per_prompt)
    if args.prompts_file is None and len(seeds) == 1:
        args.output = args.output or Path("output.mp4")
        refuse_existing_video(args)
        return [Job(prompts[0], args.seed, args.output)]
    folder = args.output or Path("outputs")
    if folder.suffix == ".mp4" or folder.is_file():
        raise ValueError(f"--output must name a folder for several videos, got {folder}")
    jobs = [Job(prompt, seed, folder / f"{i:04d}-{seed}.mp4") for i, prompt in enumerate(prompts) for seed in seeds]
    there = [job.path for job in jobs if job.path.exists()]
    if there and not args.overwrite:
        raise ValueError(f"{there[0]} exists; choose another --output or pass --overwrite")
    return jobs


def load_teacher(model: str, args: argparse.Namespace, pipeline):
    """The pipeline to compare with, sharing all that it can."""
    own = ("transformer", "transformer_2", "scheduler")
    shared = {name: part for name, part in pipeline.components.items() if name not in own and part is not None}
    return load(argparse.Namespace(model=model, dtype=args.dtype), **shared)


def teachers_settings(teacher, student) -> dict:
    """What the teacher is called with beside a student that may be distilled: for videos of the student's size."""
    from linvideo import models

    own = models.own_settings(student)
    shared = {name: value for name, value in models.sampling_settings(student).items() if name not in own}
    return models.sampling_settings(teacher) | shared


def announce(what: str, pipeline, settings: dict, args: argparse.Namespace) -> None:
    """Say what is about to be made, before it takes its time."""
    import inspect

    defaults = inspect.signature(pipeline.__call__).parameters
    own = {name: settings.get(name, getattr(defaults.get(name), "default", None)) for name in DEFAULTS}
    size = "the model's own size" if None in (own["height"], own["width"]) else f"{own['height']}x{own['width']}"
    words = {"num_frames": "{} frames", "num_inference_steps": "{} steps", "guidance_scale": "guidance {:g}"}
    rest = [word.format(own[name]) for name, word in words.items() if own[name] is not None]
    print(f"{what} of {', '.join([size, *rest])}, on {args.device} in {args.dtype}", flush=True)


def place(pipeline, args: argparse.Namespace) -> None:
    """Onto the device, as the flags say that diffusers-cli has too."""
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


def evaluate(args: argparse.Namespace) -> None:
    from linvideo.models.video_file import check_output

    check_output(args.output_dir / "video.mp4")  # before a long load
    {"fidelity": evaluate_fidelity, "vbench": evaluate_vbench}[args.suite](args)


def evaluate_fidelity(args: argparse.Namespace) -> None:
    from linvideo.evaluation.fidelity import fidelity, summary
    from linvideo.trajectories.prompts import read_prompts, some_of

    if args.teacher is None:
        raise ValueError("--suite fidelity needs --teacher, the pipeline that the model was converted from")
    prompts = some_of(read_prompts(args.prompts_file), args.num_prompts)
    student = load(args).to(args.device)
    teacher = load_teacher(args.teacher, args, student).to(args.device)
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


def evaluate_vbench(args: argparse.Namespace) -> None:
    import importlib.util

    from linvideo import models
    from linvideo.evaluation import vbench

    full_info = args.full_info or vbench.full_info_path()
    prompts = vbench.prompts_of(full_info, args.dimensions, args.num_prompts)
    pipeline = load(args).to(args.device)
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


def given(args: argparse.Namespace) -> dict:
    """What of a video's settings was asked for, for `generate_video`."""
    values = {name: getattr(args, name, None) for name in ("negative_prompt", *DEFAULTS)}
    return {name: value for name, value in values.items() if value is not None}


def check(args: argparse.Namespace) -> int:
    from linvideo import models
    from linvideo.evaluation.check import STEPS, check_pipeline
    from linvideo.models.video_file import check_output

    refuse_existing_video(args)
    check_output(args.output)  # before a long load
    pipeline = load(args).to(args.device)
    pipeline.set_progress_bar_config(leave=False)
    settings = CHECKED | models.sampling_settings(pipeline) | given(args)
    size = {name: settings[name] for name in CHECKED}
    announce("check with videos", pipeline, size | {"num_inference_steps": STEPS}, args)
    failed = 0
    for finding in check_pipeline(pipeline, args.output, **size):
        failed += not finding.passed
        mark = "ok    " if finding.passed else "FAILED"
        print(f"{mark} {finding.name}: {finding.detail} ({finding.seconds:.1f} s)", flush=True)
    return min(failed, 1)


def analyze(args: argparse.Namespace) -> None:
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
    pipeline = load(args).to(args.device)
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


def speedup(text: str) -> float | None:
    return None if text == "none" else float(text)


def info(args: argparse.Namespace) -> None:
    from linvideo import models

    pipeline = load(args, text_encoder=None)  # the largest part, which says nothing about attention
    models.video_transformers(pipeline)
    print(f"{type(pipeline).__name__}, scheduler {type(pipeline.scheduler).__name__}")
    print_transformers(pipeline)


def print_transformers(pipeline) -> dict:
    """Say what the attention layers are; returns the transformers by name."""
    from linvideo import models

    found = models.video_transformers(pipeline)
    for name, transformer in found.items():
        print(f"{name}: {models.describe(transformer)}")
    return found


def load(args: argparse.Namespace, **components):
    import torch

    from linvideo import models
    from linvideo.models.pipelines import wan_dtypes

    dtype = getattr(torch, args.dtype)
    print(f"loading {args.model}", flush=True)
    pipeline = models.load_pipeline(args.model, dtype=wan_dtypes(dtype), **components)
    if type(getattr(pipeline, "vae", None)).__name__ != "AutoencoderKLWan":  # of another family all are meant for dtype
        for part in (getattr(pipeline, name, None) for name in ("vae", "image_encoder")):
            if part is not None and part.dtype != dtype:
                part.to(dtype)
    return pipeline


def choose_device(name: str | None) -> str:
    import torch

    from linvideo.trajectories.devices import check_device

    check_device(name)
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def refuse_existing(args: argparse.Namespace) -> None:
    """Before anything is loaded, so that a slow load does not end in a refusal."""
    folder = args.output_dir
    if folder.exists() and not args.overwrite and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists; choose another --output_dir or pass --overwrite")


def refuse_existing_video(args: argparse.Namespace) -> None:
    if args.output.suffix != ".mp4" or args.output.is_dir():
        raise ValueError(f"--output must name an .mp4 file, got {args.output}")
    if args.output.exists() and not args.overwrite:
        raise ValueError(f"{args.output} exists; choose another --output or pass --overwrite")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; --help has the rest."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def underscored(word: str) -> str:
    """--num-frames as --num_frames: diffusers-cli writes its flags with hyphens, its scripts with underscores."""
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if name.startswith("--") else word


def layer_numbers(text: str) -> list[int] | str:
    """A type for argparse: "all", or numbers and ranges as they stand in what `info` prints: 1,2,3 or 0-4."""
    if text == "all":
        return text
    layers = []
    for word in text.strip(",").split(","):
        if not (found := re.fullmatch(r"([0-9]{1,4})(?:-([0-9]{1,4}))?", word.strip())):
            raise argparse.ArgumentTypeError(f'expected 0-based layer numbers, such as 0 2 5-7, or "all", got {text!r}')
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first:
            raise argparse.ArgumentTypeError(f"expected a range of layers from low to high, got {word.strip()}")
        layers += range(first, last + 1)
    return layers


def whole_number(least: int, most: int = 2**63 - 1):
    """A type for argparse: the whole numbers in this range."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
        if not least <= value <= most:
            limit = f"at least {least}" if value < least else f"at most {most}"
            raise argparse.ArgumentTypeError(f"must be {limit}, got {value}")
        return value

    return parse


def number(text: str) -> float:
    """A type for argparse: finite numbers from 0 up."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be finite and not negative, got {text}")
    return value


positive, natural, extent = whole_number(1), whole_number(0), whole_number(1, LARGEST)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="linvideo", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run, summary: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=summary, description=summary)
        sub.set_defaults(run=run)
        return sub

    def add_model(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--model", required=True, help="pipeline folder or Hub id, converted or stock")
        sub.add_argument("--dtype", choices=DTYPES, default="float32")

    def add_sampling(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--negative_prompt", default="")
        for name, value in DEFAULTS.items():
            fixed = (
                "; of a distilled model, as it was distilled"
                if name in ("num_inference_steps", "guidance_scale")
                else ""
            )
            sub.add_argument(
                f"--{name}",
                type=number if isinstance(value, float) else extent,
                help=f"default: the pipeline's own, {value} with Wan{fixed}",
            )
        sub.add_argument("--seed", type=natural, default=0)
        sub.add_argument("--fps", type=positive, help="of the mp4 files; default: the model's own, 16 with Wan 2.1")
        sub.add_argument("--device", default=None, help="default: cuda if there is one, else cpu")

    def add_output_dir(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--output_dir", type=Path, required=True)
        sub.add_argument("--overwrite", action="store_true", help="replace what is in the output place")

    sub = command("demo", demo, "convert the embedded model, compare it with its teacher and write a report")
    add_output_dir(sub)
    sub.add_argument("--device", default=None, help="default: cuda if there is one, else cpu")
    sub.add_argument("--seed", type=natural, default=0)
    sub.add_argument("--videos", type=positive, default=48, help="videos per model that the metrics are taken over")
    what = "transfer,adm,distill or a part of it with transfer; distill takes about five minutes more"
    sub.add_argument("--stages", default="transfer", help=what)

    sub = command("convert", convert, "give layers of a pipeline linear attention, without training")
    add_model(sub)
    add_output_dir(sub)
    what = '0-based layer numbers and ranges, such as 0 2 5-7 or 0,2,5-7, or "all"'
    sub.add_argument("--layers", nargs="+", type=layer_numbers, default=["all"], help=what)
    sub.add_argument("--mode", choices=["mixed", "linear"], default="linear")
    sub.add_argument("--feature_map", default="hedgehog")
    sub.add_argument("--feature_maps", type=Path, help="fitted weights: feature_maps.safetensors of analyze or train")

    command(
        "train", train, "selective transfer and fine-tuning: --config FILE, --section.key VALUE; also under torchrun"
    )

    command("distill", distill, "a converted model to few steps: options as of train; also under torchrun")

    sub = command(
        "collect", collect, "only sample a run's trajectories, a part of them; takes linvideo train's options too"
    )
    sub.add_argument("--worker", default="0/1", help="number/count: which part, say 0/4 to 3/4 for four workers")

    sub = command(
        "plan", plan, "memory, disk and pace of a training run before it starts; takes linvideo train's options too"
    )
    sub.add_argument(
        "--model",
        help="a known name such as wan2.1-14b or wan2.1-i2v-14b, a stock pipeline folder or a Hub id; default: the"
        " config's",
    )
    sub.add_argument("--gpus", type=positive, default=1)
    sub.add_argument("--gpu_memory", type=number, default=80.0, help="of one GPU, in GB of 10^9 bytes")
    for name in ("height", "width", "num_frames"):
        sub.add_argument(f"--{name}", type=positive, help="default: the config's")
    sub.add_argument("--critic", action="store_true", help="with a fake-score network, as linvideo distill has")
    sub.add_argument("--forward_seconds", type=number, help="of the teacher with one video on one GPU, as measured")
    sub.add_argument("--json", action="store_true", help="print the plan as JSON")

    sub = command("generate", generate, "make videos with a pipeline, converted or stock, and say what they cost")
    add_model(sub)
    prompt = sub.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt")
    prompt.add_argument(
        "--prompts_file", type=Path, help="one caption a line, or .jsonl with caption and image; --output is a folder"
    )
    sub.add_argument("--image", type=Path, help="with --prompt, for a pipeline that takes one")
    sub.add_argument(
        "--num_videos_per_prompt",
        type=whole_number(1, 10_000),
        default=1,
        help="from noise of --seed, --seed + 1, ...; --output is a folder",
    )
    add_sampling(sub)
    sub.add_argument(
        "--compare", metavar="TEACHER", help="a pipeline whose video from the same noise is to stand at the left"
    )
    sub.add_argument("--attention_backend", help="of the softmax layers, a name of diffusers' set_attention_backend")
    sub.add_argument("--cpu_offload", choices=["model", "sequential"], help="keep on the GPU only what computes")
    sub.add_argument("--vae_tiling", action="store_true", help="less GPU memory for the VAE")
    sub.add_argument("--output", type=Path, help="the mp4 file, default output.mp4; of several videos a folder")
    sub.add_argument("--overwrite", action="store_true", help="replace videos that are there")

    sub = command("evaluate", evaluate, "measure a converted pipeline; an interrupted evaluation is continued")
    sub.add_argument("model", help="pipeline folder or Hub id")
    sub.add_argument("--suite", choices=["fidelity", "vbench"], required=True, help="against its teacher, or VBench")
    sub.add_argument("--dtype", choices=DTYPES, default="float32")
    sub.add_argument("--output_dir", type=Path, required=True)
    sub.add_argument("--teacher", help="fidelity: the stock pipeline folder or Hub id")
    sub.add_argument("--prompts_file", type=Path, help="fidelity: one caption a line; default: linvideo's own captions")
    what = "only so many, from all over the file (vbench: of each dimension)"
    sub.add_argument("--num_prompts", type=positive, help=what)
    sub.add_argument(
        "--full_info", type=Path, help="vbench: its VBench_full_info.json; default: the installed package's"
    )
    sub.add_argument("--dimensions", nargs="+", default=DIMENSIONS, help="vbench; default: the paper's six")
    add_sampling(sub)

    sub = command("check", check, "try every part of a training run once with the real weights, in minutes")
    sub.add_argument("model", help="stock pipeline folder or Hub id")
    sub.add_argument("--dtype", choices=DTYPES, default="float32")
    for name, value in CHECKED.items():
        sub.add_argument(f"--{name}", type=extent, help=f"default: as the pipeline's folder says, else {value}")
    sub.add_argument("--device", default=None, help="default: cuda if there is one, else cpu")
    sub.add_argument("--output", type=Path, default=Path("check.mp4"), help="the mp4 file of a short video")
    sub.add_argument("--overwrite", action="store_true")

    what = "which layers can become linear and what that saves, without training; an interrupted run is continued"
    sub = command("analyze", analyze, what)
    sub.add_argument("model", help="stock pipeline folder or Hub id")
    sub.add_argument("--dtype", choices=DTYPES, default="float32")
    add_output_dir(sub)
    sub.add_argument("--device", default=None, help="default: cuda if there is one, else cpu")
    sub.add_argument("--speedup", type=speedup, default=1.3, help='wanted of one forward; "none" makes no proposal')
    what = "one caption a line, or .jsonl with caption and image; default: linvideo's own captions"
    sub.add_argument("--prompts_file", type=Path, help=what)
    sub.add_argument("--negative_prompt", default="", help="the one you generate with")
    sub.add_argument("--num_trajectories", type=positive, default=4, help="videos sampled, each for another prompt")
    for name, value in DEFAULTS.items():
        kind = number if isinstance(value, float) else extent
        sub.add_argument(f"--{name}", type=kind, help=f"default: as the pipeline's folder says, else {value}")
    sub.add_argument("--flow_shift", type=number, help="of the scheduler; default: the pipeline's own")
    size = ("HEIGHT", "WIDTH", "NUM_FRAMES")
    sub.add_argument("--timed_size", type=extent, nargs=3, metavar=size, help="of the timed video; default: as sampled")
    sub.add_argument("--warmup_steps", type=natural, default=80, help="of the feature maps")
    sub.add_argument("--num_states", type=positive, default=24, help="of the videos, that errors are measured on")
    sub.add_argument("--batch_size", type=positive, default=1, help="videos sampled at once, states a forward")
    sub.add_argument("--seed", type=natural, default=0)

    sub = command("info", info, "say what a pipeline's attention layers are")
    add_model(sub)
    return parser


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] in (["train"], ["distill"]):  # their flags are the config's own; jsonargparse reads them
            {"train": train, "distill": distill}[argv[0]](argv[1:])
            return 0
        parser = make_parser()
        args, args.train_options = parser.parse_known_args([underscored(word) for word in argv])
        if args.train_options and args.run not in (plan, collect):
            parser.error(f"unrecognized arguments: {' '.join(args.train_options)}")
        if hasattr(args, "device"):
            args.device = choose_device(args.device)
        return args.run(args) or 0
    except (ValueError, OSError) as error:
        print(f"linvideo: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY):
            reason = " ".join(str(error).split()) or "the system gave no more"
            print(f"linvideo: error: not enough memory: {reason[:400]}", file=sys.stderr)
            return 1
        if str(error).startswith("Symlink loop"):  # so Path.resolve says before Python 3.13
            print(f"linvideo: error: {error}", file=sys.stderr)
            return 2
        # Not the user's input: a run that diverged or a failed kernel check. Everything else keeps its traceback.
        if type(error).__module__.split(".")[0] != "linvideo":
            raise
        print(f"linvideo: error: {error}", file=sys.stderr)
        return getattr(error, "exit_status", 1)
    except ModuleNotFoundError as error:
        print(f"linvideo: error: {error.name} is missing; pip install 'linvideo[train]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("linvideo: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
