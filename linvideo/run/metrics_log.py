"""Logs of a run: JSON lines, a row a step, that a continued run takes back to where it continues."""

import json
from pathlib import Path
from typing import Any

from linvideo.trajectories.atomic_files import write_text


class MetricsLog:
    """Appends rows to the file `path`; rows after `last_step` of an interrupted run are dropped first.

    A row has step (of the whole run), stage, stage_step and numbers; "r" is a dict layer -> value.
    """

    def __init__(self, path: str | Path, last_step: int = 0):
        take_back(path, last_step)
        self._file = Path(path).open("a", buffering=1, encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        self._file.close()


def take_back(path: str | Path, last_step: int) -> None:
    """Drop the rows of the file, if there is one, that come after `last_step`, and lines that are no rows."""
    path = Path(path)
    if path.is_file():
        kept = [line for line in _lines(path) if (row := _row(line)) is not None and row["step"] <= last_step]
        write_text(path, "".join(line + "\n" for line in kept))


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl or validation.jsonl; a line that is no row, say cut off by a kill, is left out."""
    return [row for line in _lines(path) if (row := _row(line)) is not None]


def _lines(path: str | Path) -> list[str]:
    return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None
