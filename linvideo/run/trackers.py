"""Where a run can be watched, apart from its own files: tensorboard and wandb, on the first rank."""

import secrets
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from linvideo.trajectories.atomic_files import write_text

WANDB_ID = "wandb_run_id.txt"


class Tensorboard:
    """Events in output_dir/logs; those after `last_step` are purged."""

    def __init__(self, output_dir: Path, project: str, config: dict[str, Any], last_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(output_dir / "logs"), purge_step=last_step + 1)

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def video(self, name: str, path: Path, frames: np.ndarray, step: int) -> None:
        """Eight of the frames side by side: films would need moviepy."""
        chosen = frames[np.linspace(0, len(frames) - 1, min(8, len(frames))).astype(int)]
        self._writer.add_image(name, np.concatenate(list(chosen), axis=1), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """One wandb run for the whole run, whose id is kept in output_dir. What wandb knows already is not sent again: a
    continued run repeats those steps exactly."""

    def __init__(self, output_dir: Path, project: str, config: dict[str, Any], last_step: int):
        import wandb

        path = output_dir / WANDB_ID
        if not path.is_file():  # before wandb hears of it: a kill in between must not leave a second run there
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
    """ "none" -> [], "tensorboard,wandb" -> both.

    Raises:
        ValueError: another name, or a package that is not installed.
    """
    names = [] if report_to == "none" else [name.strip() for name in report_to.split(",")]
    if unknown := [name for name in names if name not in TRACKERS]:
        raise ValueError(f"report_to must be none, {' or '.join(TRACKERS)}, or several with commas, got {unknown[0]!r}")
    for name in names:
        found = find_spec(name)
        if found is None or found.origin is None:  # without origin it is a folder of that name, as wandb leaves them
            raise ValueError(f"report_to {name} needs the package {name}, which is not installed")
    return names


class Trackers:
    """Those that `report_to` names, as one.

    Args:
        config: the run's, as plain values.
        last_step: rows after it belong to a part of the run that is done again.
    """

    def __init__(
        self, report_to: str, output_dir: str | Path, project: str, config: dict[str, Any], last_step: int = 0
    ):
        arguments = (Path(output_dir), project, config, last_step)
        self._trackers = [TRACKERS[name](*arguments) for name in dict.fromkeys(tracker_names(report_to))]

    def log(self, group: str, values: dict[str, Any], step: int) -> None:
        """Plot numbers as "group/name", those of a dict as "group/name/key"; anything else is left out."""
        flat: dict[str, Any] = {}
        for name, value in values.items():
            flat |= {f"{name}/{key}": x for key, x in value.items()} if isinstance(value, dict) else {name: value}
        numbers = {f"{group}/{name}": value for name, value in flat.items() if isinstance(value, int | float)}
        for tracker in self._trackers:
            tracker.log(numbers, step)

    def video(self, name: str, path: Path, frames: np.ndarray, step: int) -> None:
        """Show the mp4 at `path`, whose frames are uint8 [F, H, W, 3]."""
        for tracker in self._trackers:
            tracker.video(name, path, frames, step)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()
