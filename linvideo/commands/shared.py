"""What several commands share: arguments and their types, loading, a video's settings, refusals, announcements."""

import argparse
import math
import os
import re
from pathlib import Path

DTYPES = ("float32", "float16", "bfloat16")
DEFAULTS = {"height": 480, "width": 832, "num_frames": 81, "num_inference_steps": 50, "guidance_scale": 5.0}  # Wan's
AS_DISTILLED = ("num_inference_steps", "guidance_scale")  # a distilled model has these of its own
# MODEL of the commands that read a config
TEACHER = "the teacher, a stock pipeline folder or Hub id; default: the config's pretrained_model_name_or_path"
LARGEST = 100_000  # as linvideo.trajectories.collect.LARGEST, without its imports


# types for argparse


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


# arguments; `parser` is a parser or a group of one


def add_model(parser, what: str = "pipeline folder or Hub id, converted or stock") -> None:
    parser.add_argument("model", metavar="MODEL", help=what)


def add_dtype(parser, default: str | None = None) -> None:
    """Without a default the device decides, see choose_dtype."""
    what = "of the weights; default: " + (default or "bfloat16 on CUDA, else float32")
    parser.add_argument("--dtype", choices=DTYPES, default=default, help=what)


def add_device(parser) -> None:
    parser.add_argument("--device", default=None, help="default: cuda if there is one, else cpu")


def add_output_dir(parser) -> None:
    parser.add_argument("--output_dir", type=Path, required=True, help="the folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in that folder")


def add_video(parser) -> None:
    """What a sampled video is like."""
    parser.add_argument("--negative_prompt", default="", help="what the video should not be; default: empty")
    for name, value in DEFAULTS.items():
        own = "; of a distilled model, as it was distilled" if name in AS_DISTILLED else ""
        add_setting(parser, name, value, f"default: the pipeline's own, {value} with Wan{own}")
    parser.add_argument("--seed", type=natural, default=0, help="of the noise; default: 0")
    parser.add_argument("--fps", type=positive, help="of the mp4 files; default: the model's own, 16 with Wan 2.1")


def add_setting(parser, name: str, value: int | float, what: str) -> None:
    """One of a video's settings; None where it is not given."""
    parser.add_argument(f"--{name}", type=number if isinstance(value, float) else extent, help=what)


def add_config_options(parser, what: str) -> None:
    """The command takes the options of a run's config, and before them MODEL: see read_config.

    argparse would take the value of an option that it does not know for MODEL. So `main` leaves all these words in
    args.config_options.
    """
    parser.usage = f"{parser.prog} [MODEL] [options]"
    parser.description += f"\n\nMODEL: {what}"
    parser.set_defaults(config_options=[], help_texts=(parser.description, parser.epilog))


# loading


def read_config(args: argparse.Namespace, kind, first=(), last=(), model: str = "pretrained_model_name_or_path"):
    """The config of class `kind` from MODEL, which is the option `model` and wins, and from the config's options.

    first, last: options of the command's own, before the user's and after them, where they win.
    """
    from linvideo.run import load_config

    words = _config_words(args, model)
    try:
        return load_config([*first, *words, *last], kind, *args.help_texts)
    except ValueError as error:
        if found := re.search(r"unrecognized arguments: ([^-]\S*)", str(error)):
            raise ValueError(f"expected MODEL before the options, got {found[1]} among them") from None
        raise


def read_training_config(args: argparse.Namespace, kind, last=(), model: str = "pretrained_model_name_or_path"):
    """As read_config, for a run that trains; refuses defaults that are not for its model."""
    from linvideo.planning.recipes import check_choice_of_defaults
    from linvideo.run.read_config import given_options

    config = read_config(args, kind, last=last, model=model)
    check_choice_of_defaults(config, given_options(_config_words(args, model), kind))
    return config


def _config_words(args: argparse.Namespace, model: str) -> list[str]:
    """The options of a config, with MODEL as the option `model` at their end."""
    words = args.config_options
    if words and not words[0].startswith("-"):
        words = [*words[1:], f"--{model}", words[0]]
    return words


def choose_device(name: str | None) -> str:
    """The device that is asked for, if it is there, else CUDA or the CPU."""
    import torch

    from linvideo.trajectories.devices import check_device

    check_device(name)
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def choose_dtype(name: str | None, device: str) -> str:
    """The dtype that is asked for, else the one that suits the device."""
    return name or ("bfloat16" if device.startswith("cuda") else "float32")


def load(model: str, dtype: str, **components):
    """The pipeline; `components` are given to it in place of its own."""
    import torch

    from linvideo import models
    from linvideo.models.pipelines import wan_dtypes

    chosen = getattr(torch, dtype)
    print(f"loading {model} in {dtype}", flush=True)
    pipeline = models.load_pipeline(model, dtype=wan_dtypes(chosen), **components)
    if type(getattr(pipeline, "vae", None)).__name__ != "AutoencoderKLWan":  # of another family all are meant for dtype
        for part in (getattr(pipeline, name, None) for name in ("vae", "image_encoder")):
            if part is not None and part.dtype != chosen:
                part.to(chosen)
    return pipeline


def load_teacher(model: str, dtype: str, pipeline):
    """The pipeline to compare with, sharing all that it can."""
    own = ("transformer", "transformer_2", "scheduler")
    shared = {name: part for name, part in pipeline.components.items() if name not in own and part is not None}
    return load(model, dtype, **shared)


# a video's settings


def given(args: argparse.Namespace) -> dict:
    """What of a video's settings was asked for, for `generate_video`."""
    values = {name: getattr(args, name, None) for name in ("negative_prompt", *DEFAULTS)}
    return {name: value for name, value in values.items() if value is not None}


def teachers_settings(teacher, student) -> dict:
    """What the teacher is called with next to a student that may be distilled: videos of the student's size."""
    from linvideo import models

    own = models.own_settings(student)
    shared = {name: value for name, value in models.sampling_settings(student).items() if name not in own}
    return models.sampling_settings(teacher) | shared


# refusals


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


# announcements


def announce(what: str, pipeline, settings: dict, args: argparse.Namespace) -> None:
    """Say what is about to be made, before it takes its time."""
    import inspect

    defaults = inspect.signature(pipeline.__call__).parameters
    own = {name: settings.get(name, getattr(defaults.get(name), "default", None)) for name in DEFAULTS}
    size = "the model's own size" if None in (own["height"], own["width"]) else f"{own['height']}x{own['width']}"
    words = {"num_frames": "{} frames", "num_inference_steps": "{} steps", "guidance_scale": "guidance {:g}"}
    rest = [word.format(own[name]) for name, word in words.items() if own[name] is not None]
    print(f"{what} of {', '.join([size, *rest])}, on {args.device} in {args.dtype}", flush=True)


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


def print_transformers(pipeline) -> dict:
    """Say what the attention layers are; returns the transformers by name."""
    from linvideo import models

    found = models.video_transformers(pipeline)
    for name, transformer in found.items():
        print(f"{name}: {models.describe(transformer)}")
    return found
