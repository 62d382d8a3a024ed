"""Trackers in which a run can be watched, on top of its own files: tensorboard and wandb, on the first rank."""

import secrets
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from linvideo.trajectories.atomic_files import write_text

WANDB_ID = "wandb_run_id.txt"


class Tensorboard:
    """Events in output_dir/logs. Those after `last_step` are purged."""

    def __init__(self, output_dir: Path, project: str, config: dict[str, Any], last_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(output_dir / "logs"), purge_step=last_step + 1)

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def video(self, name: str, path: Path, frames: np.ndarray, step: int) -> None:
        """Log eight of the frames side by side, because videos would need moviepy."""
        chosen = frames[np.linspace(0, len(frames) - 1, min(8, len(frames))).astype(int)]
        self._writer.add_image(name, np.concatenate(list(chosen), axis=1), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """One wandb run for the whole run, whose id is stored in output_dir.

    A continued run repeats some steps exactly; steps that wandb has already are not sent again.
    """

    def __init__(self, output_dir: Path, project: str, config: dict[str, Any], last_step: int):
        import wandb

        path = output_dir / WANDB_ID
        if not path.is_file():  # before wandb.init, so that a kill in between doesn't cause a second wandb run
            write_text(path, secrets.token_hex(4))
        self._video = wandb.Video
        self._run = wandb.init(
            project=project, id=path.read_text().strip(), resume="allow", dir=str(output_dir), config=config
        )
        self._first = self._run.starting_step

    def log(self, values: dict[str, Any], step: int) -> None:
        if step >= self._first:
            self._run.log(values, step=step)

    def video(self, name: str, path: Path, frames: np.ndarray, step: int) -> None:
        self.log({name: self._video(str(path), format="mp4")}, step)

    def close(self) -> None:
        self._run.finish()


TRACKERS = {"tensorboard": Tensorboard, "wandb": Wandb}


def tracker_names(report_to: str) -> list[str]:
    """Return the names in an option value such as "none" (no names) or "tensorboard,wandb".

    Raises:
        ValueError: A name is unknown, or its package is not installed.
    """
    names = [] if report_to == "none" else [name.strip() for name in report_to.split(",")]
    if unknown := [name for name in names if name not in TRACKERS]:
        raise ValueError(
            f"report_to must be none, {' or '.join(TRACKERS)}, or several separated by commas, got {unknown[0]!r}"
        )
    for name in names:
        found = find_spec(name)
        if found is None or found.origin is None:  # without origin: a folder of that name, as wandb creates
            raise ValueError(f"report_to {name} needs the package {name}, which is not installed")
    return names


class Trackers:
    """The trackers that `report_to` names, used as one.

    Args:
        report_to: Option value; see RunConfig.
        output_dir: Folder of the run.
        project: Name of the wandb project.
        config: The options of the run as plain values.
        last_step: Step after which the run continues. Logged values of later steps are replaced.
    """

    def __init__(
        self, report_to: str, output_dir: str | Path, project: str, config: dict[str, Any], last_step: int = 0
    ):
        arguments = (Path(output_dir), project, config, last_step)
        self._trackers = [TRACKERS[name](*arguments) for name in dict.fromkeys(tracker_names(report_to))]

    def log(self, group: str, values: dict[str, Any], step: int) -> None:
        """Log numbers as "group/name" and those of a dict as "group/name/key". Other values are left out."""
        flat: dict[str, Any] = {}
        for name, value in values.items():
            flat |= {f"{name}/{key}": x for key, x in value.items()} if isinstance(value, dict) else {name: value}
        numbers = {f"{group}/{name}": value for name, value in flat.items() if isinstance(value, int | float)}
        for tracker in self._trackers:
            tracker.log(numbers, step)

    def video(self, name: str, path: Path, frames: np.ndarray, step: int) -> None:
        """Log the mp4 file `path`, whose frames are uint8 [F, H, W, 3]."""
        for tracker in self._trackers:
            tracker.video(name, path, frames, step)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()
