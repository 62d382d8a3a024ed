"""The few-step benchmark: sampling, one seed that can be continued, and the tables."""

import json
from dataclasses import replace

import pytest
import torch
from tiny import sampled_states, tiny_pipeline

from benchmarks.few_steps import __main__ as command
from benchmarks.few_steps import few_steps_bench, few_steps_report, suite
from benchmarks.few_steps.few_steps_bench import SCALES, EulerSteps, Scale

SMALL = SCALES["small"]
QUICK = Scale(
    replace(SMALL.transfer, budget=2, selection_steps=2, warmup_steps=2, num_states=8, num_trajectories=8, videos=4),
    regression_steps=2,
    dmd_steps=15,
    regression_learning_rate=1e-4,
    learning_rate=1e-4,
    critic_learning_rate=1e-4,
)


class Fake:
    """A distance without the network, whose training takes minutes."""

    def __init__(self, *arguments):
        pass

    def __call__(self, videos: torch.Tensor) -> float:
        return float(videos.mean())


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setitem(SCALES, "small", QUICK)
    monkeypatch.setattr("benchmarks.ablations.bench.WorldDistance", Fake)
    monkeypatch.setattr(few_steps_bench, "DISTILLED", {"distilled": (2,), "joint": (2,)})
    monkeypatch.setattr(suite, "DISTILLED", few_steps_bench.DISTILLED)
    monkeypatch.setattr(few_steps_bench, "STEPS", (2,))
    # jobs run in this process, where the replacements apply
    monkeypatch.setattr("benchmarks.worlds.ProcessPoolExecutor", InThisProcess)


class InThisProcess:
    def __init__(self, processes, context, initializer, arguments):
        initializer(*arguments)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *arguments):
        from concurrent.futures import Future

        future = Future()
        future.set_result(function(*arguments))
        return future


def test_one_seed_from_the_transfer_to_the_rows(quick, tmp_path, capsys):
    threads = torch.get_num_threads()
    words = ["--seeds", "1", "--processes", "1", "--output_dir", str(tmp_path / "out"), "--no_report"]
    command.main(words)
    rows = json.loads((tmp_path / "out" / "rows.json").read_text())
    found = [(row["model"], row["steps"]) for row in rows]
    # the base rows come first and in order, the distillations as they finish
    assert [*found[:6], *sorted(found[6:])] == [
        ("teacher", "full"),
        ("teacher", 2),
        ("teacher, student's timesteps", 2),
        ("converted", 2),
        ("converted, student's timesteps", 2),
        ("converted", "full"),
        ("distilled", 2),
        ("joint", 2),
        ("regression", 2),
    ]
    by_name = {(row["model"], row["steps"]): row for row in rows}
    assert by_name["teacher", "full"]["psnr_to_teacher"] is None
    # all were sampled differently, and distribution matching changed the student
    assert len({row["distance"] for row in rows}) == len(rows)
    assert all(0 <= row["good"] <= 1 and row["commit"] for row in rows)
    assert (tmp_path / "out" / "runs" / "default-0" / "pipeline").is_dir()

    kept = [row for row in rows if row["model"] != "joint"]
    (tmp_path / "out" / "rows.json").write_text(json.dumps(kept))
    capsys.readouterr()
    command.main(words)
    assert "joint" in (said := capsys.readouterr().out) and said.count("\n") == 1
    again = json.loads((tmp_path / "out" / "rows.json").read_text())
    assert {row["distance"] for row in again} == {row["distance"] for row in rows}
    torch.set_num_threads(threads)


def test_euler_steps_are_those_of_the_stock_scheduler():
    noise = torch.randn(16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    settings = {"prompt": "a", "num_inference_steps": 4, "guidance_scale": 1.0, "max_sequence_length": 20}
    settings |= {"height": 32, "width": 32, "num_frames": 5}
    stock = tiny_pipeline()
    stock.scheduler = type(stock.scheduler)(shift=1.0, shift_terminal=0.25)
    ours = tiny_pipeline()
    ours.scheduler = EulerSteps([1000.0, 750.0, 500.0, 250.0])
    torch.testing.assert_close(sampled_states(ours, noise, **settings), sampled_states(stock, noise, **settings))


def row(model: str, steps, seed: int, **figures) -> dict:
    return {"model": model, "steps": steps, "seed": seed, "coverage": 0.5, "commit": "c", **figures}


def test_a_result_is_kept_and_told_in_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr(few_steps_report, "FOLDER", tmp_path / "results")
    rows = [row("teacher", "full", seed, good=1.0, psnr_to_teacher=None) for seed in (0, 1)]
    rows += [row("distilled", 2, 0, good=0.9), row("distilled", 2, 1, good=0.8, diverged="it did")]
    path = few_steps_report.save(rows, "small", SMALL)
    assert few_steps_report.save(rows, "small", SMALL) == path  # the same rows are the same result
    assert few_steps_report.save(rows[:3], "small", SMALL) != path
    written = few_steps_report.write(tmp_path / "results", tmp_path).read_text()
    assert written.count("## World small") == 1  # only the newest

    path.touch()
    lines = few_steps_report.section(json.loads(path.read_text()))
    text = "\n".join(lines)
    assert "### Full number of steps" in text and "### 2 steps" in text and "### 1 step" not in text
    assert "| distilled | 85.0 ± 7.1 |" in text and "1 of 2 diverged" in text
    assert "| teacher | 100.0 |" in text


@pytest.mark.parametrize(
    "words, named",
    [(["--seeds", "0"], "seeds"), (["--processes", "0"], "processes"), (["--world", "middle"], "teacher")],
)
def test_bad_arguments_end_in_one_line(words, named, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(words)
    assert stopped.value.code == 2 and named in capsys.readouterr().err.splitlines()[-1]
