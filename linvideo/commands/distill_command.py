"""`linvideo distill`."""

import argparse

from linvideo.commands.shared import add_config_options, announce_run, print_report, read_training_config

SUMMARY = "train a converted pipeline to sample in a few steps without guidance; also under torchrun"
EXAMPLES = """
linvideo distill run/pipeline --config distill-demo --output_dir distilled
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = "folder or Hub id of the student, a converted pipeline; default: the config's student_model_name_or_path"
    add_config_options(parser, what)


def run(args: argparse.Namespace) -> None:
    from linvideo.distillation import DistillConfig, distill
    from linvideo.run.parallel import disconnect

    config = read_training_config(args, DistillConfig, model="student_model_name_or_path")
    announce_run(config, {"regression": config.regression.max_train_steps, "DMD": config.max_train_steps})
    result = distill(config)
    disconnect()  # not after an error, see train_command
    if result.pipeline is not None:
        print(f"the distilled pipeline samples at the timesteps {result.timesteps} and is in {result.pipeline_path}")
        print_report(config.output_dir)
