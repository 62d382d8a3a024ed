"""A folder of long work that can be continued: the request in request.json, the finished pieces in rows.json, and the
checksums of the rows in checksums.json. A row that is deleted by hand is made again.

The process that works there holds the folder's lock (`locked`).
"""

from pathlib import Path
from typing import Any

import torch

from linvideo.trajectories.atomic_files import json_checksum, read_json, write_json
from linvideo.trajectories.fingerprint import fingerprint
from linvideo.workspace import LOCK, TEMPORARY, remove_dead


class WorkFolder:
    """The folder of a piece of work, opened or, if there is none, created for exactly this `request` (a JSON dict).

    Raises:
        ValueError: The folder holds something else, work on another request, or damaged rows.
    """

    def __init__(self, folder: str | Path, request: dict[str, Any]):
        self.path = Path(folder)
        remove_dead(self.path)  # after a kill during the first write, the folder is empty then
        there = self.path / "request.json"
        if there.is_file():
            stored = read_json(there)
            if not isinstance(stored, dict):
                raise ValueError(f"expected an object in {there}, got {type(stored).__name__}")
            keys = sorted(key for key in {**stored, **request} if stored.get(key) != request.get(key))
            if keys:
                got = ", ".join(f"{key} {stored.get(key)!r} (now {request.get(key)!r})" for key in keys)
                raise ValueError(f"{self.path} holds work on another request: {got}; choose another folder")
        elif self.path.is_dir() and any(not path.name.startswith((TEMPORARY, LOCK)) for path in self.path.iterdir()):
            raise ValueError(f"{self.path} is not empty, and holds no work to continue; choose another folder")
        else:
            write_json(there, request)
        self.rows: list[dict] = self._read_rows()

    def add(self, row: dict) -> None:
        self.rows.append(row)
        # checksums first: if a kill comes before the rows are written, an unused checksum does no harm
        write_json(self.path / "checksums.json", [json_checksum(row) for row in self.rows])
        write_json(self.path / "rows.json", self.rows)

    def _read_rows(self) -> list[dict]:
        file, checksums = self.path / "rows.json", self.path / "checksums.json"
        rows = read_json(file) if file.is_file() else []
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"expected a list of objects in {file}")
        if checksums.is_file():  # folders of earlier versions have none
            known = read_json(checksums)
            for number, row in enumerate(rows, 1):
                if not isinstance(known, list) or json_checksum(row) not in known:
                    raise ValueError(
                        f"row {number} of {file} differs from what was written, according to {checksums}; delete the"
                        " row to make it again, or that file if you have edited the row yourself"
                    )
        return rows


def identity(pipeline: Any) -> dict[str, str]:
    """Return what a pipeline's videos depend on, by component: weights and dtype, or the scheduler's config."""
    found = {}
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            found[name] = f"{fingerprint(part)} {part.dtype}"
        elif hasattr(part, "config") and hasattr(part, "set_timesteps"):
            found[name] = f"{type(part).__name__} {sorted(dict(part.config).items())}"
    return found
