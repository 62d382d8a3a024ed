"""The trajectory store: a folder of safetensors shards, each with its checksum, and a manifest.json about them.

    x, u [n, S, C, F, H, W]              state, and the teacher's velocity there under the state's condition; in the
                                         request's dtype, or in fp32 if the shard would overflow it
    timestep [n, S] fp32                 timestep that the teacher was given (1000 t)
    negative [n, S] bool, prompt [n]     condition: the negative prompt, or prompt number `prompt`
    sample [n, C, F, H, W]               end of sampling: x_0, or the end of a high-noise expert's range

A shard holds n trajectories with S stored sampling steps each. It is written as a whole, and counts once its checksum
is in shard-<number>.json next to it: an interrupted collection loses at most the shard that it was writing. Several
workers can fill one store, because the contents of a shard depend only on its number. u is stored because it cannot be
derived well: differences of fp16 states give it with an error of several per cent.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from linvideo.trajectories.atomic_files import (
    crc32,
    read_checked,
    read_json,
    with_checksum,
    write_json,
    write_safetensors,
)
from linvideo.trajectories.conditions import Conditions
from linvideo.trajectories.flow import NUM_TRAIN_TIMESTEPS
from linvideo.trajectories.prompts import PromptEmbeddings
from linvideo.trajectories.seeding import draw_indices
from linvideo.workspace import TEMPORARY, in_turn, remove_dead, workspace

FORMAT = 3
OF_STATES = ("x", "u", "timestep", "negative", "prompt")
KEYS = (*OF_STATES, "sample")


@dataclass
class StateBatch:
    """A batch of teacher states.

    Args:
        x: States [B, C, F, H, W], fp32.
        u: The teacher's velocities there, in the same shape.
        timestep: Timesteps [B], fp32.
        conditions: Conditions of the states.
        prompt: Numbers of the prompts in these conditions [B].
        negative: Whether the condition is the negative prompt [B].
        counts: Whether the results count. A rank without a batch of its own gets a substitute that does not count, so
            that it runs the same collectives.
    """

    x: torch.Tensor
    u: torch.Tensor
    timestep: torch.Tensor
    conditions: Conditions
    prompt: torch.Tensor
    negative: torch.Tensor
    counts: bool = True

    @property
    def t(self) -> torch.Tensor:
        """The time t in [0, 1] of each state [B]."""
        return self.timestep / NUM_TRAIN_TIMESTEPS


class TrajectoryStore:
    """A store of trajectories, which is opened or, if there is none, created.

    Args:
        path: Folder of the store.
        request: Everything that determines the contents (model, prompts, sampler, seed, sizes), as a JSON dict with
            num_trajectories, shard_size and states_per_trajectory. An existing store must have the same request. None
            opens an existing store with any request.

    Raises:
        ValueError: The store was made for another request or is damaged, or the folder holds something else.
    """

    def __init__(self, path: str | Path, request: dict[str, Any] | None = None):
        self.path = Path(path)
        remove_dead(self.path)
        manifest_path = self.path / "manifest.json"
        if not manifest_path.is_file():
            if request is None:
                raise ValueError(f"{self.path} is not a trajectory store (it has no manifest.json)")
            there = [path.name for path in self.path.iterdir()] if self.path.is_dir() else []
            if manifest_path.name not in there and any(not name.startswith(TEMPORARY) for name in there):
                raise ValueError(f"{self.path} is neither empty nor a trajectory store")
            # if another worker is first, its manifest stays, and is compared with ours
            write_json(manifest_path, with_checksum({"format": FORMAT, "request": request}), replace=False)
        manifest = read_checked(manifest_path, {"format", "request"})
        if manifest["format"] != FORMAT:
            raise ValueError(f"{manifest_path} has format {manifest['format']!r}, expected {FORMAT}")
        if request is not None and manifest["request"] != request:
            raise ValueError(f"the trajectories in {self.path} were made {_difference(manifest['request'], request)}")
        self.request = manifest["request"]
        for number in range(self.num_shards):
            if self.has_shard(number) and (size := self._file(number).stat().st_size) != self._entry(number)["bytes"]:
                raise ValueError(f"{self._damaged(number)} {size} bytes, expected {self._entry(number)['bytes']}")
        # an open file per shard; its tensors are memory-mapped, so a batch reads only its own states
        self._open = lru_cache(maxsize=64)(lambda number: safe_open(self._file(number), framework="pt"))

    @property
    def num_shards(self) -> int:
        return -(-self.request["num_trajectories"] // self.request["shard_size"])

    @property
    def complete(self) -> bool:
        return not self.missing_shards()

    def __len__(self) -> int:
        """Number of states in a complete store."""
        return self.request["num_trajectories"] * self.request["states_per_trajectory"]

    def shard_trajectories(self, number: int) -> range:
        """Return the numbers of the trajectories in shard `number`."""
        size, total = self.request["shard_size"], self.request["num_trajectories"]
        return range(number * size, min((number + 1) * size, total))

    def has_shard(self, number: int) -> bool:
        """Return whether this or another process has written the shard, and its file has not been deleted."""
        return self._file(number).is_file() and self._file(number).with_suffix(".json").is_file()

    def missing_shards(self) -> list[int]:
        return [number for number in range(self.num_shards) if not self.has_shard(number)]

    def write_shard(self, number: int, tensors: dict[str, torch.Tensor]) -> None:
        """Write a shard, unless another worker has written the same one first."""
        file = self._file(number)
        entry = file.with_suffix(".json")
        with workspace(file) as space:
            new = space / file.name
            write_safetensors(new, {key: tensors[key] for key in KEYS})
            content = {"bytes": new.stat().st_size, "crc32": crc32(new)}
            with in_turn(self.path / "manifest.json"):
                if not self.has_shard(number):
                    entry.unlink(missing_ok=True)  # left from a deleted shard
                    os.replace(new, file)
                    write_json(entry, content)

    def verify(self, worker: int = 0, workers: int = 1) -> None:
        """Read this worker's share of the existing shards, and compare their checksums.

        Raises:
            ValueError: A shard is damaged; the message names the first one.
        """
        for number in range(worker, self.num_shards, workers):
            if self.has_shard(number) and crc32(self._file(number)) != self._entry(number)["crc32"]:
                raise ValueError(f"{self._damaged(number)} a different checksum from when it was written")

    def batch(self, indices: list[int], prompts: PromptEmbeddings, device: torch.device | str = "cpu") -> StateBatch:
        """Return the states with these numbers, which count the states trajectory by trajectory."""
        columns = {key: [] for key in OF_STATES}
        for index in indices:
            trajectory, step = divmod(index, self.request["states_per_trajectory"])
            number, row = divmod(trajectory, self.request["shard_size"])
            try:
                file = self._open(number)
                for key in ("x", "u", "timestep"):  # fp32 from here on: autocast on a CPU cannot join fp16 tensors
                    columns[key].append(file.get_slice(key)[row : row + 1, step].float())
                columns["negative"].append(file.get_slice("negative")[row : row + 1, step])
                columns["prompt"].append(file.get_slice("prompt")[row : row + 1])
            except (SafetensorError, FileNotFoundError) as error:
                raise ValueError(f"cannot read state {index} from {self._file(number)}: {error}") from None
        x, u, timestep, negative, prompt = (torch.cat(columns[key]) for key in OF_STATES)
        conditions = prompts.conditions(prompt, negative, device)
        return StateBatch(x.to(device), u.to(device), timestep.to(device), conditions, prompt, negative)

    def samples(
        self, trajectories: Iterable[int], prompts: PromptEmbeddings, device: torch.device | str = "cpu"
    ) -> tuple[torch.Tensor, Conditions]:
        """Return the final samples [B, C, F, H, W] in fp32, and the conditions under which they were made."""
        samples, numbers = [], []
        for trajectory in trajectories:
            number, row = divmod(trajectory, self.request["shard_size"])
            try:
                samples.append(self._open(number).get_slice("sample")[row].float())
                numbers.append(self._open(number).get_slice("prompt")[row : row + 1])
            except (SafetensorError, FileNotFoundError) as error:
                raise ValueError(f"cannot read sample {trajectory} from {self._file(number)}: {error}") from None
        return torch.stack(samples).to(device), prompts.conditions(torch.cat(numbers), device=device)

    def timesteps(self) -> torch.Tensor:
        """Return the timesteps of all states [num_trajectories, S]; the store must be complete."""
        return torch.cat([self._open(number).get_tensor("timestep") for number in range(self.num_shards)])

    def draw(
        self,
        positions: Iterable[int],
        *name: int | str,
        prompts: PromptEmbeddings,
        device: torch.device | str = "cpu",
    ) -> StateBatch:
        """Draw the states at `positions` of the batch `name`, for example (seed, "finetune", step).

        They depend on nothing else.
        """
        return self.batch(draw_indices(len(self), positions, *name), prompts, device)

    def _file(self, number: int) -> Path:
        return self.path / f"shard-{number:06d}.safetensors"

    def _entry(self, number: int) -> dict[str, int]:
        path = self._file(number).with_suffix(".json")
        entry = read_json(path)
        if not isinstance(entry, dict) or set(entry) != {"bytes", "crc32"}:
            raise ValueError(f"{path} lacks the bytes or crc32 of its shard (delete it to collect the shard again)")
        return entry

    def _damaged(self, number: int) -> str:
        return f"{self._file(number)} is damaged (delete it to collect it again): it has"


def _difference(stored: dict, wanted: dict) -> str:
    keys = [key for key in {**stored, **wanted} if stored.get(key) != wanted.get(key)]
    parts = [f"{key} {stored.get(key)!r} (now {wanted.get(key)!r})" for key in keys]
    return "with " + ", ".join(parts) + "; choose another folder, or restore the old settings"
