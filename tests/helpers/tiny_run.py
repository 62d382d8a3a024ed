"""A complete training run in a few seconds, in this process or as a script.

The script's arguments are a folder, overrides of the config as JSON and, optionally, the stage and step at which it
kills itself. It prints a line when everything is imported.
"""

import copy
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import torch
from tiny import tiny_pipeline, tiny_transformer

from linvideo.run import checkpoint
from linvideo.run.read_config import from_dict
from linvideo.run.session import Run
from linvideo.trajectories import atomic_files, store
from linvideo.transfer import TrainResult, train, trainer
from linvideo.transfer.train_config import TrainConfig

HELPERS = Path(__file__).parent
ROOT = HELPERS.parents[1]
# for processes that run or import this file from the checkout
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels", HELPERS))),
}
# for both transfers and distillations
COMMON = {
    "train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "checkpointing_steps": 2,
    "progress": False,
    "prompts": {"max_sequence_length": 20, "negative_prompt": "dull"},
    "trajectories": {
        "num_trajectories": 6,
        "num_inference_steps": 4,
        "guidance_scale": 2.0,
        "height": 32,
        "width": 32,
        "num_frames": 5,
        "batch_size": 2,
        "shard_size": 2,
    },
}
PROMPTS = ["a red fox runs", "two white boats race", "rain falls on a pond"]


def tiny_config(output_dir, **overrides) -> TrainConfig:
    """Return a config in which every stage trains a little and every part with state is in use.

    `overrides` replace top-level values and sections.
    """
    values = {
        **copy.deepcopy(COMMON),
        "output_dir": str(output_dir),
        "max_train_steps": 6,
        "use_ema": True,
        "warmup": {"max_train_steps": 4, "batch_size": 2},
        "sensitivity": {"num_states": 6, "batch_size": 4},
        "selection": {"max_train_steps": 5, "num_linear_layers": 2, "objective": "hybrid"},
        "objective": {"name": "hybrid", "mse_steps": 1},
        "optimizer": {"lr_scheduler": "cosine", "lr_warmup_steps": 1},
    }
    return from_dict({**values, **overrides}, TrainConfig)


def tiny_teacher():
    return tiny_pipeline(tiny_transformer(num_layers=3, ffn_dim=32))


def tiny_experts(**transformers):
    """Return a pipeline like Wan 2.2's; with 4 steps the timesteps are 1000, 859, 603 and 9, two for each expert."""
    first, second = (tiny_transformer(num_layers=3, ffn_dim=32, seed=seed) for seed in (0, 1))
    return tiny_pipeline(**{"transformer": first, "transformer_2": second, **transformers}, boundary_ratio=0.7)


def run(output_dir, **overrides) -> TrainResult:
    teacher = tiny_experts() if "expert" in overrides else tiny_teacher()
    return train(tiny_config(output_dir, **overrides), teacher, prompts=PROMPTS)


@contextmanager
def watched(module: ModuleType = trainer) -> Iterator[SimpleNamespace]:
    """Record what `train` in the module trainer, or `distill` in distiller, makes on the way.

    The yielded namespace gets run, source, converted and data and, for a training, student and teacher, for a
    distillation models.
    """
    seen = SimpleNamespace()

    def keep(function: str, *names: str):
        original = getattr(module, function)

        def call(*arguments, **options):
            result = original(*arguments, **options)
            vars(seen).update(zip(names, result if isinstance(result, tuple) else (result,), strict=False))
            return result

        return mock.patch.object(module, function, call)

    models = ("student", "teacher") if module is trainer else ("models",)
    with keep("prepare", "run", "source", "converted"), keep("open_data", "data"), keep("make_models", *models):
        yield seen


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(stage: str, step: int) -> None:
    """Have this process killed when the run reaches `step` of `stage`, at the worst moment we know of."""
    if stage == "trajectories":  # shard `step` is on disk, but its entry is not yet
        write_json = store.write_json
        store.write_json = lambda path, *rest, **options: (
            die() if path.name == f"shard-{step:06d}.json" else write_json(path, *rest, **options)
        )
    elif stage == "prompts":  # half of the prompts' file is written

        def half(_, path, *__):
            Path(path).write_bytes(b"half")
            die()

        atomic_files.save_file = half
    elif stage == "checkpoint":  # the `step`-th checkpoint has its tensors but not its state.json
        original_text, written = checkpoint.write_text, []
        checkpoint.write_text = lambda path, text: (
            die() if len(written) == step else (written.append(path), original_text(path, text))
        )
    else:
        report = Run.report

        def report_and_die(self, **values):
            report(self, **values)
            if (self.stage, self.stage_step) == (stage, step):
                die()

        Run.report = report_and_die


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, overrides, *point = sys.argv[1:]
    if point:
        die_at(point[0], int(point[1]))
    print("started", flush=True)
    run(folder, **json.loads(overrides))
