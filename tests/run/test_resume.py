"""A run that is killed with SIGKILL and continued gives the weights of an uninterrupted one, bit for bit."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_run import ENVIRONMENT, HELPERS, PROMPTS, run, tiny_config, tiny_teacher
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from linvideo.run import data, metrics_log, read_metrics
from linvideo.run.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from linvideo.run.parallel import Ranks
from linvideo.run.session import newest
from linvideo.run.signals import TrainingStopped
from linvideo.transfer import trainer
from linvideo.workspace import LOCK, TEMPORARY, locked, workspace


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    run(folder)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")


def assert_same_run(folder: Path, reference: Path) -> None:
    ours, theirs = weights(folder), weights(reference)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert read_metrics(folder / "metrics.jsonl") == read_metrics(reference / "metrics.jsonl")
    assert (folder / "selection.json").read_text() == (reference / "selection.json").read_text()


def kill(folder: Path, stage: str, step: int) -> None:
    command = [sys.executable, str(HELPERS / "tiny_run.py"), str(folder), "{}", stage, str(step)]
    killed = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr


@pytest.mark.parametrize(
    "stage, step", [("trajectories", 1), ("warmup", 3), ("selection", 3), ("finetune", 5), ("checkpoint", 4)]
)
def test_killed_and_resumed(stage, step, tmp_path, uninterrupted):
    folder = tmp_path / "run"
    kill(folder, stage, step)
    assert not (folder / "pipeline").exists()

    run(folder, resume_from_checkpoint="latest")
    assert_same_run(folder, uninterrupted)
    assert not list(folder.glob(".tmp-*"))


@pytest.mark.parametrize("resume", [None, "latest"])
def test_killed_while_the_prompts_are_written(resume, tmp_path, uninterrupted):
    folder = tmp_path / "run"
    kill(folder, "prompts", 0)
    assert list(folder.glob(".tmp-*"))
    run(folder, resume_from_checkpoint=resume)
    assert_same_run(folder, uninterrupted)
    assert not list(folder.glob(".*"))


def test_killed_while_the_pipeline_is_written(tmp_path, uninterrupted):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    killed = folder / f"{TEMPORARY}0123456789abcdef-pipeline"
    (killed / "new").mkdir(parents=True)
    (killed / LOCK).touch()
    os.rename(folder / "pipeline", killed / "old")
    run(folder, resume_from_checkpoint="latest")
    assert_same_run(folder, uninterrupted)
    assert not list(folder.glob(".*"))


def test_shards_of_a_killed_collection_are_those_of_an_uninterrupted_one(tmp_path, uninterrupted):
    folder = tmp_path / "run"
    run(folder)
    (folder / "trajectories" / "shard-000001.json").unlink()  # the shard exists, its entry doesn't
    (folder / "trajectories" / "shard-000002.safetensors").unlink()
    run(folder, resume_from_checkpoint="latest")
    for name in ("shard-000001.safetensors", "shard-000002.safetensors"):
        assert (folder / "trajectories" / name).read_bytes() == (uninterrupted / "trajectories" / name).read_bytes()


def test_resume_takes_the_run_back_to_a_named_checkpoint(tmp_path, uninterrupted):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    checkpoint = folder / "checkpoint-8"  # in the middle of selection
    assert load_checkpoint(checkpoint)[1]["stage"] == "selection"
    link = folder / "best"
    link.symlink_to(checkpoint.name)
    run(folder, resume_from_checkpoint=os.path.relpath(link), checkpoints_total_limit=2)
    assert_same_run(folder, uninterrupted)


def test_checkpoints_after_the_named_one_are_deleted(tmp_path, uninterrupted, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    monkeypatch.setitem(trainer.STAGES, "selection", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(folder, resume_from_checkpoint=str(folder / "checkpoint-8"))
    assert [path.name for path in list_checkpoints(folder)] == [f"checkpoint-{step}" for step in (2, 4, 6, 8)]


def test_resume_refuses_the_checkpoint_of_another_run(tmp_path, uninterrupted):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    metrics = (folder / "metrics.jsonl").read_bytes()
    other, renamed, link = uninterrupted / "checkpoint-8", folder / "step-final", tmp_path / "link"
    shutil.copytree(folder / "checkpoint-8", renamed)
    link.symlink_to(other)
    for path, got in ((other, other), (renamed, renamed), (link, f"{link}, a link to {other}")):
        with pytest.raises(ValueError) as error:
            run(folder, resume_from_checkpoint=str(path))
        assert str(error.value) == f"resume_from_checkpoint must be a folder checkpoint-STEP in {folder}, got {got}"
    assert (folder / "metrics.jsonl").read_bytes() == metrics


def test_a_finished_run_resumes_to_itself(tmp_path):
    first = run(tmp_path / "run", max_train_steps=2)
    again = run(tmp_path / "run", max_train_steps=2, resume_from_checkpoint="latest")
    assert again.layers_linear == first.layers_linear
    one, two = first.pipeline.transformer.state_dict(), again.pipeline.transformer.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


CONSTANT = {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 1}


def test_a_finished_run_is_extended(tmp_path):
    """The result is that of a run that had the final length from the beginning."""
    folder, whole = tmp_path / "run", tmp_path / "whole"
    run(folder, max_train_steps=4, optimizer=CONSTANT)
    run(whole, optimizer=CONSTANT)
    assert max(row["step"] for row in read_metrics(folder / "metrics.jsonl")) == 13
    run(folder, optimizer=CONSTANT, resume_from_checkpoint="latest")
    assert_same_run(folder, whole)
    with pytest.raises(ValueError, match="from 6 to 5 after step 6 of its stage: continue from an earlier"):
        run(folder, optimizer=CONSTANT, resume_from_checkpoint="latest", max_train_steps=5)
    assert_same_run(folder, whole)


def test_a_schedule_with_an_end_is_not_extended(tmp_path, uninterrupted):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    message = "cannot change from 6 to 8 after step {} of its stage: optimizer.lr_scheduler cosine depends"
    for step, made in ((14, 5), (15, 6)):
        with pytest.raises(ValueError, match=message.format(made)):
            run(folder, max_train_steps=8, resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert_same_run(folder, uninterrupted)
    # before the last stage begins, nothing depends on its length
    run(folder, max_train_steps=5, resume_from_checkpoint=str(folder / "checkpoint-9"))
    run(tmp_path / "short", max_train_steps=5)
    assert_same_run(folder, tmp_path / "short")


def test_checkpoints_total_limit(tmp_path):
    run(tmp_path / "run", checkpoints_total_limit=2)
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-14", "checkpoint-15"]


def test_resume_refuses_another_config(tmp_path, uninterrupted):
    before = sorted(path.name for path in uninterrupted.iterdir())
    changed = {"lr_scheduler": "cosine", "lr_warmup_steps": 1, "learning_rate": 5e-4}
    with pytest.raises(ValueError, match=r"optimizer\.learning_rate 0\.001 \(now 0\.0005\)"):
        run(uninterrupted, resume_from_checkpoint="latest", optimizer=changed)
    assert sorted(path.name for path in uninterrupted.iterdir()) == before
    assert yaml.safe_load((uninterrupted / "config.yaml").read_text())["optimizer"]["learning_rate"] == 1e-3


TERM, INT = signal.SIGTERM, signal.SIGINT


@pytest.mark.parametrize(
    "stage, step, number", [("warmup", 1, INT), ("selection", 5, TERM), ("finetune", 3, TERM), ("finetune", 6, INT)]
)
def test_a_signal_saves_the_step_and_ends_the_run(stage, step, number, tmp_path, uninterrupted, monkeypatch):
    write = metrics_log.MetricsLog.write

    def write_and_terminate(log, row):
        write(log, row)
        if (row["stage"], row["stage_step"]) == (stage, step):
            signal.raise_signal(number)

    folder, before = tmp_path / "run", signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(metrics_log.MetricsLog, "write", write_and_terminate)
        with pytest.raises(TrainingStopped, match=f"after step {step} of {stage}, which is saved") as stopped:
            run(folder)
    assert stopped.value.exit_status == (130 if number == INT else 1)
    assert signal.getsignal(number) == before
    state = load_checkpoint(list_checkpoints(folder)[-1])[1]
    assert (state["stage"], state["stage_step"]) == (stage, step)
    run(folder, resume_from_checkpoint="latest")
    assert_same_run(folder, uninterrupted)


def test_sigterm_outside_of_steps_ends_the_run_at_once(tmp_path, uninterrupted, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(data, "collect", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(TrainingStopped, match="between the steps"):
            run(folder)
    run(folder, resume_from_checkpoint="latest")
    assert_same_run(folder, uninterrupted)


@pytest.mark.parametrize("number", [INT, TERM])
def test_a_signal_during_a_checkpoint_waits_for_its_end(number, tmp_path, monkeypatch):
    write = HuggingFaceStorageWriter.write_data

    def signalled(writer, plan, planner):
        signal.raise_signal(number)
        return write(writer, plan, planner)

    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", signalled)
    with pytest.raises(TrainingStopped, match="at the end of a stage, which is saved"):
        run(tmp_path / "run", checkpointing_steps=100)
    assert load_checkpoint(tmp_path / "run" / "checkpoint-4")[1]["stage"] == "sensitivity"


def test_a_second_ctrl_c_does_not_wait(tmp_path, monkeypatch):
    write = metrics_log.MetricsLog.write

    def write_and_interrupt(log, row):
        write(log, row)
        signal.raise_signal(signal.SIGINT)
        if row["step"] == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(metrics_log.MetricsLog, "write", write_and_interrupt)
    with pytest.raises(TrainingStopped, match="after step 1 of warmup"):
        run(tmp_path / "run")
    with pytest.raises(TrainingStopped, match="after step 2 of warmup"):
        run(tmp_path / "run", resume_from_checkpoint="latest")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", resume_from_checkpoint="latest")


@pytest.mark.parametrize("call", ["write_data", "read_data"])
def test_ctrl_c_outside_a_run_is_not_reported_as_a_write_or_read_error(call, tmp_path, monkeypatch):
    kind = HuggingFaceStorageWriter if call == "write_data" else HuggingFaceStorageReader
    save_checkpoint(tmp_path, 1, {"x": torch.ones(2)}, {})
    monkeypatch.setattr(kind, call, lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 2, {"x": torch.ones(2)}, {})
        load_checkpoint(tmp_path / "checkpoint-2")
    assert not list(tmp_path.glob(".*"))
    assert [path.name for path in list_checkpoints(tmp_path)][0] == "checkpoint-1"


def test_one_run_at_a_time_writes_into_a_folder(tmp_path, uninterrupted):
    second, _ = trainer.prepare(tiny_config(tmp_path / "run"), tiny_teacher(), PROMPTS)
    with locked(tmp_path / "run"), pytest.raises(ValueError, match=f"is in use: process {os.getpid()} on "), second:
        pass
    run(tmp_path / "run")
    with pytest.raises(ValueError, match="is not empty"), second:
        pass
    assert_same_run(tmp_path / "run", uninterrupted)
    with locked(tmp_path / "run"), pytest.raises(ValueError, match="is in use"):
        run(tmp_path / "run", resume_from_checkpoint="latest")


def test_workers_collect_next_to_a_run_and_each_other(tmp_path, uninterrupted):
    folder = tmp_path / "run"
    config = tiny_config(folder, resume_from_checkpoint="latest")
    with locked(folder), workspace(folder / "checkpoint-4") as live:
        (live / "checkpoint-4").mkdir()
        for number in range(2):
            assert len(trainer.collect(config, number, 3, tiny_teacher(), PROMPTS).missing_shards()) == 2 - number
        assert (live / "checkpoint-4").is_dir()
    assert sorted(path.name for path in folder.iterdir()) == ["prompt_embeds.safetensors", "trajectories"]
    run(folder, resume_from_checkpoint="latest")
    assert_same_run(folder, uninterrupted)


def test_a_folder_in_a_checkpoints_place_is_moved_aside(tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "notes.txt").write_text("mine")
    save_checkpoint(tmp_path, 2, {"x": torch.ones(2)}, {}, limit=1)
    assert load_checkpoint(tmp_path / "checkpoint-2")
    assert [path.read_text() for path in tmp_path.glob("checkpoint-2-moved-*/notes.txt")] == ["mine"]


def test_only_files_of_a_run_are_deleted(tmp_path):
    folder = tmp_path / "run"
    mine = ["elsewhere", "run/checkpoint-99", "run/.tmp-mycheckpoint-notes"]
    mine += ["run/.tmp-old-checkpoint-7", "run/validation/step-final", "run/validation/step-99"]

    def make() -> None:
        for name in mine:
            (tmp_path / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / name / "notes.txt").write_text("mine")

    def lost() -> list[str]:
        return [name for name in mine if not (tmp_path / name / "notes.txt").is_file()]

    make()
    (folder / "checkpoint-98").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="refusing to overwrite .*: it is not empty and holds no training run"):
        run(folder, overwrite_output_dir=True)
    assert not lost()
    shutil.move(folder, tmp_path / "kept")
    validation = {"steps": 4, "num_videos": 1, "num_inference_steps": 1}
    run(folder, validation=validation, max_train_steps=1)
    shutil.copytree(tmp_path / "kept", folder, symlinks=True, dirs_exist_ok=True)
    first = list_checkpoints(folder)[0]
    run(folder, validation=validation, resume_from_checkpoint=str(first), checkpoints_total_limit=1, max_train_steps=1)
    assert lost() == []
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-10", "checkpoint-98", "checkpoint-99"]
    run(folder, overwrite_output_dir=True, max_train_steps=1)
    assert all("validation" in name for name in lost())


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "altered":  # one bit of a tensor, which only a checksum detects
        path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    else:
        path.unlink()


TENSORS = "shard-00001-model-00001-of-00001.safetensors"


@pytest.mark.parametrize("how", ["truncated", "altered", "missing"])
def test_a_damaged_checkpoint_is_passed_over(how, tmp_path, uninterrupted, capsys):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    newest = list_checkpoints(folder)[-1]
    damage(newest / TENSORS, how)
    run(folder, resume_from_checkpoint="latest")
    assert f"the checkpoint {newest} is damaged" in capsys.readouterr().err
    assert_same_run(folder, uninterrupted)
    assert load_checkpoint(newest)  # was written again


def _without(entry):
    """Edit a state.json as written by a version without checksums."""

    def edit(text: str) -> str:
        content = json.loads(text)
        del content["checksum"]
        content["state"]["items"] = [item for item in content["state"]["items"] if item[0] != entry]
        return json.dumps(content)

    return edit


STATES = {
    "half": lambda text: text[: len(text) // 2],
    "digit": lambda text: text.replace('["global_step", 1', '["global_step", 3'),
    "checksum": lambda text: text.replace('"checksum"', '"checksul"'),
    "missing": _without("global_step"),
    "tensor": lambda text: _without(None)(text).replace('"tensor": "state/random', '"tensor": "state/randon'),
    "list": lambda text: "[]",
    "deep": lambda text: "[" * 100_000,
    "nested": lambda text: _without(None)(text).replace(
        "[[", '[["deep", ' + '{"list": [' * 2000 + "]}" * 2000 + "], [", 1
    ),
}


@pytest.mark.parametrize("how", STATES)
def test_a_damaged_state_is_passed_over(how, tmp_path, uninterrupted, capsys):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    file = list_checkpoints(folder)[-1] / "state.json"
    text = file.read_text()
    file.write_text(STATES[how](text))
    assert file.read_text() != text
    assert newest(list_checkpoints(folder)[::-1], Ranks.alone()).path == list_checkpoints(folder)[-2]
    said = capsys.readouterr().err
    assert str(file.parent) in said and "continuing from the checkpoint before it" in said


def test_other_files_in_a_checkpoint_are_ignored(tmp_path):
    path = save_checkpoint(tmp_path, 3, {"w": torch.arange(3.0)}, {"step": 3})
    (path / "notes.txt").write_text("mine")
    (path / "mine.safetensors").write_bytes(b"mine")
    os.mkfifo(path / "pipe.safetensors")
    model, state = load_checkpoint(path)
    assert model["w"].tolist() == [0, 1, 2] and state == {"step": 3}


def test_a_pipe_in_place_of_a_file_is_damage(tmp_path):
    path = save_checkpoint(tmp_path, 3, {"w": torch.arange(3.0)}, {"step": 3})
    file = path / TENSORS
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ValueError, match=f"is damaged: there is no file {TENSORS}"):
        load_checkpoint(path)


def test_every_flipped_bit_of_a_state_is_detected(tmp_path):
    path = save_checkpoint(tmp_path, 3, {"w": torch.arange(3.0)}, {"step": 3, "loss": [0.25, None], "name": "run"})
    file = path / "state.json"
    content = file.read_bytes()
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        with pytest.raises(ValueError):
            load_checkpoint(path)
    content = json.loads(content)
    del content["checksum"]  # as earlier versions wrote it
    file.write_text(json.dumps(content))
    assert load_checkpoint(path)[1] == {"step": 3, "loss": [0.25, None], "name": "run"}


@pytest.mark.parametrize("line", ["5", "null", '["step"]', '{"step": "a"}', "{}", "[" * 100_000, "\udcff"])
def test_damaged_lines_of_a_log_are_left_out(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n', errors="surrogateescape")
    assert [row["step"] for row in read_metrics(path)] == [1, 3]
    metrics_log.take_back(path, 2)
    assert path.read_text() == '{"step": 1}\n'


def test_nothing_is_trained_when_every_checkpoint_is_damaged(tmp_path, uninterrupted):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    for path in list_checkpoints(folder):
        damage(path / TENSORS, "truncated")
    with pytest.raises(ValueError, match="checkpoint-2 is damaged"):
        run(folder, resume_from_checkpoint="latest")


def test_a_named_checkpoint_that_is_damaged_is_an_error(tmp_path, uninterrupted):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    damage(folder / "checkpoint-8" / TENSORS, "altered")
    with pytest.raises(ValueError, match=f"checkpoint-8 is damaged: {TENSORS} has another checksum"):
        run(folder, resume_from_checkpoint=str(folder / "checkpoint-8"))


def test_a_full_disk_leaves_the_earlier_checkpoints(tmp_path, uninterrupted, monkeypatch):
    folder, write = tmp_path / "run", HuggingFaceStorageWriter.write_data

    def full(writer, plan, planner):
        if "checkpoint-8" in str(writer.path):
            (Path(writer.path) / "shard-00001-half.safetensors").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(writer, plan, planner)

    with monkeypatch.context() as patch:
        patch.setattr(HuggingFaceStorageWriter, "write_data", full)
        with pytest.raises(OSError, match="cannot write .*checkpoint-8, the earlier checkpoints .* No space left"):
            run(folder)
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert not list(folder.glob(".tmp-*"))
    run(folder, resume_from_checkpoint="latest")
    assert_same_run(folder, uninterrupted)
