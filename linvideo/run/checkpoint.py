"""checkpoint-<step>/ folders: safetensors files and state.json, moved into place when complete.

torch.distributed.checkpoint writes them, every rank its own shards, and reads them back into any number of shards.
Optimizer, schedule, EMA, rollouts and random state are ordinary nested state dicts. Their tensors are stored in the
safetensors files. The rest goes to state.json, with a reference in place of each tensor. A checkpoint therefore holds
only data, never code. state.json also holds the checksums of the other files and its own.
"""

import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from linvideo.run.parallel import Ranks
from linvideo.trajectories.atomic_files import crc32, read_checked, with_checksum, write_text
from linvideo.workspace import discard, move_into_place, workspace

FORMAT = 3
MODEL, STATE = "model/", "state"
_NAME = re.compile(r"checkpoint-(\d+)")


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the complete checkpoint folders, oldest step first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(_NAME.fullmatch(path.name)[1]))


def save_checkpoint(
    output_dir: str | Path,
    step: int,
    model: dict[str, torch.Tensor],
    state: dict[str, Any],
    limit: int | None = None,
    ranks: Ranks | None = None,
) -> Path:
    """Write checkpoint-<step>, then delete the oldest checkpoints beyond `limit`.

    Args:
        output_dir: Folder of the run.
        step: Step of the whole run.
        model: Tensors of the model, sharded or whole. Whole ones must be the same on all ranks.
        state: Nested plain values and tensors.
        limit: Number of checkpoints to keep (checkpoints_total_limit). None keeps all.
        ranks: Ranks that call this together. None means this process alone.

    Raises:
        OSError: The checkpoint cannot be written, for example on a full disk. The earlier ones are untouched.
        KeyboardInterrupt: Ctrl-C came. The earlier checkpoints are untouched, too.
    """
    ranks = Ranks.alone() if ranks is None else ranks
    target = Path(output_dir) / f"checkpoint-{step}"
    tensors = {MODEL + name: tensor.detach() for name, tensor in model.items()}
    plain = _strip(state, STATE, tensors)
    with ExitStack() as stack:

        def prepare() -> Path:
            space = stack.enter_context(workspace(target))
            (space / target.name).mkdir()
            return space

        def finish() -> None:
            content = {"format": FORMAT, "step": step, "checksums": checksums, "state": plain}
            write_text(new / "state.json", json.dumps(with_checksum(content)))
            if target.is_dir() and not _is_ours(target):  # move it out of the way, don't lose it
                os.rename(target, target.with_name(f"{target.name}-moved-{space.name.split('-')[1]}"))
            move_into_place(new, target, space)
            if limit is not None:
                for path in [path for path in list_checkpoints(output_dir) if _is_ours(path)][:-limit]:
                    discard(path)

        try:
            space = ranks.on_first(prepare)
            new = space / target.name
            writer = HuggingFaceStorageWriter(str(new), save_distributed=True)
            with _quiet():
                dcp.save(tensors, storage_writer=writer, no_dist=ranks.size == 1)
            mine = {path.name: crc32(path) for path in new.glob(f"shard-{ranks.rank + 1:05d}-*")}
            checksums = {name: value for part in ranks.gather_objects(mine) for name, value in part.items()}
            ranks.on_first(finish)
        except (CheckpointException, OSError, SafetensorError) as error:
            raise OSError(f"cannot write {target}, the earlier checkpoints are untouched: {_reason(error)}") from error
    return target


def remove_newer(output_dir: str | Path, step: int) -> None:
    """Delete the checkpoints after `step`. A run that goes back to `step` would otherwise take them for its newest."""
    for path in list_checkpoints(output_dir):
        if int(_NAME.fullmatch(path.name)[1]) > step and _is_ours(path):
            discard(path)


def _is_ours(path: Path) -> bool:
    """Return whether it is a checkpoint of ours, not a link or some other folder of that name."""
    return (path / "state.json").is_file() and not path.is_symlink()


class Checkpoint:
    """A verified checkpoint to continue from. Tensors are read on access.

    Args:
        path: Checkpoint folder.
        ranks: Ranks that open it together; each verifies its part of the files. None means this process alone.
        entries: Entries that `state` must have.

    Raises:
        ValueError: There is no checkpoint, or it is damaged.
    """

    def __init__(self, path: str | Path, ranks: Ranks | None = None, entries: tuple[str, ...] = ()):
        self.path, self.ranks = Path(path), Ranks.alone() if ranks is None else ranks
        content, references = self.ranks.on_first(lambda: self._content(entries))
        self.plain, self.checksums = dict(content["state"]["items"]), content["checksums"]
        damage = [self._damage(name) for name in sorted(self.checksums)[self.ranks.rank :: self.ranks.size]]
        found = [text for texts in self.ranks.gather_objects(damage) for text in texts if text]
        if not found and not references <= self._sizes().keys():
            found = [f"it has no tensor {min(references - self._sizes().keys())}"]
        if found:
            raise ValueError(f"the checkpoint {path} is damaged: {found[0]}")

    def _content(self, entries: tuple[str, ...]) -> tuple[dict[str, Any], set[str]]:
        """Return the content of state.json and the names of the tensors that it refers to."""
        file = self.path / "state.json"
        if not file.is_file():
            raise ValueError(f"{self.path} is not a checkpoint folder: it has no state.json")
        content = read_checked(file, {"format", "step", "checksums", "state"})
        if content["format"] != FORMAT:
            raise ValueError(f"{self.path} is not a linvideo checkpoint of format {FORMAT}")
        try:  # files of earlier versions have no checksum of their own
            references, there = set(_references(content["state"])), dict(content["state"]["items"])
            if missing := [name for name in entries if name not in there]:
                raise ValueError(f"it has no {missing[0]}")
            if not isinstance(content["checksums"], dict):
                raise ValueError("it has no checksums")
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{file} is damaged: {error}") from None
        except RecursionError:
            raise ValueError(f"{file} is damaged: it is nested too deeply") from None
        return content, references

    def _damage(self, name: str) -> str | None:
        file = self.path / name
        if not file.is_file():  # opening a pipe would block forever
            return f"there is no file {name}"
        try:
            return None if crc32(file) == self.checksums[name] else f"{name} has another checksum than when written"
        except OSError as error:
            return str(error)

    def __getitem__(self, key: str) -> Any:
        """Return an entry of `state` as it was given to `save_checkpoint`, with whole tensors on the CPU."""
        wanted = list(_references(self.plain[key]))
        sizes = self._sizes() if wanted else {}
        tensors = {name: torch.empty(sizes[name].size, dtype=sizes[name].properties.dtype) for name in wanted}
        self._read(tensors)
        return _fill(self.plain[key], tensors)

    def model(self) -> dict[str, torch.Tensor]:
        """Return the whole tensors of the model on the CPU."""
        wanted = {name: size for name, size in self._sizes().items() if name.startswith(MODEL)}
        tensors = {name: torch.empty(size.size, dtype=size.properties.dtype) for name, size in wanted.items()}
        self._read(tensors)
        return {name.removeprefix(MODEL): tensor for name, tensor in tensors.items()}

    def load_model(self, model: dict[str, torch.Tensor]) -> None:
        """Fill the tensors of a model, sharded or whole, in place.

        Raises:
            ValueError: The checkpoint has other tensors.
        """
        saved = {name.removeprefix(MODEL) for name in self._sizes() if name.startswith(MODEL)}
        if saved != model.keys():
            raise ValueError(f"{self.path} is of another model: they differ in {sorted(saved ^ model.keys())[0]}")
        self._read({MODEL + name: tensor.detach() for name, tensor in model.items()})

    @property
    def components(self) -> list[str]:
        """Return the names of the components in state["components"]."""
        return [name for name, _ in self.plain["components"]["items"]]

    def load_component(self, name: str, component: Any) -> None:
        """Restore the state of a component of state["components"].

        The component's own state dict determines which shards are read.

        Raises:
            ValueError: The component has other tensors than the one that was saved.
        """
        saved = dict(self.plain["components"]["items"])[name]
        tensors: dict[str, torch.Tensor] = {}
        _strip(component.state_dict(), f"{STATE}/components/{name}", tensors)
        if tensors.keys() != set(_references(saved)):
            raise ValueError(f"{self.path} was made with another {name}, which has other tensors")
        self._read(tensors)
        component.load_state_dict(_fill(saved, tensors))

    def _sizes(self) -> dict[str, Any]:
        return self._reader().read_metadata().state_dict_metadata

    def _reader(self) -> HuggingFaceStorageReader:
        reader = HuggingFaceStorageReader(str(self.path))
        reader.fs = _FilesOf(self.checksums)
        return reader

    def _read(self, tensors: dict[str, torch.Tensor]) -> None:
        """Fill `tensors` in place; every rank reads only its shards."""
        if not tensors:
            return
        try:
            with _quiet():
                dcp.load(tensors, storage_reader=self._reader(), no_dist=self.ranks.size == 1)
        except (CheckpointException, OSError, SafetensorError, LookupError) as error:
            raise ValueError(f"cannot read the checkpoint {self.path}: {_reason(error)}") from error


class _FilesOf(FileSystem):
    """A file system that lists only the given files, because the reader opens all files in a folder."""

    def __init__(self, names: Iterable[str]):
        self.names = set(names)

    def ls(self, path: str | os.PathLike) -> list[str]:
        return [file for file in super().ls(path) if Path(file).name in self.names]


def load_checkpoint(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return (model, state) as given to `save_checkpoint`, with whole tensors on the CPU.

    Raises:
        ValueError: There is no checkpoint, or it is damaged.
    """
    checkpoint = Checkpoint(path)
    return checkpoint.model(), {key: checkpoint[key] for key in checkpoint.plain}


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():  # a single process is intended
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _reason(error: BaseException) -> str:
    """Return the message of the first rank that failed. An interruption is raised again instead."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, KeyboardInterrupt | SystemExit):
        raise error from None
    return str(error) or type(error).__name__


def _strip(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Return `value` as JSON-compatible values, and move its tensors into `tensors` under their path.

    Dicts become lists of items, because JSON would turn integer keys into strings.
    """
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"items": [[key, _strip(item, f"{name}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_strip(item, f"{name}/{i}", tensors) for i, item in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a checkpoint can hold tensors and plain values, got {type(value).__name__} at {name}")


def _references(value: Any) -> Iterator[str]:
    """Yield the names of the tensors in a value returned by `_strip`."""
    if isinstance(value, dict):
        ((kind, content),) = value.items()
        if kind == "tensor":
            yield content
        else:
            for item in content:
                yield from _references(item[1] if kind == "items" else item)


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
