"""A plan of a training run: what it needs as configured, and where that does not fit, the simplest layout that does."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

from linvideo.planning.memory import TRAINING, Layout, saved, stage_memory, stages, store_bytes
from linvideo.planning.pace import RESULTS, collection_hours, read_results, steps_per_hour
from linvideo.planning.sizes import Sizes
from linvideo.training.config import TrainConfig

RESERVE = 0.1  # of a GPU's memory, for the CUDA context, libraries, kernels' scratch and fragmentation; a rule of thumb
LORA_RANK = 64  # suggested where nothing else fits


def make_plan(
    sizes: Sizes,
    config: TrainConfig,
    gpus: int = 1,
    gpu_memory: float = 80.0,
    lora: int | None = None,
    critic: bool = False,
    forward_seconds: float | None = None,
    results: Path = RESULTS,
) -> dict[str, Any]:
    """The plan as plain values, in bytes and seconds; a layout that was looked for and not found is None.

    Args:
        gpu_memory: of one GPU in GB of 10^9 bytes. lora, critic: see Layout.
        forward_seconds: one forward of the teacher with one video on one GPU; None looks into the folder `results`.

    Raises:
        ValueError: a number out of range, or more linear layers asked for than there are.
    """
    for name, value in (("gpus", gpus), ("lora", lora)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for name, value in (("gpu_memory", gpu_memory), ("forward_seconds", forward_seconds)):
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name} must be a positive number, got {value}")
    given = {"forward": {"seconds": forward_seconds, "source": "as given"}}
    measured = read_results(results, sizes) if forward_seconds is None else given
    budget = gpu_memory * 1e9 * (1 - RESERVE)
    configured = Layout(
        gradient_checkpointing=config.gradient_checkpointing,
        micro_batch=config.train_batch_size,
        accumulation=config.gradient_accumulation_steps,
        autocast=config.mixed_precision == "bf16",
        forward_batch=(config.trajectories.batch_size, config.warmup.batch_size, config.sensitivity.batch_size),
    )

    def first_that_fits(candidates: Iterable[Layout]) -> dict | None:
        tried = (evaluate(sizes, config, layout, budget, measured) for layout in candidates)
        return next((found for found in tried if found["fits"]), None)

    columns, start = {"as configured": evaluate(sizes, config, configured, budget, measured)}, configured
    if not columns["as configured"]["fits"]:
        start = replace(configured, autocast=True)  # what is too large in fp32 is also slow in it
        columns["train today"] = first_that_fits(layouts(sizes, start))
    if gpus > 1 or lora or critic or None in columns.values():
        ranks = (lora,) if lora else (None, LORA_RANK)
        columns["suggested"] = first_that_fits(layouts(sizes, start, gpus, ranks, critic))
    return {
        "model": sizes.name,
        "parameters": sizes.parameters,
        "layers": sizes.config.num_layers,
        "linear_layers": config.selection.target(sizes.config.num_layers),
        "tokens": sizes.tokens,
        "gpus": gpus,
        "gpu_memory": gpu_memory * 1e9,
        "usable_memory": budget,
        "global_batch": config.train_batch_size * config.gradient_accumulation_steps,
        "saved_for_backward": activations(sizes, config, configured),
        "layouts": columns,
        "store_bytes": store_bytes(config, sizes),
        "collection_hours": collection_hours(config, measured),
        "measured": measured,
    }


def layouts(
    sizes: Sizes, start: Layout, gpus: int = 1, ranks: tuple[int | None, ...] = (None,), critic: bool = False
) -> Iterator[Layout]:
    """Layouts with start's global batch, the simplest first; by default those that `linvideo train` has options for.

    Smaller micro batches are tried first, then gradient checkpointing, FSDP2, context parallelism, and LoRA last.
    """
    batch, heads = start.micro_batch * start.accumulation, sizes.config.num_attention_heads
    # heads and tokens are what context parallelism (Ulysses) divides; the rest of the GPUs share the batch
    contexts = [n for n in divisors(gpus) if sizes.tokens % n == heads % n == batch % (gpus // n) == 0]
    sharding, checkpoints = sorted({False, gpus > 1}), sorted({start.gradient_checkpointing, True})
    for rank, context, shard, checkpoint in product(ranks, contexts, sharding, checkpoints):
        samples = batch * context // gpus
        for micro in reversed(divisors(samples)):
            yield Layout(gpus, context, shard, checkpoint, micro, samples // micro, start.autocast, rank, critic)


def evaluate(sizes: Sizes, config: TrainConfig, layout: Layout, budget: float, measured: dict) -> dict[str, Any]:
    """The layout's memory in each stage, its pace, and what `linvideo train` takes of it in this version."""
    memory = {stage: stage_memory(sizes, config, layout, stage) for stage in stages(config)}
    totals = {stage: sum(parts.values()) for stage, parts in memory.items()}
    return {
        "layout": asdict(layout),
        "stages": memory,
        "totals": totals,
        "fits": max(totals.values()) <= budget,
        "steps_per_hour": steps_per_hour(config, layout, measured),
        "options": options(layout),
        "not_in_train": not_in_train(layout),
    }


def activations(sizes: Sizes, config: TrainConfig, start: Layout) -> dict[str, dict[str, int]]:
    """Training stage -> bytes saved for the backward of one of start's micro batches, by gradient checkpointing."""
    names = {"without gradient checkpointing": False, "with gradient checkpointing": True}
    chosen = {name: replace(start, gradient_checkpointing=on) for name, on in names.items()}
    return {
        stage: {name: saved(sizes, config, layout, stage) for name, layout in chosen.items()}
        for stage in stages(config)
        if stage in TRAINING
    }


def options(layout: Layout) -> list[str]:
    """The part of a layout that `linvideo train` takes, as it takes it."""
    batches = zip(("trajectories", "warmup", "sensitivity"), layout.forward_batch, strict=True)
    return [
        f"--mixed_precision {'bf16' if layout.autocast else 'no'}",
        f"--gradient_checkpointing {str(layout.gradient_checkpointing).lower()}",
        f"--train_batch_size {layout.micro_batch}",
        f"--gradient_accumulation_steps {layout.accumulation}",
        *(f"--{section}.batch_size {size}" for section, size in batches),
    ]


def not_in_train(layout: Layout) -> list[str]:
    """The part that `linvideo train` has no options for in this version, in which it runs on one GPU."""
    replicas = layout.gpus // layout.context_parallel
    parts = {
        f"data parallel over {replicas}": replicas > 1,
        f"FSDP2 over {layout.gpus}": layout.sharded,
        f"context parallel over {layout.context_parallel}": layout.context_parallel > 1,
        f"LoRA of rank {layout.lora}": layout.lora is not None,
        "a critic": layout.critic,
    }
    return [name for name, wanted in parts.items() if wanted]


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
