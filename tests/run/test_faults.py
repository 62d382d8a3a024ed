"""kill -9 at arbitrary times during collection, training, validation and checkpoint writing.

Nothing that was saved is lost, and the run, continued as often as necessary, ends like an uninterrupted one.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_parallel import torchrun_arguments
from test_resume import assert_same_run
from test_validation import assert_same_validation
from tiny_run import ENVIRONMENT, HELPERS

from linvideo.run.checkpoint import Checkpoint, list_checkpoints
from linvideo.run.session import EXPORT
from linvideo.transfer.trainer import STAGES
from linvideo.workspace import remove_dead

# a checkpoint after every step, so that many kills hit the writing of one
SETTINGS = {"checkpointing_steps": 1, "validation": {"steps": 4, "num_videos": 1, "num_inference_steps": 1}}


class Attempt:
    """A process, or two ranks under torchrun, that begins or continues the run in `folder`.

    The clock starts when everything is imported; from then on `pids` are known.
    """

    def __init__(self, folder: Path, ranks: int = 1, **overrides):
        overrides = SETTINGS | {"resume_from_checkpoint": "latest"} | overrides
        if ranks == 1:
            command = [
                sys.executable,
                str(HELPERS / "tiny_run.py"),
                str(folder),
                json.dumps(overrides),
            ]
            arguments = {"args": command, "env": ENVIRONMENT, "text": True}
        else:
            overrides["gradient_accumulation_steps"] = 1  # the global batch of one process
            arguments = torchrun_arguments(ranks, folder.parent, {folder.name: overrides})
        self.errors = folder.parent / "errors.txt"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(stdout=subprocess.PIPE, stderr=errors, **arguments)
        lines = [self.process.stdout.readline().split() for _ in range(ranks)]
        self.pids = [self.process.pid] if ranks == 1 else [int(pid) for _, pid in sorted(lines)]
        self.started = time.monotonic()

    def finish(self) -> float:
        """Wait for a successful end and return the seconds since the start of the clock."""
        self._end()
        assert self.process.returncode == 0, self.errors.read_text()
        return time.monotonic() - self.started

    def kill(self, after: float, rank: int = 0) -> bool:
        """Kill the run. Return False if it ended successfully before that."""
        try:
            self.process.wait(after)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):  # the rank may have ended before torchrun
                os.kill(self.pids[rank], signal.SIGKILL)
        self._end()
        code, said = self.process.returncode, self.errors.read_text()
        assert code in (0, -signal.SIGKILL) or "SIGKILL" in said, said  # torchrun reports the signal of a rank
        return code != 0

    def _end(self) -> None:
        self.process.communicate(timeout=300)


@dataclass
class Safe:
    """The saved state of a run: stage and step of the newest checkpoint, the steps of all checkpoints, the shards."""

    progress: tuple[int, int]
    checkpoints: list[int]
    shards: set[str]

    @classmethod
    def of(cls, folder: Path, limit: int | None) -> "Safe":
        """Raise ValueError when a checkpoint that should be kept is damaged."""
        remove_dead(folder)  # as continuing a run does first
        kept = list_checkpoints(folder)[-(limit or 0) :]  # older ones may be partly deleted
        checkpoints = [Checkpoint(path) for path in kept]
        shards = {path.name for path in (folder / "trajectories").glob("shard-*.json")}
        if not kept:
            return cls((0, 0), [], shards)
        newest = checkpoints[-1]
        steps = [checkpoint["global_step"] for checkpoint in checkpoints]
        return cls(([*STAGES, EXPORT].index(newest["stage"]), newest["stage_step"]), steps, shards)

    def assert_kept(self, now: "Safe", limit: int | None) -> None:
        assert now.progress >= self.progress
        assert now.shards >= self.shards
        gone = set(self.checkpoints) - set(now.checkpoints)
        assert not gone or (limit == len(now.checkpoints) and max(gone) < min(now.checkpoints))


def kill_and_continue(
    base: Path, reference: Path, seconds: float, kills: int, seed: int, ranks: int = 1
) -> list[tuple[int, int, int]]:
    """Kill and continue runs in folders of `base` until there were `kills` kills. Every run is finished and compared.

    An uninterrupted run takes `seconds`. Returns the state that each kill left: stage, step, shards.
    """
    drawn, left = random.Random(seed), []
    while len(left) < kills:
        folder, limit = base / f"run-{len(left)}", drawn.choice((None, 1, 2))
        safe, killed = Safe((0, 0), [], set()), True
        folder.mkdir()
        while killed:
            attempt = Attempt(folder, ranks, checkpoints_total_limit=limit)
            if len(left) == kills:
                attempt.finish()
                break
            killed = attempt.kill(drawn.uniform(0, seconds), drawn.randrange(ranks))
            if killed:
                now = Safe.of(folder, limit)
                safe.assert_kept(now, limit)
                safe = now
                left.append(now.progress)
        assert_same_run(folder, reference)
        assert_same_validation(folder, reference)
        assert not [path for path in folder.rglob(".*")]  # no temporary files are left
        shutil.rmtree(folder)
    return left


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> tuple[Path, float]:
    folder = tmp_path_factory.mktemp("faults") / "run"
    return folder, Attempt(folder).finish()


def test_killed_at_three_moments(tmp_path, uninterrupted):
    assert len(kill_and_continue(tmp_path, *uninterrupted, kills=3, seed=0)) == 3


@pytest.mark.full
def test_killed_at_many_moments(tmp_path, uninterrupted):
    left, seed = [], 1
    while len(set(left)) <= 6 and seed <= 4:  # with varying load, several kills may hit the same state
        left += kill_and_continue(tmp_path, *uninterrupted, kills=24, seed=seed)
        seed += 1
    assert len(set(left)) > 6, left  # the kills hit different states


@pytest.mark.full
def test_a_rank_of_two_killed_at_any_moment(tmp_path):
    reference = tmp_path / "uninterrupted" / "run"
    reference.parent.mkdir()
    seconds = Attempt(reference, ranks=2).finish()
    assert len(kill_and_continue(tmp_path, reference, seconds, kills=3, seed=2, ranks=2)) == 3
