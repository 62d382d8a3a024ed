"""Atomic files: written in a workspace next to their place and moved there, so that a killed run leaves the old file
or the new one."""

import json
import os
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from linvideo.workspace import use_umask, workspace


def write_text(path: str | Path, text: str, replace: bool = True) -> None:
    """replace: False leaves a file that is there, or comes there meanwhile, as it is."""
    path = Path(path)
    with workspace(path) as space:
        new = space / "new"
        with new.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # else the name could outlive a power cut without the content
        if replace:
            os.replace(new, path)
        else:
            move_unless_there(new, path)


def move_unless_there(new: Path, path: Path) -> bool:
    """Move a file to `path` where there is none; False, and nothing done, where there is one."""
    try:
        os.link(new, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        if path.exists():
            return False
        os.replace(new, path)
        return True
    new.unlink()
    return True


def write_json(path: str | Path, value: Any, replace: bool = True) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n", replace)


def read_json(path: str | Path) -> Any:
    """Raises ValueError naming the file when it is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def write_safetensors(
    path: str | Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    path = Path(path)
    with workspace(path) as space:
        # contiguous().clone() only where needed: safetensors refuses views that share storage
        content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            save_file(content, space / "new.safetensors", metadata)
        except SafetensorError as error:  # a full disk, for one
            raise OSError(f"cannot write {path}: {error}") from error
        use_umask(space)
        os.replace(space / "new.safetensors", path)


def read_cached(path: str | Path, key: str) -> dict[str, torch.Tensor] | None:
    """What `write_safetensors(path, tensors, {"key": key})` has written; None when the file is not there, of another
    key, or damaged: it is made anew then."""
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("key") == key:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (FileNotFoundError, SafetensorError):
        pass
    return None


def crc32(path: str | Path) -> int:
    """Checksum of a file's content."""
    value = 0
    with Path(path).open("rb") as file:
        while chunk := file.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value
