"""Atomic files: written beside their place and moved there, so that a killed run leaves the old file or the new one."""

import json
import os
import socket
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

TEMPORARY = ".tmp-"  # prefix of what an interrupted write may leave behind
_HOST = socket.gethostname()


def write_text(path: str | Path, text: str) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # else the name could outlive a power cut without the content
    os.replace(temporary, path)


def write_json(path: str | Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


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
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    # contiguous().clone() only where needed: safetensors refuses views that share storage
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata)
    except SafetensorError as error:  # a full disk, for one
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error}") from error
    os.replace(temporary, path)


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


def _temporary(path: Path) -> Path:
    """A name that no other process uses: several workers may write into one folder, even the same file."""
    return path.with_name(f"{TEMPORARY}{_HOST}-{os.getpid()}-{path.name}")


def remove_dead(folder: str | Path) -> None:
    """Delete temporary files in `folder` of this machine's processes that are no longer there."""
    for path in Path(folder).glob(f"{TEMPORARY}{_HOST}-*"):
        process = path.name.removeprefix(f"{TEMPORARY}{_HOST}-").split("-")[0]
        if path.is_file() and process.isdecimal() and not _alive(int(process)):
            path.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def crc32(path: str | Path) -> int:
    """Checksum of a file's content."""
    value = 0
    with Path(path).open("rb") as file:
        while chunk := file.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value
