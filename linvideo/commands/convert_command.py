"""`linvideo convert`."""

import argparse
import re
from dataclasses import replace
from pathlib import Path

from linvideo.commands.shared import (
    add_dtype,
    add_model,
    add_output_dir,
    add_window,
    load,
    print_transformers,
    refuse_existing,
    window_settings,
)

SUMMARY = "replace softmax attention by linear attention in some layers of a pipeline, without training"
EXAMPLES = """
linvideo convert Wan-AI/Wan2.1-T2V-1.3B-Diffusers --layers 0 2 5-7 --output_dir untrained
linvideo convert untrained --layers 8-29 --mode window --window.chunk 3 --window.overlap 1 --output_dir all-layers
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_dtype(parser.add_argument_group("loading and saving"), default="float32")
    conversion = parser.add_argument_group("conversion")
    what = '0-based layer numbers and ranges, such as 0 2 5-7 or 0,2,5-7, or "all"; default: all'
    conversion.add_argument("--layers", nargs="+", type=layer_numbers, metavar="N", default=["all"], help=what)
    what = (
        'attention of these layers: linear alone, "mixed" with softmax attention, or "window", which is softmax'
        " attention to near latent frames and linear attention to all others; default: linear"
    )
    conversion.add_argument("--mode", choices=["mixed", "linear", "window"], default="linear", help=what)
    add_window(conversion)
    what = "feature map of the linear attention; default: hedgehog"
    conversion.add_argument("--feature_map", metavar="NAME", default="hedgehog", help=what)
    what = (
        "fitted weights of the feature maps: the feature_maps.safetensors that analyze and train write or, for window"
        " layers, analyze's window_maps.safetensors"
    )
    conversion.add_argument("--fitted_maps", type=Path, metavar="FILE", help=what)
    add_output_dir(parser.add_argument_group("output"))


def layer_numbers(text: str) -> list[int] | str:
    """A type for argparse: "all", or numbers and ranges in the form that `info` prints, such as 1,2,3 or 0-4."""
    if text == "all":
        return text
    layers = []
    for word in text.strip(",").split(","):
        if not (found := re.fullmatch(r"([0-9]{1,4})(?:-([0-9]{1,4}))?", word.strip())):
            raise argparse.ArgumentTypeError(f'expected 0-based layer numbers, such as 0 2 5-7, or "all", got {text!r}')
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first:
            raise argparse.ArgumentTypeError(f"expected a range of layers from low to high, got {word.strip()!r}")
        layers += range(first, last + 1)
    return layers


def run(args: argparse.Namespace) -> None:
    from linvideo import models
    from linvideo.models.convert import check_window
    from linvideo.workspace import remove_dead

    # a killed call may have moved the old folder into a workspace next to it: put it back before looking
    remove_dead(args.output_dir.resolve().parent)
    refuse_existing(args)
    window = window_settings(args)
    check_window(args.mode, window)  # before minutes of loading
    pipeline = load(args.model, args.dtype)
    if "all" in args.layers and len(args.layers) > 1:
        raise ValueError("--layers takes layer numbers or all, but got both")
    layers = "all" if args.layers == ["all"] else [layer for some in args.layers for layer in some]
    converted = models.convert(
        pipeline, layers, mode=args.mode, feature_map=args.feature_map, copy=False, window=window
    )
    how, state = models.Training(f"conversion ({args.mode})"), "untrained"
    if args.fitted_maps is not None:
        from linvideo.models.branches import linear_branches
        from linvideo.transfer.warmup import load_feature_maps

        if getattr(pipeline, "transformer_2", None) is not None:
            raise ValueError("--fitted_maps holds the maps of one transformer, but this pipeline has two")
        old, new = (linear_branches(models.wan_transformer(one)) for one in (pipeline, converted))
        load_feature_maps(models.wan_transformer(converted), args.fitted_maps, new.keys() - old.keys())
        how = replace(how, untrained="only the feature maps are fitted")
        state = "fitted, but all other weights are unchanged"
    models.save_pipeline(converted, args.output_dir, overwrite=args.overwrite, training=how)
    if len(print_transformers(converted)) > 1:
        print("both experts were converted, in the same layers")
    kind = "window" if args.mode == "window" else "linear"
    print(f"saved to {args.output_dir}; its new {kind} layers are {state}; to train a Wan model, use linvideo train")
