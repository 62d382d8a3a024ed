"""checkpoint-<step>/ folders: model.safetensors, state.safetensors and state.json, moved into place when complete.

Optimizer, schedule, EMA, lanes and random state are ordinary nested state dicts. Their tensors go to
state.safetensors, what is left, with a reference in each tensor's place, to state.json: a checkpoint can hold data
only, never code. state.json also has the other files' checksums.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from linvideo.training.files import TEMPORARY, crc32, read_json, write_safetensors, write_text

FORMAT = 2
FILES = ("model.safetensors", "state.safetensors")
_OLD = TEMPORARY + "old-"
_NAME = re.compile(r"checkpoint-(\d+)")


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Complete checkpoint folders, oldest step first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(_NAME.fullmatch(path.name)[1]))


def save_checkpoint(
    output_dir: str | Path, step: int, model: dict[str, torch.Tensor], state: dict[str, Any], limit: int | None = None
) -> Path:
    """Write checkpoint-<step> and delete the oldest ones beyond `limit` (checkpoints_total_limit; None keeps all).

    Raises:
        OSError: it cannot be written (a full disk); the earlier ones are as they were.
    """
    target = Path(output_dir) / f"checkpoint-{step}"
    new, old = target.with_name(TEMPORARY + target.name), target.with_name(_OLD + target.name)
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    tensors: dict[str, torch.Tensor] = {}
    plain = _strip(state, "", tensors)
    try:
        for name, content in zip(FILES, (model, tensors), strict=True):
            write_safetensors(new / name, content)
        checksums = {name: crc32(new / name) for name in FILES}
        content = {"format": FORMAT, "step": step, "checksums": checksums, "state": plain}
        write_text(new / "state.json", json.dumps(content))
    except (OSError, SafetensorError) as error:
        shutil.rmtree(new, ignore_errors=True)
        raise OSError(f"cannot write {target}, the earlier checkpoints are untouched: {error}") from error
    if target.exists():
        os.rename(target, old)
    os.rename(new, target)
    shutil.rmtree(old, ignore_errors=True)
    if limit is not None:
        for path in list_checkpoints(output_dir)[:-limit]:
            shutil.rmtree(path)
    return target


def remove_newer(output_dir: str | Path, step: int) -> None:
    """Delete the checkpoints after `step`, which a run taken back to it would otherwise count as its newest."""
    for path in list_checkpoints(output_dir):
        if int(_NAME.fullmatch(path.name)[1]) > step:
            shutil.rmtree(path)


def remove_leftovers(output_dir: str | Path) -> None:
    """Tidy up after a kill in `save_checkpoint`: a checkpoint that was moved aside goes back, or away if replaced."""
    for path in Path(output_dir).glob(TEMPORARY + "*checkpoint-*"):
        target = path.with_name(path.name.removeprefix(_OLD))
        if path.name.startswith(_OLD) and not target.exists():
            os.rename(path, target)
        else:
            shutil.rmtree(path)


def load_checkpoint(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(model, state) as given to `save_checkpoint`, tensors on the CPU.

    Raises:
        ValueError: no checkpoint is there, or it is damaged.
    """
    path = Path(path)
    if not (path / "state.json").is_file():
        raise ValueError(f"{path} is no checkpoint folder (no state.json)")
    content = read_json(path / "state.json")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is not a linvideo checkpoint of format {FORMAT}")
    try:
        for name in FILES:
            if crc32(path / name) != content["checksums"][name]:
                raise ValueError(f"{name} has another checksum than when it was written")
        model, tensors = (load_file(path / name) for name in FILES)
        return model, _fill(content["state"], tensors)
    except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"the checkpoint {path} is damaged: {error}") from None


def _strip(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """`value` as JSON; tensors move into `tensors` under their path. Dicts become item lists, so that integer keys
    live."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value.clone()  # two entries may share storage, which safetensors refuses
        return {"tensor": name}
    if isinstance(value, dict):
        return {"items": [[key, _strip(item, f"{name}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_strip(item, f"{name}/{i}", tensors) for i, item in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a checkpoint holds tensors and plain values, got {type(value).__name__} at {name}")


def _fill(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "items":
        return {key: _fill(item, tensors) for key, item in content}
    items = [_fill(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items
