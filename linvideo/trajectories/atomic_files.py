"""Atomic files: written in a workspace next to their place and moved there, so that a killed run leaves the old file
or the new one."""

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
    except ValueError as error:  # not UTF-8, not JSON, or a number of thousands of digits
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{path} is not valid JSON: it is nested too deeply") from None


def json_checksum(value: Any) -> int:
    """The same for a value and for what is read back after it was written as JSON."""
    return zlib.crc32(json.dumps(value).encode())


def with_checksum(content: dict[str, Any]) -> dict[str, Any]:
    """To be written as JSON and read by `read_checked`."""
    return {**content, "checksum": json_checksum(content)}


def read_checked(path: str | Path, keys: set[str]) -> dict[str, Any]:
    """The content, with exactly these keys, of a file that holds `with_checksum(content)`; earlier versions wrote it
    without a checksum.

    Raises:
        ValueError: it is not JSON, has other keys, or is not what was written.
    """
    content = read_json(path)
    checksum = content.pop("checksum", None) if isinstance(content, dict) else None
    if not isinstance(content, dict) or content.keys() != keys:
        raise ValueError(f"{path} is damaged: expected an object with {', '.join(sorted(keys))}, got something else")
    try:
        if checksum is not None and json_checksum(content) != checksum:
            raise ValueError(f"{path} is damaged: it has another checksum than when it was written")
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
        except SafetensorError as error:  # a full disk, for one
            raise OSError(f"cannot write {path}: {error}") from error
        use_umask(space)
        os.replace(space / "new.safetensors", path)


def write_cached(path: str | Path, tensors: dict[str, torch.Tensor], key: str) -> None:
    """For `read_cached`, with a checksum."""
    # one entry: safetensors writes several in an order of chance, and the same content should be the same file
    write_safetensors(path, tensors, {"key": f"{key} {_tensors_checksum(tensors)}"})


def read_cached(path: str | Path, key: str) -> dict[str, torch.Tensor] | None:
    """What `write_cached` has written; None when the file is not there, of another key, or damaged, which is said on
    stderr: it is made anew then. Files of earlier versions have no checksum."""
    if not Path(path).is_file():
        return None
    try:
        found, tensors = read_safetensors(path)
    except ValueError as error:
        print(f"{error}; it is made anew", file=sys.stderr)
        return None
    return tensors if found == key else None


def read_safetensors(path: str | Path) -> tuple[str, dict[str, torch.Tensor]]:
    """The key and the tensors that `write_cached` has written, or "" and those of any other safetensors file.

    Raises:
        ValueError: it cannot be read, or is not what was written.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    key, _, checksum = metadata.get("key", "").partition(" ")
    if checksum not in ("", _tensors_checksum(tensors)):
        raise ValueError(f"{path} is damaged: it has another checksum than when it was written")
    return key, tensors


def _tensors_checksum(tensors: dict[str, torch.Tensor]) -> str:
    value = 0
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), value)
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        value = zlib.crc32(content.numpy(), value)
    return str(value)


def crc32(path: str | Path) -> int:
    """Checksum of a file's content."""
    value = 0
    with Path(path).open("rb") as file:
        while chunk := file.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value
