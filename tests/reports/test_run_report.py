import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pages import Page
from tiny_run import tiny_config

from linvideo.models.video_file import save_video
from linvideo.reports import run_report

ROWS = [
    *({"step": i, "stage": "warmup", "stage_step": i, "loss": 1 / i} for i in range(1, 4)),
    *({"step": 3 + i, "stage": "selection", "stage_step": i, "loss": 0.5, "r": {"0": 0.9, "1": 0.2}} for i in (1, 2)),
    {"step": 6, "stage": "finetune", "stage_step": 1},  # not finite: skipped
    *({"step": 5 + i, "stage": "finetune", "stage_step": i, "loss": 1 / i} for i in range(2, 1002)),
]
VALIDATIONS = [
    {"step": step, "stage": "finetune", "stage_step": step - 5, "psnr": 20.0 + step, "ssim": 0.9, "flicker": 0.1}
    for step in (6, 8)
]
SUMMARY = {"warmup": 90.0, "finetune": 7200.0}
SUMMARY = {
    "seconds": SUMMARY,
    "peak_memory_gib": 3.0,
    "device": "CPU",
    "processes": 2,
    "validation_captions": ["<cat>"],
}


@pytest.fixture
def folder(tmp_path):
    """The folder of a run, without what the report does not read."""
    tiny_config(tmp_path).save(tmp_path / "config.yaml")
    for name, rows in (("metrics.jsonl", ROWS), ("validation.jsonl", VALIDATIONS)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    selection = {"linear_layers": [1], "r": {"0": 0.9, "1": 0.2}, "sensitivity": {"0": 0.5, "1": 0.1}}
    for name, values in (("selection.json", selection), ("summary.json", SUMMARY)):
        (tmp_path / name).write_text(json.dumps(values))
    for video in ("teacher/0.mp4", "step-8/0.mp4", "teacher/1.mp4"):
        (tmp_path / "validation" / video).parent.mkdir(parents=True, exist_ok=True)
        save_video(np.zeros((3, 16, 16, 3), np.uint8), tmp_path / "validation" / video, fps=8)
    return tmp_path


def test_the_report_shows_what_the_folder_holds(folder):
    run_report.write_report(folder)
    document = (folder / "report.html").read_text()
    page = Page(document)
    assert page.links == ["validation/teacher/0.mp4", "validation/step-8/0.mp4"]  # pairs only
    assert all((folder / link).is_file() for link in page.links)
    for said in (
        "1 layers are linear (1)",
        "the loss of fine-tuning fell from",
        "28.0 dB",
        "“<cat>”",
        "least sensitive",
        "2 h 00 min",
        "3.00 GiB",
        f"linvideo evaluate {folder}/pipeline --suite fidelity --teacher TEACHER",
    ):
        assert said in page.text, said
    assert "http" not in document and len(document) < 60_000  # a thousand steps are thinned out


def test_a_run_with_few_results_has_a_report(folder):
    for name in ("selection.json", "summary.json", "validation.jsonl", "metrics.jsonl"):
        (folder / name).unlink()
    run_report.write_report(folder)
    assert "There was no validation" in Page((folder / "report.html").read_text()).text
    (folder / "config.yaml").unlink()
    with pytest.raises(ValueError, match="has no config.yaml"):
        run_report.write_report(folder)


def test_a_loss_that_rises_is_called_that():
    rows = [{"step": i, "stage": "dmd", "loss": float(i)} for i in (1, 2)]
    said = run_report.verdict([], [4], rows, [])
    assert said.startswith(
        "1 layers are window layers (4); the loss of distribution matching (the critic) did not fall"
    )
    assert "it went from 1 to 2" in said


@pytest.mark.parametrize("first", [True, False])
def test_a_failure_does_not_fail_the_run(folder, first, monkeypatch):
    run = SimpleNamespace(
        ranks=SimpleNamespace(first=first, size=1),
        config=tiny_config(folder),
        device=torch.device("cpu"),
        results={"seconds": {"warmup": 1.0}},
        output_dir=folder,
    )
    data = SimpleNamespace(source=SimpleNamespace(captions=["a cat", "a dog"]))
    before = (folder / "summary.json").read_text()
    monkeypatch.setattr(run_report, "verdict", lambda *_: 1 / 0)
    if not first:  # one process writes
        run_report.report(run, data)
        assert (folder / "summary.json").read_text() == before
        return
    with pytest.warns(UserWarning, match="report.html was not written: division by zero"):
        run_report.report(run, data)
    assert json.loads((folder / "summary.json").read_text())["validation_captions"][:2] == ["a cat", "a dog"]
    assert not (folder / "report.html").exists()
