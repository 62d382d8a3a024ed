"""What several commands share: arguments and their types, loading, video settings, refusals, announcements."""

import argparse
import math
import os
import re
from pathlib import Path

DTYPES = ("float32", "float16", "bfloat16")
DEFAULTS = {"height": 480, "width": 832, "num_frames": 81, "num_inference_steps": 50, "guidance_scale": 5.0}  # Wan's
SETTINGS = {  # of a video: the metavar of its option, and what it is
    "height": ("PIXELS", "height of a video"),
    "width": ("PIXELS", "width of a video"),
    "num_frames": ("N", "number of frames of a video"),
    "num_inference_steps": ("N", "number of sampling steps"),
    "guidance_scale": ("SCALE", "guidance scale"),
}
# MODEL of the commands that read a config
TEACHER = "folder or Hub id of the teacher, a stock pipeline; default: the config's pretrained_model_name_or_path"
ANCHORS = ("first", "last")  # those of linvideo.ops.window_attn, which needs torch
LARGEST = 100_000  # the same as linvideo.trajectories.collect.LARGEST, but without its imports


# types for argparse


def whole_number(least: int, most: int = 2**63 - 1):
    """A type for argparse: whole numbers in this range."""

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
    """A type for argparse: finite numbers that are not negative."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be finite and not negative, got {text}")
    return value


positive, natural, extent = whole_number(1), whole_number(0), whole_number(1, LARGEST)


# arguments; `parser` is a parser or an argument group of one


def add_model(parser, what: str = "folder or Hub id of a pipeline, converted or stock") -> None:
    parser.add_argument("model", metavar="MODEL", help=what)


def add_dtype(parser, default: str | None = None) -> None:
    """Add --dtype. Without a default the device decides: see choose_dtype."""
    what = "dtype of the weights; default: " + (default or "bfloat16 on CUDA, otherwise float32")
    parser.add_argument("--dtype", choices=DTYPES, default=default, help=what)


def add_device(parser) -> None:
    what = "device, such as cuda:1; default: cuda if PyTorch sees a GPU, otherwise cpu"
    parser.add_argument("--device", default=None, help=what)


def add_output_dir(parser, otherwise: str = "") -> None:
    parser.add_argument("--output_dir", type=Path, metavar="FOLDER", required=True, help="folder for the output")
    what = "replace what is in that folder" + otherwise
    parser.add_argument("--overwrite", action="store_true", help=what)


def add_prompts_file(parser, more: str = "") -> None:
    what = "text file with one caption per line, or .jsonl with a caption and an image per line" + more
    parser.add_argument("--prompts_file", type=Path, metavar="FILE", help=what)


def add_video(parser) -> None:
    """Add the options that describe a sampled video."""
    what = "description of what the video should not show; default: empty"
    parser.add_argument("--negative_prompt", metavar="TEXT", default="", help=what)
    add_settings(parser, DEFAULTS, "the pipeline's own, {} for Wan")
    parser.add_argument("--seed", type=natural, metavar="N", default=0, help="seed of the noise; default: 0")
    what = "frame rate of the mp4 files; default: the model's own, 16 for Wan 2.1"
    parser.add_argument("--fps", type=positive, metavar="RATE", help=what)


def add_settings(parser, values: dict[str, int | float], default: str) -> None:
    """Add an option for each of these video settings; it is None when it is not given.

    default: A description of the default, with {} in place of the value.
    """
    for name, value in values.items():
        metavar, what = SETTINGS[name]
        what = f"{what}; default: {default.format(value)}"
        parser.add_argument(
            f"--{name}", type=number if isinstance(value, float) else extent, metavar=metavar, help=what
        )


def add_window(parser) -> None:
    """Add the settings of window layers; `window_settings` returns those that are given."""
    what = "latent frames per chunk of a window layer, whose tokens share one window; default: 3"
    parser.add_argument("--window.chunk", type=int, metavar="N", help=what)
    what = "latent frames before and after its chunk in a window; default: 1"
    parser.add_argument("--window.overlap", type=int, metavar="N", help=what)
    what = "frames that are in every window; default: none"
    parser.add_argument("--window.anchors", nargs="+", choices=ANCHORS, help=what)
    what = "leave out the frames after a token's own chunk"
    parser.add_argument("--window.causal", action="store_const", const=True, help=what)


def window_settings(args: argparse.Namespace) -> dict | None:
    options = {name: getattr(args, f"window.{name}") for name in ("chunk", "overlap", "anchors", "causal")}
    return {name: value for name, value in options.items() if value is not None} or None


def add_config_options(parser, what: str) -> None:
    """Make the command take MODEL, and after it the options of a run's config: see read_config.

    argparse would mistake the value of an option that it does not know for MODEL. Therefore `main` leaves all these
    words in args.config_options.
    """
    parser.usage = f"{parser.prog} [MODEL] [options]"
    parser.description += f"\n\nMODEL: {what}"
    parser.set_defaults(config_options=[], help_texts=(parser.description, parser.epilog))


# loading


def read_config(args: argparse.Namespace, kind, first=(), last=(), model: str = "pretrained_model_name_or_path"):
    """Return the config of class `kind` that MODEL and the config's options make.

    MODEL sets the option `model`, even where the options set it too. first, last: Options that the command itself puts
    before and after the user's. Later options win.
    """
    from linvideo.run import load_config

    words = _config_words(args, model)
    try:
        return load_config([*first, *words, *last], kind, *args.help_texts)
    except ValueError as error:
        if found := re.search(r"unrecognized arguments: ([^-]\S*)", str(error)):
            raise ValueError(f"expected MODEL before the options, got {found[1]} after them") from None
        raise


def read_training_config(args: argparse.Namespace, kind, last=(), model: str = "pretrained_model_name_or_path"):
    """Do the same as read_config for a run that trains, and refuse defaults that do not suit its model."""
    from linvideo.planning.recipes import check_choice_of_defaults
    from linvideo.run.read_config import given_options

    config = read_config(args, kind, last=last, model=model)
    check_choice_of_defaults(config, given_options(_config_words(args, model), kind))
    return config


def _config_words(args: argparse.Namespace, model: str) -> list[str]:
    """Return the options of a config, with MODEL moved to the end as the option `model`."""
    words = args.config_options
    if words and not words[0].startswith("-"):
        words = [*words[1:], f"--{model}", words[0]]
    return words


def choose_device(name: str | None) -> str:
    """Return the requested device after checking that it exists; without a request CUDA if available, else the CPU."""
    import torch

    from linvideo.trajectories.devices import check_device

    check_device(name)
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def choose_dtype(name: str | None, device: str) -> str:
    """Return the requested dtype; without a request the one that suits the device."""
    return name or ("bfloat16" if device.startswith("cuda") else "float32")


def load(model: str, dtype: str, **components):
    """Load a pipeline, with `components` in place of its own ones."""
    import torch

    from linvideo import models
    from linvideo.models.pipelines import wan_dtypes

    chosen = getattr(torch, dtype)
    print(f"loading {model} in {dtype}", flush=True)
    pipeline = models.load_pipeline(model, dtype=wan_dtypes(chosen), **components)
    # only Wan's VAE and image encoder stay in fp32; in other families all parts are meant to have the same dtype
    if type(getattr(pipeline, "vae", None)).__name__ != "AutoencoderKLWan":
        for part in (getattr(pipeline, name, None) for name in ("vae", "image_encoder")):
            if part is not None and part.dtype != chosen:
                part.to(chosen)
    return pipeline


def load_teacher(model: str, dtype: str, pipeline):
    """Load the pipeline to compare with; it shares text encoder, VAE and whatever else it can with `pipeline`."""
    own = ("transformer", "transformer_2", "scheduler")
    shared = {name: part for name, part in pipeline.components.items() if name not in own and part is not None}
    return load(model, dtype, **shared)


# settings of a video


def given(args: argparse.Namespace) -> dict:
    """Return the video settings that the user gave, as arguments of `generate_video`."""
    values = {name: getattr(args, name, None) for name in ("negative_prompt", *DEFAULTS)}
    return {name: value for name, value in values.items() if value is not None}


def teachers_settings(teacher, student) -> dict:
    """Return the teacher's settings for a comparison: its own steps and guidance, and videos of the student's size.

    The student may be distilled; its steps and guidance are then of no use to the teacher.
    """
    from linvideo import models

    own = models.own_settings(student)
    shared = {name: value for name, value in models.sampling_settings(student).items() if name not in own}
    return models.sampling_settings(teacher) | shared


# refusals


def refuse_existing(args: argparse.Namespace) -> None:
    """Refuse a folder that is not empty. Call it before anything is loaded, so that the refusal comes at once."""
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
    """Print what is about to be made, because making it may take long."""
    import inspect

    defaults = inspect.signature(pipeline.__call__).parameters
    own = {name: settings.get(name, getattr(defaults.get(name), "default", None)) for name in DEFAULTS}
    size = "the model's default size" if None in (own["height"], own["width"]) else f"{own['height']}x{own['width']}"
    words = {"num_frames": "{} frames", "num_inference_steps": "{} steps", "guidance_scale": "guidance {:g}"}
    rest = [word.format(own[name]) for name, word in words.items() if own[name] is not None]
    print(f"{what} of {', '.join([size, *rest])}, on {args.device} in {args.dtype}", flush=True)


def announce_run(config, stages: dict[str, int]) -> None:
    """Print what a run is about to do, because it may take long. Only the first of several processes prints."""
    if os.environ.get("RANK", "0") != "0":
        return
    video = config.trajectories
    print(
        f"run in {config.output_dir}: {video.num_trajectories} trajectories of {video.height}x{video.width},"
        f" {video.num_frames} frames, {video.num_inference_steps} sampling steps, guidance {video.guidance_scale:g}"
        + "".join(f"; then {count} steps of {name}" for name, count in stages.items() if count),
        flush=True,
    )


def print_report(folder: str) -> None:
    """Say where a run's report is, unless writing it has failed."""
    from linvideo.run.run_folder import REPORT

    if (report := Path(folder) / REPORT).is_file():
        print(f"losses, layers, videos and the next commands: {report}")


def print_transformers(pipeline) -> dict:
    """Print the kinds of the attention layers, and return the transformers by name."""
    from linvideo import models

    found = models.video_transformers(pipeline)
    for name, transformer in found.items():
        print(f"{name}: {models.describe(transformer)}")
    return found
