"""A plan of a training run: what it needs as configured, and if that does not fit, the simplest layout that does."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from itertools import product
from math import isqrt
from typing import Any

from linvideo.planning.hours import collection_hours, measured_here, shared_hours, stage_hours, steps_per_hour
from linvideo.planning.memory import TRAINING, Layout, condition_bytes, saved, stage_memory, stages, store_bytes
from linvideo.planning.sizes import TEXT_TOKENS, Sizes
from linvideo.run.parallel import check_divisible, check_window_heads
from linvideo.trajectories.prompts import check_length
from linvideo.transfer.train_config import TrainConfig

# The share of a GPU's memory that is left for the CUDA context, libraries, the kernels' scratch memory and
# fragmentation: a rule of thumb.
RESERVE = 0.1
MOST_GPUS, LARGEST_BATCH = 100_000, 10**9  # limits, because a layout is tried for every divisor
LORA_RANK = 64  # suggested when nothing else fits
NODE = 8  # GPUs with fast links between them


def make_plan(
    sizes: Sizes,
    config: TrainConfig,
    gpus: int = 1,
    gpu_memory: float = 80.0,
    critic: bool = False,
    forward_seconds: float | None = None,
) -> dict[str, Any]:
    """Return the plan as plain values, in bytes and seconds. A suggested layout is None if nothing fits.

    Args:
        sizes: The model's sizes.
        config: The run's configuration.
        gpus: Number of processes that torchrun would start with this config.
        gpu_memory: Memory of one GPU, in GB of 10^9 bytes.
        critic: Whether a fake-score network is trained as well: see Layout.
        forward_seconds: Measured time of one forward of the teacher with one video on one GPU. None means the time that
            `linvideo check` or `linvideo analyze` has measured on this machine, if any.

    Raises:
        ValueError: A number is out of range, a degree of parallelism does not divide what it splits, more linear layers
            are requested than the model has, or the model does not take prompts of this length.
    """
    if not 1 <= gpus <= MOST_GPUS:
        raise ValueError(f"gpus must be from 1 to {MOST_GPUS}, got {gpus}")
    for name, value in (("gpu_memory", gpu_memory), ("forward_seconds", forward_seconds)):
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name} must be a positive number, got {value}")
    shard = config.parallel.check(gpus)
    check_divisible(sizes.config, sizes.latents, config.parallel)
    if config.selection.window_layers:
        check_window_heads(sizes.config.num_attention_heads, config.parallel)
    check_length(config.prompts.max_sequence_length or TEXT_TOKENS, sizes.config)
    given = {"forward": {"seconds": forward_seconds, "source": "as given by the user"}}
    measured = measured_here(sizes, config) if forward_seconds is None else given
    budget = gpu_memory * 1e9 * (1 - RESERVE)
    if config.global_batch(gpus) > LARGEST_BATCH:
        raise ValueError(f"the global batch must be at most {LARGEST_BATCH}, got {config.global_batch(gpus)}")
    data_ranks = gpus // config.parallel.context_degree
    warmup = -(-config.warmup.batch_size // data_ranks)
    configured = Layout(
        gpus=gpus,
        shard=shard,
        context_parallel=config.parallel.context_degree,
        gradient_checkpointing=config.gradient_checkpointing,
        micro_batch=config.train_batch_size,
        accumulation=config.gradient_accumulation_steps,
        autocast=config.mixed_precision == "bf16",
        lora=config.lora.rank,
        offload_teacher=config.offload_teacher,
        critic=critic,
        forward_batch=(config.trajectories.batch_size, warmup, config.sensitivity.batch_size),
    )

    def first_that_fits(candidates: Iterable[Layout]) -> dict | None:
        tried = (evaluate(sizes, config, layout, budget, measured) for layout in candidates)
        return next((found for found in tried if found["fits"]), None)

    hours = collection_hours(config, measured)
    columns = {"as configured": evaluate(sizes, config, configured, budget, measured)}
    if not columns["as configured"]["fits"]:  # suggest autocast: a model that is too large in fp32 is also slow in it
        columns["suggested"] = first_that_fits(layouts(sizes, replace(configured, autocast=True)))
    return {
        "model": sizes.name,
        "parameters": sizes.parameters,
        "layers": sizes.config.num_layers,
        "linear_layers": config.selection.target(sizes.config.num_layers),
        "window_layers": len(config.selection.window_layers or ()),
        "tokens": sizes.tokens,
        "gpus": gpus,
        "gpu_memory": gpu_memory * 1e9,
        "usable_memory": budget,
        "global_batch": configured.global_batch,
        "saved_for_backward": activations(sizes, config, configured),
        "layouts": columns,
        "store_bytes": store_bytes(config, sizes),
        "condition_bytes": condition_bytes(sizes, configured),
        "collection_hours": hours and shared_hours(hours, config, gpus),
        "measured": measured,
    }


def layouts(sizes: Sizes, start: Layout) -> Iterator[Layout]:
    """Yield layouts with the GPUs and the global batch of `start`, the simplest first.

    Smaller micro batches come first, then gradient checkpointing, more sharding and context parallelism; LoRA comes
    last.
    """
    gpus, batch, heads = start.gpus, start.global_batch, sizes.config.num_attention_heads
    # context parallelism (Ulysses) divides heads and tokens; the remaining factor of the GPUs divides the batch
    contexts = [n for n in divisors(gpus) if sizes.tokens % n == heads % n == batch % (gpus // n) == 0]
    shards = sorted({1, gpus, *(n for n in divisors(gpus) if n == NODE)})
    checkpoints = sorted({start.gradient_checkpointing, True})
    adapters = (start.lora,) if start.lora or start.critic else (None, LORA_RANK)
    for rank, context, shard, checkpoint in product(adapters, contexts, shards, checkpoints):
        samples = batch * context // gpus
        for micro in reversed(divisors(samples)):
            yield replace(
                start,
                shard=shard,
                context_parallel=context,
                gradient_checkpointing=checkpoint,
                micro_batch=micro,
                accumulation=samples // micro,
                lora=rank,
                offload_teacher=start.offload_teacher and rank is None,
                forward_batch=(1, 1, 1),
            )


def evaluate(sizes: Sizes, config: TrainConfig, layout: Layout, budget: float, measured: dict) -> dict[str, Any]:
    """Return the layout's memory in each stage, its pace, and its options for `linvideo train`."""
    memory = {stage: stage_memory(sizes, config, layout, stage) for stage in stages(config)}
    totals = {stage: sum(parts.values()) for stage, parts in memory.items()}
    return {
        "layout": asdict(layout),
        "stages": memory,
        "totals": totals,
        "fits": max(totals.values()) <= budget,
        "steps_per_hour": steps_per_hour(config, layout, measured),
        "hours": stage_hours(sizes, config, layout, measured),
        "options": options(layout),
    }


def activations(sizes: Sizes, config: TrainConfig, start: Layout) -> dict[str, dict[str, int]]:
    """Return, per training stage, the bytes saved for the backward of one micro batch of `start`, with and without
    gradient checkpointing."""
    names = {"without gradient checkpointing": False, "with gradient checkpointing": True}
    chosen = {name: replace(start, gradient_checkpointing=on) for name, on in names.items()}
    return {
        stage: {name: saved(sizes, config, layout, stage) for name, layout in chosen.items()}
        for stage in stages(config)
        if stage in TRAINING
    }


def options(layout: Layout) -> list[str]:
    """Return a layout as options for `linvideo train`, under torchrun with one process per GPU."""
    trajectories, warmup, sensitivity = layout.forward_batch
    warmup *= layout.gpus // layout.context_parallel  # the option is the batch over all GPUs
    chosen = [
        f"--mixed_precision {'bf16' if layout.autocast else 'no'}",
        f"--gradient_checkpointing {str(layout.gradient_checkpointing).lower()}",
        f"--train_batch_size {layout.micro_batch}",
        f"--gradient_accumulation_steps {layout.accumulation}",
        f"--trajectories.batch_size {trajectories} --warmup.batch_size {warmup} --sensitivity.batch_size {sensitivity}",
    ]
    if layout.gpus > 1:
        chosen += [f"--parallel.shard_degree {layout.shard}", f"--parallel.ulysses_degree {layout.context_parallel}"]
    if layout.lora is not None:
        chosen.append(f"--lora.rank {layout.lora}")
    if layout.offload_teacher:
        chosen.append("--offload_teacher true")
    return chosen


def divisors(number: int) -> list[int]:
    small = [n for n in range(1, isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
