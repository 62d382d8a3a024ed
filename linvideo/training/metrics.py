"""The training log: metrics.jsonl, one row a step, and tensorboard when asked for."""

import json
from pathlib import Path
from typing import Any

from linvideo.training.files import write_text

REPORT_TO = ("none", "tensorboard")


class MetricsLog:
    """Appends rows to `output_dir`/metrics.jsonl; rows after `last_step` of an interrupted run are dropped first.

    A row has step (of the whole run), stage, stage_step and numbers; "r" is a dict layer -> value. With report_to
    "tensorboard" numbers also go to output_dir/logs.
    """

    def __init__(self, output_dir: str | Path, report_to: str = "none", last_step: int = 0):
        path = Path(output_dir) / "metrics.jsonl"
        if path.is_file():
            kept = [line for line in path.read_text().splitlines() if _step(line) <= last_step]
            write_text(path, "".join(line + "\n" for line in kept))
        self._file = path.open("a", buffering=1)
        self._writer = None
        if report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(Path(output_dir) / "logs"), purge_step=last_step + 1)

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        if self._writer is not None:
            for name, value in row.items():
                if isinstance(value, int | float) and name not in ("step", "stage_step"):
                    self._writer.add_scalar(f"{row['stage']}/{name}", value, row["step"])
            if row.get("r"):
                self._writer.add_scalars(f"{row['stage']}/r", {k: float(v) for k, v in row["r"].items()}, row["step"])

    def close(self) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; a line cut off by a kill is left out."""
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
