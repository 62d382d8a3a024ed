"""How long a run takes, estimated only from a measured time of one forward, given or measured on this machine."""

import math
from math import ceil

import torch

from linvideo.planning.memory import TRAINING, Layout, stages
from linvideo.planning.sizes import Sizes
from linvideo.run.forward_times import recall
from linvideo.transfer.train_config import TrainConfig


def measured_here(sizes: Sizes, config: TrainConfig) -> dict[str, dict]:
    """Return {"forward": {"seconds", "source"}} for one video, from what `linvideo check` or `linvideo analyze` has
    measured on this machine; empty if neither has.

    The measurement with the nearest number of tokens is used. If the number differs, the time is scaled by the
    operations of Linear layers and attention.
    """
    dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
    rows = recall(sizes.config, dtype, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if not rows:
        return {}

    def operations(tokens: int) -> int:
        return 2 * tokens * sizes.parameters + 4 * tokens**2 * sizes.width * sizes.config.num_layers

    row = min(rows, key=lambda row: abs(math.log(row["tokens"] / sizes.tokens)))
    scaled = "" if row["tokens"] == sizes.tokens else f", scaled from {row['tokens']:,} tokens"
    seconds = row["seconds"] * operations(sizes.tokens) / operations(row["tokens"])
    return {"forward": {"seconds": seconds, "source": f"{row['device']}, by {row['command']}{scaled}"}}


def stage_hours(
    sizes: Sizes, config: TrainConfig, layout: Layout, measured: dict[str, dict]
) -> dict[str, float] | None:
    """Return the hours of each stage in this layout, without communication between GPUs, checkpoints and validation.

    None if no forward was measured, and for a distillation, whose steps are different.
    """
    if "forward" not in measured or layout.critic:
        return None
    # every GPU does its share of the states; a step of the warm-up counts as two forwards
    forward, rates = measured["forward"]["seconds"] / 3600 / layout.gpus, steps_per_hour(config, layout, measured)
    given = config.selection.layers
    measured_alone = (
        sizes.config.num_layers if given is None else len([*given, *(config.selection.window_layers or ())])
    )
    found = {
        "trajectories": shared_hours(collection_hours(config, measured), config, layout.gpus),
        "warm-up": 2 * config.warmup.max_train_steps * config.warmup.batch_size * forward,
        "sensitivity": config.sensitivity.num_states * (measured_alone + 1) * forward,
    }
    counts = {"mixed stage": config.selection.max_train_steps, "fine-tuning": config.max_train_steps}
    return found | {stage: counts[stage] / rate for stage, rate in rates.items()}


def collection_hours(config: TrainConfig, measured: dict[str, dict]) -> float | None:
    """Return the hours that one GPU needs for all trajectories; None if no forward was measured."""
    wanted = config.trajectories
    forwards = wanted.num_inference_steps * (2 if wanted.guidance_scale > 1 else 1)
    return wanted.num_trajectories * forwards * measured["forward"]["seconds"] / 3600 if "forward" in measured else None


def shared_hours(hours: float, config: TrainConfig, gpus: int) -> float:
    """Return the hours of a collection on several GPUs, each of which takes whole shards."""
    shards = ceil(config.trajectories.num_trajectories / config.trajectories.shard_size)
    return hours * ceil(shards / gpus) / shards


def steps_per_hour(config: TrainConfig, layout: Layout, measured: dict[str, dict]) -> dict[str, float | None]:
    """Return optimizer steps per hour for each training stage, without communication between GPUs; None if no forward
    was measured."""
    rates = {}
    for stage in [stage for stage in stages(config) if stage in TRAINING]:
        name = config.objective.name if stage == "fine-tuning" else config.selection.objective
        names = ("mse", "adm") if name == "hybrid" else (name,)  # hybrid alternates between both
        seconds = [_sample_seconds(each, config, layout, measured) for each in names]
        share = layout.micro_batch * layout.accumulation / layout.context_parallel / len(names)
        rates[stage] = None if None in seconds else 3600 / (share * sum(seconds))
    return rates


def _sample_seconds(objective: str, config: TrainConfig, layout: Layout, measured: dict[str, dict]) -> float | None:
    """Estimate the time of one sample, in forwards of the teacher: a backward counts as two, a recomputation as one."""
    # On the student's own states the teacher is evaluated too, and with guidance the rollouts also need the student
    # under the other condition. ADM evaluates the student once more, at x_hat.
    own = 0 if objective == "mse" else 1 + (config.trajectories.guidance_scale > 1)
    forwards = 3 + layout.gradient_checkpointing + own + objective.startswith("adm")
    return forwards * measured["forward"]["seconds"] if "forward" in measured else None
