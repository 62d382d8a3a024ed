"""`linvideo train`."""

import argparse

from linvideo.commands.shared import TEACHER, add_config_options, announce_run, print_report, read_training_config

SUMMARY = "convert a stock pipeline by selective transfer and fine-tune it; also under torchrun"
EXAMPLES = """
linvideo train --config demo --output_dir run
torchrun --nproc_per_node=8 -m linvideo train --config run.yaml --output_dir run --resume_from_checkpoint latest
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_options(parser, TEACHER)


def run(args: argparse.Namespace) -> None:
    from linvideo.run.parallel import disconnect
    from linvideo.transfer import TrainConfig, train

    config = read_training_config(args, TrainConfig)
    selection = config.selection.max_train_steps if config.selection.method == "learned" else 0
    stages = {"warm-up": config.warmup.max_train_steps, "selection": selection, "fine-tuning": config.max_train_steps}
    announce_run(config, stages)
    result = train(config)
    disconnect()  # not after an error: the other ranks may wait in a collective that this one will never join
    if result.pipeline is not None:  # only the first rank has it
        windows = f"window layers: {result.layers_window}; " if result.layers_window else ""
        print(f"linear layers: {result.layers_linear}; {windows}the converted pipeline is in {result.pipeline_path}")
        print_report(config.output_dir)
