"""Default settings for a pipeline's videos: the size, frames, steps, guidance and frame rate that it was trained for.

They are stored in scheduler/sampling.json of its folder, which downloads from the Hub include. The flow shift is in the
scheduler's own config.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from linvideo.models.few_step import own_settings

FILE = "scheduler/sampling.json"
KINDS = {
    "height": int,
    "width": int,
    "num_frames": int,
    "num_inference_steps": int,
    "guidance_scale": float,
    "fps": int,
}


def stored_settings(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """Return the settings in the folder that the pipeline was loaded from, {name in KINDS: value}; {} without a file.

    Raises:
        ValueError: The file is damaged.
    """
    location = str(pipeline.config.get("_name_or_path") or "")
    try:
        found = Path(location, FILE) if os.path.isdir(location) else try_to_load_from_cache(location, FILE)
    except HFValidationError:  # a pipeline made in memory has no location
        return {}
    if not isinstance(found, str | Path) or not Path(found).is_file():
        return {}
    try:
        values = json.loads(Path(found).read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"expected names and values, got {values!r:.80}")
        return {name: _checked(name, values[name]) for name in KINDS if name in values}
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ValueError(f"cannot read the sampling settings in {found}: {error}") from None


def sampling_settings(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """Return the stored settings that a call takes. A distilled pipeline always has its own steps and guidance."""
    stored = stored_settings(pipeline)
    stored.pop("fps", None)
    return stored | own_settings(pipeline)


def write_settings(pipeline: DiffusionPipeline, folder: str | os.PathLike, settings: dict[str, Any] | None) -> None:
    """Write settings {name in KINDS: value} to the folder of a pipeline; None writes those that it was loaded with."""
    known = stored_settings(pipeline) if settings is None else settings
    known = {name: _checked(name, value) for name, value in known.items()} | (own_settings(pipeline) if known else {})
    if known:
        path = Path(folder, FILE)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")


def _checked(name: str, value: Any) -> Any:
    whole = KINDS[name] is int
    number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not number or not (1 if whole else 0) <= value < math.inf:
        raise ValueError(f"{name} must be {'at least 1' if whole else 'finite and not negative'}, got {value!r:.80}")
    return value
