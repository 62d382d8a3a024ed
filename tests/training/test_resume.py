"""A run killed with SIGKILL and continued gives the weights of an uninterrupted one, bit for bit."""

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
from tiny_run import run

from linvideo.training import Trainer, read_metrics
from linvideo.training.checkpoint import list_checkpoints, load_checkpoint

ROOT = Path(__file__).parents[2]


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
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "tests"))),
    }
    folder = tmp_path / "run"
    command = [sys.executable, str(ROOT / "tests" / "tiny_run.py"), str(folder), stage, str(step)]
    killed = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (folder / "pipeline").exists()

    run(folder, resume_from_checkpoint="latest")
    assert_same_run(folder, uninterrupted)
    assert not list(folder.glob(".tmp-*"))


def test_shards_of_a_killed_collection_are_those_of_an_uninterrupted_one(tmp_path, uninterrupted):
    folder = tmp_path / "run"
    run(folder)
    manifest = folder / "trajectories" / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["shards"]["1"]
    manifest.write_text(json.dumps(content))
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
