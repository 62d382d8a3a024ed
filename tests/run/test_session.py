"""Using `Run` in a training loop of one's own: a linear layer and two stages."""

import gc
import weakref
from functools import partial

import pytest
import torch

from linvideo.run import Run, RunConfig, TrainingDiverged, read_metrics
from linvideo.run.checkpoint import list_checkpoints
from linvideo.run.optimizer import fill_state

FINAL = 6  # steps of the second stage


class Killed(Exception):
    pass


def stage(run: Run, student: torch.nn.Module, count: int, die_at: int | None = None) -> None:
    optimizer = torch.optim.Adam(student.parameters(), lr=0.1)
    fill_state(optimizer)
    run.register(optimizer=optimizer)
    for step in run.steps(count, samples=4):
        x = torch.full((4, 3), float(step + 1))
        loss = (student(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        if run.finite(float(loss.detach())):
            optimizer.step()
        optimizer.zero_grad()
        run.report(float(loss.detach()))
        if run.global_step == die_at:
            raise Killed
    run.results[run.stage] = count


def train(folder, die_at=None, stages=("first", "second"), resume=None, **options) -> torch.nn.Linear:
    config = RunConfig(
        str(folder),
        max_train_steps=FINAL,
        checkpointing_steps=2,
        progress=False,
        resume_from_checkpoint=resume,
        **options,
    )
    counts = {"first": 3, "second": FINAL}
    run = Run(config, {name: partial(stage, count=counts[name], die_at=die_at) for name in stages})
    with run:
        run.check_continues()
        config.save(run.output_dir / "config.yaml")
        student = torch.nn.Linear(3, 1)
        torch.nn.init.constant_(student.weight, 0.5)
        run.restore(student)
        for step in run.remaining():
            step(run, student)
        run.save()
    assert [run.results[name] for name in stages] == [counts[name] for name in stages]
    return student


@pytest.mark.parametrize("step", [1, 3, 4, 7, 9])
def test_a_custom_loop_is_continued_exactly(step, tmp_path):
    whole = train(tmp_path / "whole")
    with pytest.raises(Killed):
        train(tmp_path / "run", die_at=step)
    resumed = train(tmp_path / "run", resume="latest")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "run")]
    assert rows[0] == rows[1] and [row["step"] for row in rows[0]] == list(range(1, 4 + FINAL))


def test_models_are_freed_with_the_run(tmp_path):
    gc.disable()
    try:
        student = weakref.ref(train(tmp_path))
        assert student() is None  # even before the garbage collector runs
    finally:
        gc.enable()


def test_mistakes_in_a_custom_loop_are_reported(tmp_path):
    config = RunConfig(str(tmp_path), max_train_steps=FINAL, checkpointing_steps=1, progress=False)
    student = torch.nn.Linear(3, 1)
    with Run(config, {"only": None}) as run, pytest.raises(RuntimeError, match="check_continues"):
        run.restore(student)
    with Run(config, {"only": None}) as run, pytest.raises(RuntimeError, match=r"restore\(\) .* before remaining"):
        next(run.remaining())
    for stages in ({}, {"export": None}):
        with pytest.raises(ValueError, match="names other than export"):
            Run(config, stages)
    with pytest.raises(Killed):
        train(tmp_path, die_at=3)
    config.resume_from_checkpoint, config.checkpointing_steps = "latest", 2
    with Run(config, {"first": None, "second": None}) as run:
        run.check_continues()
        run.restore(student)
        next(run.remaining())
        with pytest.raises(RuntimeError, match=r"register\(\) before steps\(\) in the stage first"):
            next(run.steps(3, samples=4))
        with pytest.raises(ValueError, match="was made with the components optimizer; expected optimizer, ema"):
            run.register(optimizer=torch.optim.Adam(student.parameters()), ema=torch.optim.SGD(student.parameters()))


def test_the_checkpoint_of_another_kind_of_run_is_refused(tmp_path):
    with pytest.raises(Killed):
        train(tmp_path, die_at=3)
    with pytest.raises(ValueError, match="is of another kind of run, with a stage first"):
        train(tmp_path, resume="latest", stages=("second",))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2"]


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: self.weight.sum() * float("nan") * x)
    with pytest.raises(TrainingDiverged, match="1 steps had .*, the last was step 1 of first"):
        train(tmp_path, max_nonfinite_steps=0)
