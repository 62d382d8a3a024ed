"""A run killed with SIGKILL and continued gives the weights of an uninterrupted one, bit for bit."""

import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_run import ENVIRONMENT, ROOT, run
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from linvideo.training import Trainer, metrics, pipeline_run, read_metrics
from linvideo.training.checkpoint import list_checkpoints, load_checkpoint
from linvideo.training.resumable import TrainingStopped


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


@pytest.mark.parametrize(
    "stage, step", [("trajectories", 1), ("warmup", 3), ("selection", 3), ("finetune", 5), ("checkpoint", 4)]
)
def test_killed_and_resumed(stage, step, tmp_path, uninterrupted):
    folder = tmp_path / "run"
    command = [sys.executable, str(ROOT / "tests" / "tiny_run.py"), str(folder), "{}", stage, str(step)]
    killed = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (folder / "pipeline").exists()

    run(folder, resume_from_checkpoint="latest")
    assert_same_run(folder, uninterrupted)
    assert not list(folder.glob(".tmp-*"))


@pytest.mark.parametrize("resume", [None, "latest"])
def test_killed_while_the_prompts_are_written(resume, tmp_path, uninterrupted):
    folder = tmp_path / "run"
    folder.mkdir()
    dead = 2**22 + 1  # beyond any process number
    (folder / f".tmp-{socket.gethostname()}-{dead}-prompt_embeds.safetensors").write_bytes(b"half")
    run(folder, resume_from_checkpoint=resume)
    assert_same_run(folder, uninterrupted)
    assert not list(folder.glob(".*"))


def test_killed_while_the_pipeline_is_written(tmp_path, uninterrupted):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    (folder / ".pipeline.killed" / "new").mkdir(parents=True)
    os.rename(folder / "pipeline", folder / ".pipeline.killed" / "old")
    run(folder, resume_from_checkpoint="latest")
    assert_same_run(folder, uninterrupted)
    assert not list(folder.glob(".*"))


def test_shards_of_a_killed_collection_are_those_of_an_uninterrupted_one(tmp_path, uninterrupted):
    folder = tmp_path / "run"
    run(folder)
    (folder / "trajectories" / "shard-000001.json").unlink()  # the shard is there, its entry is not
    (folder / "trajectories" / "shard-000002.safetensors").unlink()
    run(folder, resume_from_checkpoint="latest")
    for name in ("shard-000001.safetensors", "shard-000002.safetensors"):
        assert (folder / "trajectories" / name).read_bytes() == (uninterrupted / "trajectories" / name).read_bytes()


def test_resume_takes_the_run_back_to_a_named_checkpoint(tmp_path, uninterrupted):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    checkpoint = folder / "checkpoint-8"  # in the middle of selection
    assert load_checkpoint(checkpoint)[1]["stage"] == "selection"
    with_relative_path = {"resume_from_checkpoint": os.path.relpath(checkpoint), "checkpoints_total_limit": 2}
    run(folder, **with_relative_path)
    assert_same_run(folder, uninterrupted)


def test_checkpoints_after_the_named_one_are_deleted(tmp_path, uninterrupted, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    monkeypatch.setattr(Trainer, "_selection", lambda trainer: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(folder, resume_from_checkpoint=str(folder / "checkpoint-8"))
    assert [path.name for path in list_checkpoints(folder)] == [f"checkpoint-{step}" for step in (2, 4, 6, 8)]


def test_resume_refuses_the_checkpoint_of_another_run(tmp_path, uninterrupted):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    metrics = (folder / "metrics.jsonl").read_bytes()
    other = uninterrupted / "checkpoint-8"
    with pytest.raises(ValueError) as error:
        run(folder, resume_from_checkpoint=str(other))
    assert str(error.value) == f"resume_from_checkpoint must be a checkpoint in output_dir {folder}, got {other}"
    assert (folder / "metrics.jsonl").read_bytes() == metrics


def test_a_finished_run_resumes_to_itself(tmp_path):
    first = run(tmp_path / "run", max_train_steps=2)
    again = run(tmp_path / "run", max_train_steps=2, resume_from_checkpoint="latest")
    assert again.layers_linear == first.layers_linear
    one, two = first.pipeline.transformer.state_dict(), again.pipeline.transformer.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


CONSTANT = {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 1}


def test_a_finished_run_is_extended(tmp_path):
    """To what a run of that length would have been."""
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
    # until the last stage begins nothing has depended on its length
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


@pytest.mark.parametrize("stage, step", [("warmup", 1), ("selection", 5), ("finetune", 3), ("finetune", 6)])
def test_sigterm_saves_the_step_and_ends_the_run(stage, step, tmp_path, uninterrupted, monkeypatch):
    write = metrics.MetricsLog.write

    def write_and_terminate(log, row):
        write(log, row)
        if (row["stage"], row["stage_step"]) == (stage, step):
            signal.raise_signal(signal.SIGTERM)

    folder, before = tmp_path / "run", signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(metrics.MetricsLog, "write", write_and_terminate)
        with pytest.raises(TrainingStopped, match=f"after step {step} of {stage}, which is saved"):
            run(folder)
    assert signal.getsignal(signal.SIGTERM) == before
    state = load_checkpoint(list_checkpoints(folder)[-1])[1]
    assert (state["stage"], state["stage_step"]) == (stage, step)
    run(folder, resume_from_checkpoint="latest")
    assert_same_run(folder, uninterrupted)


def test_sigterm_outside_of_steps_ends_the_run_at_once(tmp_path, uninterrupted, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(pipeline_run, "collect", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(TrainingStopped, match="between the steps"):
            run(folder)
    run(folder, resume_from_checkpoint="latest")
    assert_same_run(folder, uninterrupted)


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "altered":  # one bit of a tensor, which no format would notice
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
    assert load_checkpoint(newest)  # written anew


def test_a_half_written_state_is_passed_over(tmp_path, uninterrupted, capsys):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    damage(list_checkpoints(folder)[-1] / "state.json", "truncated")
    run(folder, resume_from_checkpoint="latest")
    assert "continuing from the one before it" in capsys.readouterr().err
    assert_same_run(folder, uninterrupted)


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
