"""Atomic files: each is written in a workspace next to its place and then moved there, so that a killed run leaves
either the old file or the new one."""

import json
import os
import sys
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from linvideo.workspace import use_umask, workspace


def write_text(path: str | Path, text: str, replace: bool = True) -> None:
    """Write a text file.

    replace: Whether to replace an existing file. If not, it stays, even if it appears during the writing.
    """
    path = Path(path)
    with workspace(path) as space:
        new = space / "new"
        with new.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # otherwise a power cut could leave the name without the content
        if replace:
            os.replace(new, path)
        else:
            move_unless_there(new, path)


def move_unless_there(new: Path, path: Path) -> bool:
    """Move a file to `path` unless something exists there; return whether it was moved."""
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
    """Read a JSON file. A ValueError names the file if it is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8, not JSON, or a number with thousands of digits
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{path} is not valid JSON: it is nested too deeply") from None


def json_checksum(value: Any) -> int:
    """Return a checksum that stays the same when the value is written as JSON and read again."""
    return zlib.crc32(json.dumps(value).encode())


def with_checksum(content: dict[str, Any]) -> dict[str, Any]:
    """Return the content with its checksum, to be written as JSON and read by `read_checked`."""
    return {**content, "checksum": json_checksum(content)}


def read_checked(path: str | Path, keys: set[str]) -> dict[str, Any]:
    """Read the content of a file that holds `with_checksum(content)`, with exactly these keys.

    A file without a checksum is accepted, because earlier versions wrote none.

    Raises:
        ValueError: The file is not JSON, has other keys, or differs from what was written.
    """
    content = read_json(path)
    checksum = content.pop("checksum", None) if isinstance(content, dict) else None
    if not isinstance(content, dict) or content.keys() != keys:
        raise ValueError(f"{path} is damaged: expected an object with {', '.join(sorted(keys))}, got something else")
    try:
        if checksum is not None and json_checksum(content) != checksum:
            raise ValueError(f"{path} is damaged: its checksum has changed since it was written")
    except RecursionError:
        raise ValueError(f"{path} is damaged: it is nested too deeply") from None
    return content


def write_safetensors(
    path: str | Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    path = Path(path)
    with workspace(path) as space:
        # contiguous().clone() only where needed: safetensors refuses views that share storage
        content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            save_file(content, space / "new.safetensors", metadata)
        except SafetensorError as error:  # for example on a full disk
            raise OSError(f"cannot write {path}: {error}") from error
        use_umask(space)
        os.replace(space / "new.safetensors", path)


def write_cached(path: str | Path, tensors: dict[str, torch.Tensor], key: str) -> None:
    """Write tensors for `read_cached`, with a checksum."""
    # Key and checksum share one entry: safetensors writes several entries in random order, but the same content should
    # give the same file.
    write_safetensors(path, tensors, {"key": f"{key} {_tensors_checksum(tensors)}"})


def read_cached(path: str | Path, key: str) -> dict[str, torch.Tensor] | None:
    """Read what `write_cached` has written.

    None means that there is no such file, that it has another key, or that it is damaged (which is reported on stderr);
    the caller then creates it again. Files of earlier versions have no checksum.
    """
    if not Path(path).is_file():
        return None
    try:
        found, tensors = read_safetensors(path)
    except ValueError as error:
        print(f"{error}; it is created again", file=sys.stderr)
        return None
    return tensors if found == key else None


def read_safetensors(path: str | Path) -> tuple[str, dict[str, torch.Tensor]]:
    """Return the key and the tensors that `write_cached` has written, or "" and the tensors of any other safetensors
    file.

    Raises:
        ValueError: The file cannot be read, or differs from what was written.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    key, _, checksum = metadata.get("key", "").partition(" ")
    if checksum not in ("", _tensors_checksum(tensors)):
        raise ValueError(f"{path} is damaged: its checksum has changed since it was written")
    return key, tensors


def _tensors_checksum(tensors: dict[str, torch.Tensor]) -> str:
    value = 0
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), value)
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        value = zlib.crc32(content.numpy(), value)
    return str(value)


def crc32(path: str | Path) -> int:
    """Return the checksum of a file's content."""
    value = 0
    with Path(path).open("rb") as file:
        while chunk := file.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value
