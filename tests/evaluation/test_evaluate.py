"""`linvideo evaluate`: fidelity to the teacher, and VBench's videos; interrupted work is continued, other work is
refused."""

import copy
import json
import re
import shlex
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from pages import Page
from tiny import tiny_pipeline

from linvideo import convert, save_pipeline
from linvideo.commands.evaluate_command import DIMENSIONS
from linvideo.commands.main import main
from linvideo.evaluation import fidelity, vbench
from linvideo.evaluation.analyze import analyze
from linvideo.evaluation.sampling import Job, add_to_index, read_index
from linvideo.evaluation.work_folder import WorkFolder
from linvideo.models import FewStepScheduler
from linvideo.run.video_metrics import compare, flicker
from linvideo.trajectories.collect import TrajectoryConfig
from linvideo.trajectories.prompts import Prompt
from linvideo.workspace import LOCK, locked

SIZE = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "guidance_scale": 1.0}
FLAGS = [word for name, value in SIZE.items() for word in (f"--{name}", str(value))] + ["--device", "cpu"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("evaluate")
    stock = tiny_pipeline()
    stock.save_pretrained(path / "stock")
    save_pipeline(convert(stock, [0, 1, 2], mode="linear"), path / "linear")
    return path


@pytest.fixture(scope="module")
def pipelines():
    stock = tiny_pipeline()
    for pipeline in (stock, linear := convert(stock, [0, 1, 2], mode="linear")):
        pipeline.set_progress_bar_config(disable=True)
    return linear, stock


def test_metrics_of_known_videos():
    still = torch.full((4, 3, 32, 32), 0.5)
    same = compare(still, still)
    assert same == {"psnr": 100.0, "ssim": pytest.approx(1.0), "flicker": 0.0, "teacher_flicker": 0.0}
    blinking = still.clone()
    blinking[::2] += 0.1
    row = compare(blinking, still)
    assert row["psnr"] == pytest.approx(10 * np.log10(1 / (0.01 / 2)), rel=1e-5)
    assert row["flicker"] == pytest.approx(0.1, rel=1e-5) and row["teacher_flicker"] == 0 and row["ssim"] < 1
    seen = compare(blinking, still, perceptual=lambda a, b: (a - b).abs().mean((1, 2, 3)))
    assert seen["lpips"] == pytest.approx(0.1, rel=1e-5)  # half of the frames are off by 0.1, which is 0.2 in [-1, 1]
    assert flicker(still[:1]) == 0
    blinking[0, 0, 0, 0] = float("nan")
    assert np.isnan(compare(blinking, still)["psnr"])


def test_a_pipeline_equals_itself(pipelines, tmp_path):
    _, stock = pipelines
    with pytest.warns(UserWarning, match="the student is its own teacher"):
        (row,) = fidelity.fidelity(stock, stock, ["a cat"], tmp_path / "f", **SIZE)
    assert row["psnr"] == 100 and row["ssim"] == pytest.approx(1)


def test_a_distilled_student_keeps_its_own_steps(pipelines, tmp_path):
    linear, stock = pipelines
    distilled = copy.copy(linear)
    distilled.scheduler = FewStepScheduler([1000.0, 500.0, 250.0])  # SIZE asks for 2 steps, of the teacher
    (row,) = fidelity.fidelity(distilled, stock, ["a boat"], tmp_path, **SIZE | {"guidance_scale": 3.0})
    assert row["psnr"] < 99 and (tmp_path / "0000-student.mp4").is_file()


def test_an_interrupted_evaluation_continues(pipelines, tmp_path):
    linear, stock = pipelines
    prompts = ["a cat", "a dog", "a bird"]
    whole = list(fidelity.fidelity(linear, stock, prompts, tmp_path / "whole", **SIZE))
    steps = fidelity.fidelity(linear, stock, prompts, tmp_path / "parts", **SIZE)
    next(steps)
    steps.close()
    assert json.loads((tmp_path / "parts" / "rows.json").read_text()) == whole[:1]
    first = (tmp_path / "parts" / "0000-student.mp4").stat().st_mtime_ns
    assert list(fidelity.fidelity(linear, stock, prompts, tmp_path / "parts", **SIZE)) == whole
    assert (tmp_path / "parts" / "0000-student.mp4").stat().st_mtime_ns == first
    assert len(list((tmp_path / "parts").glob("*.mp4"))) == 6
    with pytest.raises(ValueError, match=r"num_inference_steps 2 \(now 3\)"):
        list(fidelity.fidelity(linear, stock, prompts, tmp_path / "parts", **SIZE | {"num_inference_steps": 3}))
    with pytest.raises(ValueError, match=r"student .* \(now .*"):
        list(fidelity.fidelity(stock, stock, prompts, tmp_path / "parts", **SIZE))
    with pytest.raises(ValueError, match=r"fps 16 \(now 8\)"):
        list(fidelity.fidelity(linear, stock, prompts, tmp_path / "parts", fps=8, **SIZE))
    stock.scheduler.register_to_config(shift=5.0)
    with pytest.raises(ValueError, match=r"teacher .*shift', 3.0.* \(now .*shift', 5.0"):
        list(fidelity.fidelity(linear, stock, prompts, tmp_path / "parts", **SIZE))
    stock.scheduler.register_to_config(shift=3.0)
    mean, spread = fidelity.summary(whole)["psnr"]
    assert mean == pytest.approx(np.mean([row["psnr"] for row in whole])) and spread > 0


def test_a_folder_with_other_things_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        WorkFolder(tmp_path, {"a": 1})
    with pytest.raises(ValueError, match="is a file"), locked(tmp_path / "mine.txt"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_kill_during_the_first_write_does_no_harm(tmp_path):
    space = tmp_path / ".tmp-0123456789abcdef-request.json"
    space.mkdir()
    (space / LOCK).touch()
    (space / "new").write_text("{")
    WorkFolder(tmp_path, {"a": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["request.json"]


def test_one_evaluation_at_a_time(pipelines, tmp_path):
    linear, stock = pipelines
    with locked(tmp_path):
        for work in (fidelity.fidelity(*pipelines, ["a"], tmp_path), vbench.generate_videos(linear, ["a"], tmp_path)):
            with pytest.raises(ValueError, match="is in use"):
                next(work)
        options = {"trajectories": TrajectoryConfig(height=32, width=32, num_frames=5), "progress": False}
        with pytest.raises(ValueError, match="is in use"):
            analyze(stock, ["a"], tmp_path, **options, overwrite=True)


def test_rows_that_differ_from_what_was_written_are_refused(tmp_path):
    work, rows = WorkFolder(tmp_path, {"a": 1}), [{"psnr": 20.5}, {"psnr": 31.0}]
    for row in rows:
        work.add(row)
    assert WorkFolder(tmp_path, {"a": 1}).rows == rows
    file = tmp_path / "rows.json"
    text = file.read_text()
    for damaged, words in (
        (text.replace("31", "30"), "row 2 of .*rows.json differs from what was written"),
        ("5", "expected a list"),
        ("[" * 100_000, "nested too deeply"),
    ):
        file.write_text(damaged)
        with pytest.raises(ValueError, match=words):
            WorkFolder(tmp_path, {"a": 1})
    file.write_text(json.dumps(rows[1:]))  # deleted by hand, to be made again
    assert WorkFolder(tmp_path, {"a": 1}).rows == rows[1:]
    (tmp_path / "checksums.json").unlink()  # as earlier versions left it
    file.write_text('[{"psnr": 1.0}]')
    assert WorkFolder(tmp_path, {"a": 1}).rows == [{"psnr": 1.0}]
    (tmp_path / "request.json").write_text("[1]")
    with pytest.raises(ValueError, match="expected an object in .*request.json, got list"):
        WorkFolder(tmp_path, {"a": 1})


def test_the_fidelity_command(folders, tmp_path, capsys):
    command = [
        "evaluate",
        str(folders / "linear"),
        "--suite",
        "fidelity",
        "--output_dir",
        str(tmp_path / "out"),
        *FLAGS,
    ]
    assert main(command) == 2 and "needs --teacher" in capsys.readouterr().err
    assert main([*command, "--teacher", str(folders / "stock"), "--num_prompts", "2"]) == 0
    out = capsys.readouterr().out
    assert "[2/2] PSNR" in out and "psnr " in out and "over 2 prompts" in out
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert "Over 2 prompts" in page.text and "structural similarity" in page.text
    again = re.search("linvideo (generate .*)", page.text)[1].replace("video.mp4", str(tmp_path / "video.mp4"))
    assert main(shlex.split(again)) == 0  # with the options of this evaluation
    assert f"PSNR {min(row['psnr'] for row in json.loads((tmp_path / 'out' / 'rows.json').read_text())):.2f} dB" in (
        capsys.readouterr().out
    )
    # of two videos the median is also the highest
    assert len(page.images) == 4 and all((tmp_path / "out" / link).is_file() for link in page.links)


INFO = [
    {"prompt_en": "a cat", "dimension": ["imaging_quality", "color"]},
    {"prompt_en": "a dog", "dimension": ["subject_consistency"]},
    {"prompt_en": "a bird", "dimension": ["color"]},
]


@pytest.fixture
def full_info(tmp_path):
    path = tmp_path / "VBench_full_info.json"
    path.write_text(json.dumps(INFO))
    return path


def test_prompts_of_dimensions(full_info, tmp_path):
    assert vbench.prompts_of(full_info, ["imaging_quality", "subject_consistency"]) == ["a cat", "a dog"]
    assert vbench.prompts_of(full_info, ["subject_consistency", "color"], most=1) == ["a cat", "a dog"]
    with pytest.raises(
        ValueError, match="expected dimensions among color, imaging_quality, subject_consistency, got colour"
    ):
        vbench.prompts_of(full_info, ["colour"])
    entry = {"prompt_en": "a cat", "dimension": ["color"]}
    others = [None, 5, {"a": 1}, [None], [entry, 3], [entry | {"prompt_en": None}], [entry | {"dimension": None}]]
    for other in [*others, [entry | {"dimension": "color"}], [entry | {"dimension": [None]}]]:
        (tmp_path / "other.json").write_text(json.dumps(other))
        with pytest.raises(ValueError, match="expected a list of prompt_en and dimension"):
            vbench.prompts_of(tmp_path / "other.json", ["color"])
    assert set(DIMENSIONS) == set(vbench.PAPER)


def test_no_entry_of_an_index_is_lost_when_several_write(tmp_path):
    jobs = [Job(Prompt(f"caption {number}"), number, tmp_path / f"{number:04d}.mp4") for number in range(32)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda job: add_to_index(tmp_path, job), jobs))
    assert [entry["caption"] for entry in read_index(tmp_path)] == [job.prompt.caption for job in jobs]


def test_vbench_videos_are_named_and_continued(pipelines, tmp_path, capsys):
    linear, _ = pipelines
    steps = vbench.generate_videos(linear, ["a cat", "a dog"], tmp_path / "v", per_prompt=2, **SIZE)
    assert next(steps) == (1, 4)
    steps.close()
    first = (tmp_path / "v" / "videos" / "a cat-0.mp4").stat().st_mtime_ns
    again = vbench.generate_videos(linear, ["a cat", "a dog"], tmp_path / "v", per_prompt=2, **SIZE)
    assert list(again)[-1] == (4, 4)
    names = {path.name for path in (tmp_path / "v" / "videos").iterdir()}
    assert names == {"a cat-0.mp4", "a cat-1.mp4", "a dog-0.mp4", "a dog-1.mp4"}
    video = tmp_path / "v" / "videos" / "a cat-0.mp4"
    assert video.stat().st_mtime_ns == first
    whole = video.read_bytes()
    video.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert len(list(vbench.generate_videos(linear, ["a cat", "a dog"], tmp_path / "v", per_prompt=2, **SIZE))) == 4
    assert video.read_bytes() == whole and "a cat-0.mp4 is damaged" in capsys.readouterr().err
    with pytest.raises(ValueError, match="none with a slash"):
        list(vbench.generate_videos(linear, ["a/b"], tmp_path / "w", **SIZE))
    with pytest.raises(ValueError, match="prompts of at most 220 bytes"):
        list(vbench.generate_videos(linear, ["a" * 300], tmp_path / "w", **SIZE))


def test_the_vbench_command(folders, full_info, tmp_path, capsys, monkeypatch):
    """Without the package the command says how to get the scores; with it they stand next to the paper's."""
    command = ["evaluate", str(folders / "linear"), "--suite", "vbench", "--output_dir", str(tmp_path / "out")]
    command += [*FLAGS, "--num_prompts", "1", "--dimensions", "imaging_quality"]
    assert main(command) == 2 and "package vbench" in capsys.readouterr().err
    command += ["--full_info", str(full_info)]
    assert main(command) == 0
    assert "vbench evaluate --videos_path" in capsys.readouterr().out
    assert len(list((tmp_path / "out" / "videos").iterdir())) == 5
    assert "There are no scores yet" in (tmp_path / "out" / "report.html").read_text()

    class Judge:
        def __init__(self, device, full_info_dir, output_path):
            self.output_path = output_path

        def evaluate(self, videos_path, name, dimension_list):
            results = {dimension: [0.5, []] for dimension in dimension_list}
            with open(f"{self.output_path}/{name}_eval_results.json", "w") as file:
                json.dump(results, file)

    package = types.ModuleType("vbench")
    package.VBench, package.__spec__ = Judge, types.SimpleNamespace(origin=str(full_info))
    monkeypatch.setitem(sys.modules, "vbench", package)
    assert main(command) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("imaging_quality"))
    assert line.split() == ["imaging_quality", "50.00", "66.25", "66.07", "65.62"]
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert page.links == ["videos/a%20cat-0.mp4"] and "66.07" in page.text
