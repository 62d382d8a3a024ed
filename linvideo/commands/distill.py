"""`linvideo distill`."""

import argparse

from linvideo.commands.shared import add_config_options, announce_run

SUMMARY = "a converted model to few steps: options as of train; also under torchrun"
EXAMPLES = """
linvideo distill --config distill-demo --student_model_name_or_path run/pipeline --output_dir distilled
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_options(parser)


def run(args: argparse.Namespace) -> None:
    from linvideo.distillation import DistillConfig, Distiller
    from linvideo.run import load_config
    from linvideo.run.parallel import disconnect

    config = load_config(args.config_options, DistillConfig)
    announce_run(config, {"regression": config.regression.max_train_steps, "DMD": config.max_train_steps})
    result = Distiller(config).train()
    disconnect()  # not after an error, see train
    if result.pipeline is not None:
        print(f"timesteps: {result.timesteps}; saved the distilled pipeline to {result.pipeline_path}")
