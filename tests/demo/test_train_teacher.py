import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from linvideo import load_pipeline
from linvideo.demo import judge, teacher, train_teacher
from linvideo.demo.world import WORLDS
from linvideo.workspace import locked


class Killed(Exception):
    pass


@pytest.fixture(autouse=True)
def tiny_teachers(monkeypatch):
    for name, settings in teacher.SETTINGS.items():
        tiny = dataclasses.replace(settings, layers=1, heads=2, head_dim=24, ffn_dim=64, num_inference_steps=1)
        monkeypatch.setitem(teacher.SETTINGS, name, tiny)


def flags(folder: Path, *more: str, world: str = "middle", steps: int = 4) -> list[str]:
    return [
        *("--output_dir", str(folder), "--world", world, "--max_train_steps", str(steps), "--train_batch_size", "2"),
        *("--checkpointing_steps", "2", "--num_videos", "3", "--device", "cpu", *more),
    ]


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    whole = train_teacher.TeacherRun.train_step

    def cut(run, factor):
        if run.step == step:
            raise Killed
        whole(run, factor)

    monkeypatch.setattr(train_teacher.TeacherRun, "train_step", cut)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def test_a_killed_run_continues_as_if_nothing_had_been(tmp_path, capsys):
    train_teacher.main(flags(tmp_path / "whole"))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 3)
        train_teacher.main(flags(tmp_path / "cut"))
    assert [path.name for path in (tmp_path / "cut.state").iterdir()] == ["checkpoint-2"]
    assert not (tmp_path / "cut").exists()
    with pytest.raises(SystemExit):  # neither lost nor overwritten by a new start
        train_teacher.main(flags(tmp_path / "cut"))
    with pytest.raises(SystemExit):
        train_teacher.main(flags(tmp_path / "cut", "--seed", "5", "--resume_from_checkpoint"))
    assert "'seed': 5" in capsys.readouterr().err
    (tmp_path / "cut.state" / "notes.txt").write_text("mine")
    with locked(tmp_path / "cut.state"), pytest.raises(SystemExit):
        train_teacher.main(flags(tmp_path / "cut", "--resume_from_checkpoint"))
    assert "cut.state is in use" in capsys.readouterr().err
    train_teacher.main(flags(tmp_path / "cut", "--resume_from_checkpoint"))
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "cut", "cut.state"}
    assert [path.name for path in (tmp_path / "cut.state").iterdir()] == ["notes.txt"]


def test_a_run_killed_while_it_is_judged_is_judged_again(tmp_path, monkeypatch):
    def fail(*args):
        raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(judge, "judge", fail)
        train_teacher.main(flags(tmp_path / "run", steps=1))
    assert not (tmp_path / "run" / "teacher.json").exists()
    kill_at(monkeypatch, 1)  # no step more
    train_teacher.main(flags(tmp_path / "run", "--resume_from_checkpoint", steps=1))
    assert (tmp_path / "run" / "teacher.json").is_file() and not (tmp_path / "run.state").exists()


@pytest.mark.parametrize("world", WORLDS)
def test_the_folder_holds_a_pipeline_and_its_metrics(tmp_path, world, capsys):
    train_teacher.main(flags(tmp_path / "run", world=world, steps=1))
    written = json.loads((tmp_path / "run" / "teacher.json").read_text())
    assert json.loads(capsys.readouterr().out.split("\n", 1)[1]) == written
    assert written["videos"] == 3 and written["run"] == {"world": world, "steps": 1, "batch": 2, "seed": 0}
    assert 0 <= written["good"] <= 1 and ("camera" in written) == (world != "small")
    pipeline = load_pipeline(tmp_path / "run")
    assert pipeline.transformer.config.num_layers == 1
    assert pipeline.tokenizer.model_max_length == teacher.SETTINGS[world].text_length
    assert pipeline.scheduler.config.shift == teacher.SETTINGS[world].flow_shift


def test_the_clock_ends_a_run_and_moves_its_learning_rate(tmp_path, monkeypatch):
    now, factors = iter(range(0, 1000, 10)), []
    monkeypatch.setattr(train_teacher, "time", SimpleNamespace(monotonic=lambda: next(now)))
    monkeypatch.setattr(train_teacher.TeacherRun, "train_step", lambda run, factor: factors.append(factor))
    run = train_teacher.TeacherRun(WORLDS["small"], 1000, 2, 0, "cpu")
    run.train(tmp_path / "state", 1000, max_minutes=1.0)  # ten seconds a step
    assert run.step == 6 and run.seconds == 60
    rates = [factor / ((step + 1) / 40) for step, factor in enumerate(factors)]  # without the warm-up
    assert rates == sorted(rates, reverse=True) and rates[0] == pytest.approx(1) and rates[-1] < 0.1


def test_existing_folders_are_kept(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    for more in ([], ["--overwrite"], ["--resume_from_checkpoint"]):
        with pytest.raises(SystemExit):
            train_teacher.main(flags(tmp_path / "mine", *more))
        assert "exists" in capsys.readouterr().err
    assert (tmp_path / "mine" / "file").read_text() == "mine"


def test_teachers_of_other_worlds_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_teacher.main(flags(tmp_path / "run", "--init_from", str(teacher.FOLDER)))
    assert "is not a teacher of the middle world" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_teacher_of_another_size_with_noisy_captions(tmp_path):
    more = ("--layers", "2", "--heads", "3", "--caption_noise", "0.5")
    train_teacher.main(flags(tmp_path / "first", *more, world="small", steps=1))
    run = json.loads((tmp_path / "first" / "teacher.json").read_text())["run"]
    assert (run["layers"], run["heads"], run["caption_noise"]) == (2, 3, 0.5)
    train_teacher.main(flags(tmp_path / "second", "--init_from", str(tmp_path / "first"), world="small", steps=1))
    again = json.loads((tmp_path / "second" / "teacher.json").read_text())
    assert again["before"]["run"] == run and "layers" not in again["run"]
    config = load_pipeline(tmp_path / "second").transformer.config
    assert (config.num_layers, config.num_attention_heads, config.ffn_dim) == (2, 3, 96)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--caption_noise", "1.5"], "expected the caption noise to be a probability, got 1.5"),
        (["--caption_noise", "0.1", "--world", "middle"], "expected caption noise 0 in the middle world"),
        (["--layers", "0"], "expected at least one layer and one head, got 0 layers"),
        (["--heads", "3", "--init_from", str(teacher.FOLDER)], "expected layers and heads to be None"),
    ],
)
def test_wrong_sizes_and_noise_are_refused(tmp_path, capsys, more, message):
    with pytest.raises(SystemExit):
        train_teacher.main(flags(tmp_path / "run", *more, world="small", steps=1))
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_noisy_captions_change_words_independently():
    scenes = WORLDS["small"].sample_scenes(20_000, torch.Generator().manual_seed(0))
    noisy = train_teacher.noisy(scenes, 0.2, torch.Generator().manual_seed(1))
    same = {name: getattr(noisy, name) == getattr(scenes, name) for name in ("colour", "shape", "direction")}
    for name, choices in (("colour", 6), ("shape", 3), ("direction", 8)):
        assert same[name].float().mean().item() == pytest.approx(1 - 0.2 * (1 - 1 / choices), abs=0.01)
    both = (same["colour"] & same["direction"]).float().mean()
    assert both == pytest.approx((same["colour"].float().mean() * same["direction"].float().mean()).item(), abs=0.01)
    assert noisy.start is scenes.start and noisy.speed is scenes.speed  # the videos stay
    assert torch.equal(train_teacher.noisy(scenes, 0.0, torch.Generator()).direction, scenes.direction)
