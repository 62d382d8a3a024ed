"""A distillation gives the same losses and weights, to 1e-5, for every division over processes (on gloo)."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_distill_run import run
from tiny_parallel_run import torchrun_arguments

from linvideo.run import read_metrics
from linvideo.run.checkpoint import list_checkpoints, load_checkpoint

# Adam takes a step of full size even if a gradient consists only of rounding error, about 1e-8. With this epsilon such
# a step is a hundredth of the learning rate, 1e-6, so the 8 steps of a run stay below the tolerance.
RATE = {"lr_scheduler": "constant", "lr_warmup_steps": 0, "learning_rate": 1e-4, "adam_epsilon": 1e-6}
SLOW = {
    "distill": True,
    "regression": {"max_train_steps": 3, "learning_rate": 1e-4},
    "optimizer": RATE | {"adam_beta1": 0.0},
    "critic_optimizer": RATE,
    "dmd": {"student_every": 2, "adversarial_weight": 0.2},
    "max_train_steps": 5,
}
ALONE = {name: value for name, value in SLOW.items() if name != "distill"}
# the global batch is always 4; where a layout doesn't say otherwise, all processes share the weights (the default)
LAYOUTS = {
    "sharded": {"gradient_accumulation_steps": 1},
    "context and sharded": {"parallel": {"ulysses_degree": 2}},
}
MORE = {
    "copies": {"gradient_accumulation_steps": 1, "parallel": {"shard_degree": 1}},
    "context": {"parallel": {"shard_degree": 1, "ulysses_degree": 2}},
    "validated": {"parallel": {"ulysses_degree": 2}, "validation": {"steps": 4, "num_videos": 1}},
}


def torchrun(processes: int, folder: Path, runs: dict[str, dict]) -> subprocess.CompletedProcess:
    arguments = torchrun_arguments(processes, folder, {name: SLOW | runs[name] for name in runs})
    return subprocess.run(**arguments, capture_output=True, timeout=600)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")


def assert_near(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) <= 1e-5


def assert_same(folder: Path, reference: Path) -> None:
    assert_near(weights(folder), weights(reference))
    rows, expected = (read_metrics(path / "metrics.jsonl") for path in (folder, reference))
    assert [row.keys() for row in rows] == [row.keys() for row in expected]
    for row, other in zip(rows, expected, strict=True):
        for name in row.keys() - {"stage"}:
            assert row[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name
    checkpoints = [[path.name for path in list_checkpoints(each)] for each in (folder, reference)]
    assert checkpoints[0] == checkpoints[1]
    last = checkpoints[0][-2]  # in the stage dmd: student, critic and discriminator
    assert_near(*(load_checkpoint(path / last)[0] for path in (folder, reference)))


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    run(folder, **ALONE)
    assert any("discriminator" in name for name in load_checkpoint(folder / "checkpoint-6")[0])
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    done = torchrun(2, folder, LAYOUTS)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_distil_as_one(layout, two, alone):
    assert_same(two / layout, alone)


@pytest.mark.parametrize("step", [2, 6])  # in regression, in the middle of dmd
def test_a_run_of_two_processes_continues_on_one(step, two, alone, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(two / "context and sharded", folder)
    run(folder, resume_from_checkpoint=str(folder / f"checkpoint-{step}"), **ALONE)
    assert_same(folder, alone)


@pytest.mark.full
def test_other_layouts_and_a_run_that_one_process_began(alone, tmp_path):
    begun = tmp_path / "begun by one"
    shutil.copytree(alone, begun)
    resumed = {"resume_from_checkpoint": str(begun / "checkpoint-4"), "gradient_accumulation_steps": 1}
    done = torchrun(2, tmp_path, MORE | {"begun by one": resumed})
    assert done.returncode == 0, done.stderr
    for name in (*MORE, "begun by one"):
        assert_same(tmp_path / name, alone)
    rows = read_metrics(tmp_path / "validated" / "validation.jsonl")
    assert [row["step"] for row in rows] == [3, 4, 8]


@pytest.mark.full
def test_without_a_discriminator(tmp_path):
    plain = {"dmd": {"student_every": 2}, "regression": {"max_train_steps": 0}}
    run(tmp_path / "alone", **ALONE | plain)
    done = torchrun(2, tmp_path, {name: layout | plain for name, layout in LAYOUTS.items()})
    assert done.returncode == 0, done.stderr
    for name in LAYOUTS:
        assert not (tmp_path / name / "trajectories").exists()
        assert_same(tmp_path / name, tmp_path / "alone")


@pytest.mark.full
def test_mixed_precision_as_on_cuda(tmp_path):
    bf16 = {"mixed_precision": "bf16", "like_cuda": True, "gradient_checkpointing": True}
    done = torchrun(2, tmp_path, {"bf16": bf16 | LAYOUTS["context and sharded"]})
    assert done.returncode == 0, done.stderr
    rows = read_metrics(tmp_path / "bf16" / "metrics.jsonl")
    assert len(rows) == 3 + 5 and all(0 < row["loss"] < 20 for row in rows)
    assert {tensor.dtype for tensor in weights(tmp_path / "bf16").values()} == {torch.float32}


@pytest.mark.full
def test_a_rank_that_is_killed_leaves_the_last_checkpoint(tmp_path, alone):
    died = torchrun(2, tmp_path, {"run": {"gradient_accumulation_steps": 1, "die": ["dmd", 4, 1]}})
    assert died.returncode != 0 and "SIGKILL" in died.stderr
    assert not (tmp_path / "run" / "pipeline").exists()
    run(tmp_path / "run", resume_from_checkpoint="latest", **ALONE)
    assert_same(tmp_path / "run", alone)


@pytest.mark.full
def test_four_processes(alone, tmp_path):
    layout = {"gradient_accumulation_steps": 1, "parallel": {"ulysses_degree": 2, "shard_degree": 2}}
    done = torchrun(4, tmp_path, {"four": layout})
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "four", alone)
