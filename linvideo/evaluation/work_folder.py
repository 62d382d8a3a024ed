"""A folder of long work that can be continued: what was asked for in request.json, the finished pieces in rows.json.

The process that works there holds the folder's lock (`locked`) meanwhile.
"""

from pathlib import Path
from typing import Any

import torch

from linvideo.training.files import read_json, write_json
from linvideo.training.fingerprint import fingerprint
from linvideo.workspace import LOCK, TEMPORARY, remove_dead


class WorkFolder:
    """Opens, or starts, `folder` for exactly this `request` (a JSON dict).

    Raises:
        ValueError: the folder holds something else, or work on another request.
    """

    def __init__(self, folder: str | Path, request: dict[str, Any]):
        self.path = Path(folder)
        remove_dead(self.path)  # a kill in the first write has left nothing else
        there = self.path / "request.json"
        if there.exists():
            stored = read_json(there)
            keys = sorted(key for key in {**stored, **request} if stored.get(key) != request.get(key))
            if keys:
                got = ", ".join(f"{key} {stored.get(key)!r}, asked for {request.get(key)!r}" for key in keys)
                raise ValueError(f"{self.path} holds work on another request: {got}; choose another folder")
        elif self.path.is_dir() and any(not path.name.startswith((TEMPORARY, LOCK)) for path in self.path.iterdir()):
            raise ValueError(f"{self.path} is not empty and holds no work to continue; choose another folder")
        else:
            write_json(there, request)
        rows = self.path / "rows.json"
        self.rows: list[dict] = read_json(rows) if rows.exists() else []

    def add(self, row: dict) -> None:
        self.rows.append(row)
        write_json(self.path / "rows.json", self.rows)


def identity(pipeline: Any) -> dict[str, str]:
    """What a pipeline's videos depend on, by component: weights and dtype, or the scheduler's config."""
    found = {}
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            found[name] = f"{fingerprint(part)} {part.dtype}"
        elif hasattr(part, "config") and hasattr(part, "set_timesteps"):
            found[name] = f"{type(part).__name__} {sorted(dict(part.config).items())}"
    return found
