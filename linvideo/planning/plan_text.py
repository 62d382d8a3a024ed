"""A plan as text."""

from collections.abc import Iterable
from typing import Any

from linvideo.planning.memory import STAGES, TRAINING


def text(plan: dict[str, Any]) -> str:
    """Format what `make_plan` returns: a table per training stage with a column per layout, and lines around them."""
    found = {name: column for name, column in plan["layouts"].items() if column is not None}
    columns = found.values()
    count = plan["window_layers"]
    windows = f" and {count} window layer{'s'[: count != 1]}" if count else ""
    lines = [
        f"{plan['model']}: {plan['parameters'] / 1e9:.3f} billion parameters; {plan['linear_layers']} of"
        f" {plan['layers']} layers become linear{windows}; {plan['tokens']:,} tokens per video; global batch"
        f" {plan['global_batch']}",
        f"{plan['gpus']} x {_gb(plan['gpu_memory'])} GB (10^9 bytes), of which the plan uses at most"
        f" {_gb(plan['usable_memory'])} GB each; memory is calculated from sizes, not measured",
    ]
    for stage in (stage for stage in TRAINING if stage in plan["saved_for_backward"]):
        parts = dict.fromkeys(part for column in columns for part in column["stages"][stage])
        lines += ["", _row(f"{stage}, GB on each GPU", found), _row("GPUs", (c["layout"]["gpus"] for c in columns))]
        lines += [_row(part, (_gb(column["stages"][stage].get(part)) for column in columns)) for part in parts]
        for name, size in plan["saved_for_backward"][stage].items():
            lines.append(f"  as configured, GB saved for the backward {name}: {_gb(size)}")
        rates = (_rate(column["steps_per_hour"][stage]) for column in columns)
        lines.append(_row("steps per hour, without communication", rates))
    lines += ["", _row("total, GB on each GPU", found)]
    lines += [_row(stage, (_gb(column["totals"].get(stage)) for column in columns)) for stage in STAGES]
    lines.append(_row("fits", ("yes" if column["fits"] else "no" for column in columns)))
    lines += [_row("hours in total", (_hours(column["hours"]) for column in columns)), ""]
    lines.append(f"options for linvideo train{', under torchrun' if plan['gpus'] > 1 else ''}:")
    for name, column in plan["layouts"].items():
        lines.append(f"{name}: {' '.join(column['options']) if column else 'nothing fits with this global batch'}")
        if column and column["layout"]["critic"]:
            lines.append("  with a critic: fine-tuning stands for linvideo distill, which takes the same options")
    hours = plan["collection_hours"]
    time = "unmeasured (run linvideo check or analyze on this machine, or give --forward_seconds)"
    time = time if hours is None else f"{hours:.1f} hours on {plan['gpus']} GPU{'s' * (plan['gpus'] > 1)}"
    lines.append(f"trajectories: {_gb(plan['store_bytes'])} GB on disk; time to collect them: {time}")
    if plan["condition_bytes"]:
        size = f"{plan['condition_bytes'] / 1e6:.2f} MB per prompt"
        lines.append(f"image conditions: {size}, on disk and in the CPU memory of every process")
    if forward := plan["measured"].get("forward"):
        lines.append(f"  forward: {forward['seconds']:.3f} s per video ({forward['source']})")
        lines.append("  steps per hour are estimated from it: a backward counts as two forwards, any layer as softmax")
    return "\n".join(lines)


def _hours(hours: dict[str, float] | None) -> str:
    return "unmeasured" if hours is None else f"{sum(hours.values()):.3g}"


def _rate(rate: float | None) -> str:
    return "unmeasured" if rate is None else f"{rate:.0f}"


def _gb(size: int | None) -> str:
    return f"{size / 1e9:.2f}" if size else ""


def _row(name: str, cells: Iterable) -> str:
    return f"{name:38}" + "".join(f"{cell:>16}" for cell in cells)
