"""`make evidence`: every step runs here at tiny sizes, continues where it stopped, and reports what it found."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="make evidence needs triton")

from benchmarks import results  # noqa: E402
from benchmarks.evidence import __main__ as evidence  # noqa: E402
from benchmarks.evidence import rows, summary  # noqa: E402
from benchmarks.peers import OURS  # noqa: E402
from benchmarks.peers import WINDOW as WINDOW_OP  # noqa: E402
from benchmarks.shapes import WINDOW  # noqa: E402

ROOT = Path(__file__).parents[2]
ENVIRONMENT = dict.fromkeys(results.ENVIRONMENT) | {
    "device": "NVIDIA H200",
    "cuda": "13.0",
    "packages": {"torch": "2.13.0"},
    "commit": "0123456789abcdef",
    "time": "2026-01-02T03:04:05Z",
    "rates": {"bfloat16": {"copy_gb_s": 4000.0, "matmul_tflop_s": 700.0}},
}


def op_row(name: str, ms: float | None, shape: str = "wan2.1-1.3b-480p") -> dict:
    row = {"suite": "op", "shape": shape, "dtype": "bfloat16", "name": name, "pass": "forward"}
    return row | ({"absent": "RuntimeError: no"} if ms is None else {"ms": [ms] * 3})


def model_row(count: int, ms: float, backend: str) -> dict:
    row = {"suite": "model", "model": "1.3b-480p", "dtype": "bfloat16", "backend": backend, "linear_layers": count}
    return row | {"compiled": False, "how": "composed", "layers": 30, "ms": [ms] * 3}


def save(folder: Path, made: list[dict]) -> Path:
    file = results.ResultFile(ENVIRONMENT, folder, "evidence")
    for row in made:
        file.add(row)
    return file.path


def junit(folder: Path, number: int, cases: dict[str, str | None]) -> None:
    """Write a JUnit file. cases: test -> reason of its failure, or None."""
    lines = []
    for name, why in cases.items():
        inside = "" if why is None else f'<failure message="{why}">trace</failure>'
        lines.append(f'<testcase classname="tests.kernels.test_x" name="{name}">{inside}</testcase>')
    (folder / f"correct-{number}.xml").write_text(f"<testsuites><testsuite>{''.join(lines)}</testsuite></testsuites>")


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evidence")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.evidence", "--dry_run", "--output_dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_step_runs_without_a_gpu(dry_run):
    measured = [row for document in results.load(dry_run) for row in document["rows"]]
    assert {row["suite"] for row in measured} == set(results.COLUMNS)
    assert not [row for row in measured if "absent" in row]
    log = (dry_run / "evidence.log").read_text()
    assert "ended by" not in log and "exit status 0" in log
    assert not [line for line in log.splitlines() if line.startswith("exit status") and "status 0," not in line]
    assert all(f"{part.name}:" in log for part in rows.parts("cpu", None, True))
    found = summary.outcomes(dry_run)
    assert len(found) == 3 and set(found.values()) == {summary.PASSED}


def test_few_small_files(dry_run):
    files = list(dry_run.iterdir())
    assert len(files) <= 8 and all(file.stat().st_size < 2**21 for file in files)


def test_the_summary_is_a_screen_with_all_parts(dry_run):
    text = (dry_run / summary.FILE).read_text()
    assert len(text.splitlines()) < 90
    for part in (
        "**Tests**: 3 passed, 0 failed",
        f"{OURS}: ",
        "Launches of",
        "tiles of map_grad",
        "3 of 3 linear",
        "2 of 3 linear, the others window",
        f"{WINDOW_OP} (52% of pairs): ",
        "ADM",
    ):
        assert part in text


def test_a_second_call_measures_nothing_again(dry_run, tmp_path, monkeypatch, capsys):
    for path in dry_run.glob("*.json"):
        document = json.loads(path.read_text())
        document["environment"]["device"] = "this one"
        (tmp_path / path.name).write_text(json.dumps(document))
    before = {path: path.read_text() for path in tmp_path.glob("*.json")}
    monkeypatch.setattr(results, "environment", lambda rates: ENVIRONMENT | {"device": "this one"})
    monkeypatch.setattr(rows.measure, "attempt", lambda row, _: pytest.fail(f"measured {row} again"))
    only = ("headline", "kernel by kernel", "eager and compiled", "blocks and models")
    assert [rows.run(60, tmp_path, True, False, name) for name in only] == [0] * len(only)
    assert {path: path.read_text() for path in tmp_path.glob("*.json")} == before


def test_what_failed_is_tried_again_and_other_devices_do_not_count(tmp_path):
    save(tmp_path, [op_row("a", 1.0), op_row("b", None)])
    key = results.key(op_row("a", 1.0))
    assert set(rows.known_rows(tmp_path, "NVIDIA H200", False)) == {key}
    assert set(rows.known_rows(tmp_path, "NVIDIA H200", True)) == {key, results.key(op_row("b", None))}
    assert rows.known_rows(tmp_path, "NVIDIA H100", True) == {}


def test_no_row_is_begun_after_the_time(tmp_path):
    assert rows.run(0, tmp_path, True, False) == 0 and not list(tmp_path.iterdir())


def test_a_part_that_fails_does_not_end_the_others(tmp_path, monkeypatch, capsys):
    def fails():
        raise ModuleNotFoundError("No module named 'diffusers'")

    made = [rows.Part("one", 9, fails), rows.Part("two", 9, lambda: iter([op_row("a", 1.0)]))]
    monkeypatch.setattr(rows, "parts", lambda *_: made)
    assert rows.run(60, tmp_path, True, False) == 0
    assert "ended by ModuleNotFoundError: No module named 'diffusers'" in capsys.readouterr().out
    assert len(results.load(tmp_path)) == 1


def test_another_process_follows_one_that_lost_the_gpu(tmp_path, monkeypatch):
    statuses, seen = iter([rows.LOST, -11, 0, 0]), []

    def command(self, arguments, seconds, environment=None):
        seen.append("--skip_absent" in arguments)
        return next(statuses)

    monkeypatch.setattr(evidence.Drill, "command", command)
    evidence.Drill(tmp_path, 1, False).measure()
    assert seen == [False, True, True]


def test_a_command_that_overruns_is_stopped_and_logged(tmp_path):
    drill = evidence.Drill(tmp_path, 1, False)
    code = "import time\ntry:\n    print('begun')\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('saved')"
    assert drill.command([sys.executable, "-c", code], 3) == 0
    log = drill.log.read_text()
    assert "begun" in log and "saved" in log and "stopped after 3 s" in log


def test_tests_that_passed_once_are_not_run_again(tmp_path, monkeypatch):
    junit(tmp_path, 1, {"a": None, "b": "E   assert 1 == 2"})
    seen = []
    monkeypatch.setattr(evidence.Drill, "command", lambda self, arguments, *_: seen.extend(arguments))
    evidence.Drill(tmp_path, 1, False).test()
    assert "--deselect=tests/kernels/test_x.py::a" in seen and "--deselect=tests/kernels/test_x.py::b" not in seen
    assert f"--junitxml={tmp_path / 'correct-2.xml'}" in seen
    junit(tmp_path, 2, {"b": None})
    assert summary.failures(tmp_path) == 0


def test_the_summary_says_what_failed_and_which_targets_were_met(tmp_path):
    junit(tmp_path, 1, {"a": None, "b": "E   assert 1 == 2"})
    made = [op_row(OURS, 0.19), op_row("softmax SDPA flash", 15.0), op_row("softmax SDPA cuDNN", 7.0)]
    made += [op_row("softmax flash-attn 4", None), model_row(0, 600.0, "_native_flash"), model_row(0, 500.0, "cudnn")]
    made += [model_row(16, 450.0, "_native_flash"), model_row(16, 390.0, "cudnn")]
    made += [model_row(0, 350.0, f"{WINDOW}_native_flash"), model_row(16, 300.0, f"{WINDOW}_native_flash")]
    save(tmp_path, made)
    text = summary.write(tmp_path).read_text()
    for line in (
        "- FAILED tests/kernels/test_x.py::b: E   assert 1 == 2",
        "- met: op forward, Wan 1.3B 480p 0.190 ms (target <= 0.2 ms)",
        "- MISSED: op over the fastest softmax, wan2.1-1.3b-480p 36.8x (target >= 40x)",
        "- met: Wan 1.3b-480p, 16 linear layers, composed, eager 1.28x (target >= 1.28x)",
        "- MISSED: Wan 1.3b-480p, 0 linear layers, the others window, composed, eager 1.43x (target >= 1.5x)",
        "- met: Wan 1.3b-480p, 16 linear layers, the others window, composed, eager 1.67x (target >= 1.61x)",
        "- absent: wan2.1-1.3b-480p bfloat16 softmax flash-attn 4 forward: RuntimeError: no",
    ):
        assert line in text.splitlines(), text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "expected a CUDA GPU, found none"), (["--minutes", "0"], "expected --minutes to be above 0, got 0.0")],
)
def test_bad_arguments(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        evidence.main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err
