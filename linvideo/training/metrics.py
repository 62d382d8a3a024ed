"""Logs of a run: JSON lines, a row a step, that a continued run takes back to where it continues."""

import json
from pathlib import Path
from typing import Any

from linvideo.training.files import write_text


class MetricsLog:
    """Appends rows to the file `path`; rows after `last_step` of an interrupted run are dropped first.

    A row has step (of the whole run), stage, stage_step and numbers; "r" is a dict layer -> value.
    """

    def __init__(self, path: str | Path, last_step: int = 0):
        take_back(path, last_step)
        self._file = Path(path).open("a", buffering=1)

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        self._file.close()


def take_back(path: str | Path, last_step: int) -> None:
    """Drop the rows of the file, if there is one, that come after `last_step`, and a line that was cut off."""
    path = Path(path)
    if path.is_file():
        kept = [line for line in path.read_text().splitlines() if _step(line) <= last_step]
        write_text(path, "".join(line + "\n" for line in kept))


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl or validation.jsonl; a line cut off by a kill is left out."""
    rows = []
    for line in Path(path).read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")
