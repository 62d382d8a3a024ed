"""Logs of a run as JSON lines, one row per step. A continued run first removes the rows after its checkpoint."""

import json
from pathlib import Path
from typing import Any

from linvideo.trajectories.atomic_files import write_text


class MetricsLog:
    """Append rows to a file, after dropping the rows that an interrupted run wrote after `last_step`.

    A row has step (of the whole run), stage, stage_step and numbers. "r" is a dict layer -> value.
    """

    def __init__(self, path: str | Path, last_step: int = 0):
        take_back(path, last_step)
        self._file = Path(path).open("a", buffering=1, encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        self._file.close()


def take_back(path: str | Path, last_step: int) -> None:
    """Drop the rows after `last_step`, and lines that are not rows, from the file if it exists."""
    path = Path(path)
    if path.is_file():
        kept = [line for line in _lines(path) if (row := _row(line)) is not None and row["step"] <= last_step]
        write_text(path, "".join(line + "\n" for line in kept))


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl or validation.jsonl. Lines that a kill has cut off are left out."""
    return [row for line in _lines(path) if (row := _row(line)) is not None]


def _lines(path: str | Path) -> list[str]:
    return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None
