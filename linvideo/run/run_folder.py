"""The folder of a run: whether a run may start or continue in it, and which files of an earlier run may be deleted."""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml

from linvideo.models import load_pipeline
from linvideo.models.pipelines import wan_dtypes
from linvideo.run.checkpoint import list_checkpoints, remove_newer
from linvideo.run.metrics_log import take_back
from linvideo.run.run_config import RunConfig
from linvideo.run.trackers import WANDB_ID
from linvideo.workspace import LOCK, TEMPORARY, discard, remove_dead

PROMPT_CACHE = "prompt_embeds.safetensors"
IMAGE_CACHE = "image_conditions.safetensors"
FEATURE_MAPS = "feature_maps.safetensors"
VALIDATION, VALIDATION_ROWS = "validation", "validation.jsonl"
SELECTION, SUMMARY, REPORT = "selection.json", "summary.json", "report.html"
FILES = ("config.yaml", "metrics.jsonl", VALIDATION_ROWS, SELECTION, WANDB_ID)
FILES += (SUMMARY, REPORT, FEATURE_MAPS, PROMPT_CACHE, IMAGE_CACHE)
FOLDERS = ("trajectories", "pipeline", "logs", "wandb", VALIDATION)


def check(config: RunConfig) -> list[Path]:
    """Return the checkpoints to try to continue from, in order of preference. Nothing is written.

    Raises:
        ValueError: output_dir is not empty, is to be overwritten but not the folder of a run, or holds no run to
            continue.
    """
    folder, resume = Path(config.output_dir), config.resume_from_checkpoint
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir must be a folder, got the file {folder}")
    content = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    # a run that was killed while encoding its prompts leaves only these
    early = (PROMPT_CACHE, IMAGE_CACHE, LOCK)
    content = [name for name in content if name not in early and not name.startswith(TEMPORARY)]
    if resume is None:
        if content and not config.overwrite_output_dir:
            raise ValueError(
                f"output_dir {folder} is not empty; choose another folder, --overwrite_output_dir true or"
                " --resume_from_checkpoint latest"
            )
        if content and not _is_run(folder):
            raise ValueError(f"refusing to overwrite {folder}: it is not empty and holds no training run")
        return []
    if resume != "latest":
        path = Path(resume).resolve()  # a link to a checkpoint of this run is that checkpoint
        if not (path / "state.json").is_file():
            raise ValueError(f"resume_from_checkpoint must be latest or a checkpoint folder, got {resume}")
        if path not in list_checkpoints(folder.resolve()):
            where = f"{resume}, a link to {path}" if path != Path(resume).absolute() else resume
            raise ValueError(f"resume_from_checkpoint must be a folder checkpoint-STEP in {folder}, got {where}")
        return [path]
    if content and not {"config.yaml", "trajectories"} & set(content):
        raise ValueError(f"output_dir {folder} holds no training run to continue")
    return list_checkpoints(folder)[::-1]


def clear(folder: str | Path) -> None:
    """Delete the files that runs write into their folder, and nothing else."""
    folder = Path(folder)
    remove_dead(folder)
    remove_newer(folder, -1)
    for path in (folder / name for name in FOLDERS):
        if path.is_symlink():
            path.unlink()
        elif path.is_dir():
            discard(path)
    for name in reversed(FILES):  # config.yaml last, so that after a kill the folder still counts as a run's
        (folder / name).unlink(missing_ok=True)


def take_back_validations(folder: Path, last_step: int) -> None:
    """Delete the validations that an interrupted run made after `last_step`."""
    take_back(folder / VALIDATION_ROWS, last_step)
    for video in (folder / VALIDATION).glob("step-*/*.mp4"):
        step = re.fullmatch(r"step-(\d+)", video.parent.name)
        if step and int(step[1]) > last_step and video.stem.isdecimal():
            video.unlink()
            with suppress(OSError):  # it holds other files
                video.parent.rmdir()


def _is_run(folder: Path) -> bool:
    """Return whether a run has written into the folder."""
    if (folder / "trajectories" / "manifest.json").is_file():
        return True
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False
    return isinstance(config, dict) and {"output_dir", "trajectories"} <= config.keys()


def load_teacher(config: RunConfig) -> Any:
    """Load the pipeline config.pretrained_model_name_or_path into CPU memory."""
    if config.pretrained_model_name_or_path is None:
        raise ValueError("pretrained_model_name_or_path must name the teacher, got None")
    dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
    return load_pipeline(config.pretrained_model_name_or_path, dtype=wan_dtypes(dtype))
