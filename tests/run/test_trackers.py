"""Trackers get every step once, with the pace, which stays out of the (reproducible) log file."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import run

from linvideo.run import Run, read_metrics
from linvideo.run.pace import Pace
from linvideo.run.trackers import Trackers
from linvideo.transfer import TrainConfig


class FakeRun:
    """One wandb run: the arguments it was started with, and its rows."""

    def __init__(self, rows, **arguments):
        self.arguments, self.rows, self.finished = arguments, rows, False
        self.starting_step = max(rows, default=-1) + 1

    def log(self, values, step):
        self.rows.setdefault(step, {}).update(values)

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for wandb. `runs` are the runs that were started, `server` is id -> step -> values."""
    module = ModuleType("wandb")
    module.__spec__ = ModuleSpec("wandb", None, origin="fake")
    module.runs, module.server = [], {}

    def init(**arguments):
        module.runs.append(FakeRun(module.server.setdefault(arguments["id"], {}), **arguments))
        return module.runs[-1]

    module.init = init
    module.Video = lambda path, format: SimpleNamespace(path=path, format=format)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_a_resumed_run_continues_its_wandb_run(tmp_path, wandb, monkeypatch):
    folder, settings = tmp_path / "run", {"report_to": "wandb", "tracker_project_name": "mine", "max_train_steps": 2}
    optimize, sent = Run.optimize, []

    def fail_at_8(run, *arguments):
        return 1 / 0 if run.global_step == 8 else optimize(run, *arguments)

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(Run, "optimize", fail_at_8)
        run(folder, **settings)
    first = wandb.runs[0]
    assert first.finished and sorted(first.rows) == list(range(1, 8))

    log = FakeRun.log
    monkeypatch.setattr(FakeRun, "log", lambda run, values, step: (sent.append(step), log(run, values, step)))
    run(folder, resume_from_checkpoint="latest", **settings)  # from checkpoint-6
    second = wandb.runs[1]
    assert first.arguments["id"] == second.arguments["id"] and len(wandb.server) == 1
    assert second.arguments["resume"] == "allow" and second.arguments["project"] == "mine"
    assert second.arguments["config"]["selection"]["num_linear_layers"] == 2
    assert sent == [8, 9, 10, 11]  # wandb has step 7 already
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == sorted(second.rows)
    for row in rows:
        seen = second.rows[row["step"]]
        assert seen[f"{row['stage']}/loss"] == row["loss"] and seen[f"{row['stage']}/samples_per_second"] > 0
    assert second.rows[5]["selection/r/2"] == rows[4]["r"]["2"]
    assert not any(name in row for row in rows for name in ("samples_per_second", "peak_memory_gib"))

    run(folder, overwrite_output_dir=True, **settings)
    assert len(wandb.server) == 2


def scalars(folder, name):
    events = EventAccumulator(str(folder / "logs")).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_drops_steps_that_a_resumed_run_repeats(tmp_path):
    for last_step, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        trackers = Trackers("tensorboard", tmp_path, "", {}, last_step)
        for step in steps:
            trackers.log("a", {"x": step / 2, "r": {"7": step}, "name": "text"}, step)
        trackers.close()
    assert scalars(tmp_path, "a/x") == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]
    assert scalars(tmp_path, "a/r/7") == [(step, step) for step in (1, 2, 3, 4)]


def test_videos(tmp_path, wandb):
    trackers = Trackers("tensorboard,wandb", tmp_path, "", {})
    trackers.video("v/0", tmp_path / "0.mp4", np.zeros((20, 4, 6, 3), dtype=np.uint8), 3)
    trackers.close()
    (film,) = EventAccumulator(str(tmp_path / "logs")).Reload().Images("v/0")
    assert (film.step, film.height, film.width) == (3, 4, 8 * 6)
    assert wandb.runs[0].rows[3]["v/0"].path == str(tmp_path / "0.mp4")


def test_pace_follows_the_clock(monkeypatch):
    clock = iter([0.0, 1.0, 50.0, 53.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    pace = Pace(samples=8, keep=0.5)
    pace.start()
    assert pace.stop() == 8
    pace.start()
    assert pace.stop() == pytest.approx(8 * 1.5 / 3.5)  # steps of 1 s and 3 s, the first counting half


def test_the_bar_shows_pace(tmp_path, capsys):
    selection = {"max_train_steps": 2, "num_linear_layers": 1}
    run(tmp_path / "run", progress=True, max_train_steps=1, selection=selection)
    shown = capsys.readouterr().err
    assert "samples/s=" in shown and "linear=" in shown and "r=0." in shown


@pytest.mark.parametrize("found", [None, ModuleSpec("wandb", None)])  # the second is a folder named wandb
def test_trackers_that_are_not_installed(found, monkeypatch):
    monkeypatch.setattr("linvideo.run.trackers.find_spec", lambda name: found)
    for name in ("wandb", "tensorboard"):
        with pytest.raises(ValueError, match=f"^report_to {name} needs the package {name}, which is not installed$"):
            TrainConfig("a", report_to=name)
