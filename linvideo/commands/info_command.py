"""`linvideo info`."""

import argparse

from linvideo.commands.shared import add_dtype, add_model, load, print_transformers

SUMMARY = "show which attention layers of a pipeline are softmax, mixed, linear or window"
EXAMPLES = """
linvideo info run/pipeline
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_dtype(parser.add_argument_group("loading"), default="float32")


def run(args: argparse.Namespace) -> None:
    from linvideo import models

    # without the text encoder: it is the largest part, and nothing here depends on it
    pipeline = load(args.model, args.dtype, text_encoder=None)
    models.video_transformers(pipeline)
    print(f"{type(pipeline).__name__}, scheduler {type(pipeline.scheduler).__name__}")
    print_transformers(pipeline)
