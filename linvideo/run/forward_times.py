"""Measured durations of a teacher's forward pass, kept in a file in the user's cache folder.

`linvideo check` and `linvideo analyze` measure them on this machine, `linvideo plan` uses them.
"""

import os
from pathlib import Path
from typing import Any

import torch

from linvideo.trajectories.atomic_files import read_json, write_json
from linvideo.trajectories.devices import device_name

SHAPE = ("num_layers", "num_attention_heads", "attention_head_dim", "ffn_dim", "in_channels")


def cache_file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "linvideo", "forward_times.json")


def remember(config: Any, tokens: int, dtype: torch.dtype, device: torch.device, seconds: float, command: str) -> None:
    """Store the duration of a forward of a transformer with this config on one video of `tokens` tokens.

    A cache folder that cannot be written is ignored silently.
    """
    row = _model(config, dtype, device) | {"tokens": tokens}
    others = [other for other in _rows() if {name: other.get(name) for name in row} != row]
    try:
        write_json(cache_file(), [*others, row | {"seconds": seconds, "command": command}])
    except OSError:
        pass


def recall(config: Any, dtype: torch.dtype, device: torch.device) -> list[dict[str, Any]]:
    """Return the rows stored for such a transformer on this device, each with tokens, seconds, command and device."""
    wanted = _model(config, dtype, device)
    return [row for row in _rows() if {name: row.get(name) for name in wanted} == wanted]


def _model(config: Any, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    shape = {name: getattr(config, name) for name in SHAPE}
    return shape | {"dtype": str(dtype).removeprefix("torch."), "device": device_name(device)}


def _rows() -> list[dict[str, Any]]:
    try:
        rows = read_json(cache_file())
    except (OSError, ValueError, RecursionError):
        return []
    kinds = {"tokens": int, "seconds": float, "command": str}
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return [row for row in rows if all(isinstance(row.get(name), kind) for name, kind in kinds.items())]
