"""A run gives the same losses and weights, to 1e-5, for every division of the work over processes (on gloo)."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import tiny_parallel_run
import torch
from safetensors.torch import load_file
from tiny_run import run

from linvideo.run import read_metrics
from linvideo.run.checkpoint import list_checkpoints, load_checkpoint

# Adam takes a step of full size even if a gradient consists only of rounding error. A slow warm-up and a larger epsilon
# keep the effect below the tolerance.
SLOW = {
    "warmup": {"max_train_steps": 4, "batch_size": 3, "learning_rate": 2e-3},
    "optimizer": {"lr_scheduler": "cosine", "lr_warmup_steps": 1, "adam_epsilon": 1e-6},
}
VALIDATION = {"steps": 4, "num_videos": 2, "num_inference_steps": 2}
# the global batch is always 4; where a layout doesn't say otherwise, all processes share the weights (the default)
LAYOUTS = {
    "sharded": {"gradient_accumulation_steps": 1, "validation": VALIDATION},
    "copies": {"gradient_accumulation_steps": 1, "parallel": {"shard_degree": 1}},
    "context": {"parallel": {"shard_degree": 1, "ulysses_degree": 2}},
    "context and sharded": {"parallel": {"ulysses_degree": 2}, "validation": VALIDATION},
}
BF16 = {"mixed_precision": "bf16", "like_cuda": True, "objective": {"name": "adm"}, "gradient_checkpointing": True}
LORA = {"lora": {"rank": 4}, "objective": {"name": "adm"}}
WINDOWS = {
    "selection": {"method": "layers", "layers": [0], "window_layers": [2]},
    "window": {"chunk": 1, "overlap": 0},
}
OBJECTIVES = {
    "own_mse": {"objective": {"name": "own_mse"}, "selection": {"max_train_steps": 2, "objective": "own_mse"}},
    "adm_step": {"objective": {"name": "adm_step"}, "selection": {"max_train_steps": 2, "objective": "adm_step"}},
    "offloaded": {"objective": {"name": "adm"}, "offload_teacher": True},
    "checkpointing": {"gradient_checkpointing": True},
}


def torchrun_arguments(processes: int, folder: Path, runs: dict[str, dict]) -> dict:
    return tiny_parallel_run.torchrun_arguments(processes, folder, {name: SLOW | runs[name] for name in runs})


def torchrun(processes: int, folder: Path, runs: dict[str, dict]) -> subprocess.CompletedProcess:
    return subprocess.run(**torchrun_arguments(processes, folder, runs), capture_output=True, timeout=600)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")


def assert_same(folder: Path, reference: Path) -> None:
    ours, theirs = weights(folder), weights(reference)
    assert ours.keys() == theirs.keys()
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) <= 1e-5
    rows, expected = (read_metrics(path / "metrics.jsonl") for path in (folder, reference))
    assert [row.keys() for row in rows] == [row.keys() for row in expected]
    for row, other in zip(rows, expected, strict=True):
        for name in row.keys() - {"stage", "r"}:
            assert row[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name
    chosen, wanted = (json.loads((path / "selection.json").read_text()) for path in (folder, reference))
    assert chosen["linear_layers"] == wanted["linear_layers"]
    assert chosen["sensitivity"] == pytest.approx(wanted["sensitivity"], rel=1e-4)
    assert chosen["error_rounded"] == pytest.approx(wanted["error_rounded"], rel=1e-4)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    run(folder, validation=VALIDATION, **SLOW)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory, alone) -> Path:
    """All layouts on two processes, and a run that was begun by one process."""
    folder = tmp_path_factory.mktemp("two")
    begun = folder / "begun by one"
    shutil.copytree(alone, begun)
    resumed = {"resume_from_checkpoint": str(checkpoint_in(begun, "selection")), "gradient_accumulation_steps": 1}
    lora = {"lora": LORA | WINDOWS | LAYOUTS["context and sharded"]}
    bf16 = {name: BF16 | LAYOUTS["context and sharded"] | more for name, more in (("bf16", {}), ("bf16 lora", LORA))}
    done = torchrun(2, folder, LAYOUTS | lora | {"begun by one": resumed} | bf16)
    assert done.returncode == 0, done.stderr
    return folder


def checkpoint_in(folder: Path, stage: str) -> Path:
    """Return the first checkpoint in the middle of `stage`."""
    states = {path: load_checkpoint(path)[1] for path in list_checkpoints(folder)}
    return next(path for path, state in states.items() if state["stage"] == stage and state["stage_step"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_train_as_one(layout, two, alone):
    assert_same(two / layout, alone)


def test_adapters_and_window_layers_train_alike_on_two_processes(two, tmp_path):
    run(tmp_path, **SLOW | LORA | WINDOWS)
    assert_same(two / "lora", tmp_path)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "validation" in LAYOUTS[name]])
def test_two_processes_validate_as_one(layout, two, alone):
    rows, expected = (read_metrics(path / "validation.jsonl") for path in (two / layout, alone))
    assert [row["step"] for row in rows] == [row["step"] for row in expected] == [8, 9, 12, 15]
    for row, other in zip(rows, expected, strict=True):
        # the frames are 8-bit and close to the teacher's: 1% of the pixels rounded the other way changes PSNR by 0.1 dB
        assert row["psnr"] == pytest.approx(other["psnr"], abs=0.2)
        assert row["ssim"] == pytest.approx(other["ssim"], abs=1e-4)
    assert len(list((two / layout / "validation").rglob("*.mp4"))) == 2 + 4 * 2


@pytest.mark.parametrize("name", ["bf16", "bf16 lora"])
def test_mixed_precision_as_on_cuda(name, two):
    rows = read_metrics(two / name / "metrics.jsonl")
    assert len(rows) == 4 + 5 + 6 and all(0 < row["loss"] < 10 for row in rows)
    dtypes = {name: tensor.dtype for name, tensor in weights(two / name).items()}
    assert set(dtypes.values()) == {torch.float32}  # the teacher was given as fp32; trained weights always are


def test_a_run_of_one_process_continues_on_two(two, alone):
    assert_same(two / "begun by one", alone)


@pytest.mark.parametrize("stage", ["warmup", "selection", "finetune"])
def test_a_run_of_two_processes_continues_on_one(stage, two, alone, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(two / "sharded", folder)
    run(folder, resume_from_checkpoint=str(checkpoint_in(folder, stage)), **SLOW)
    assert_same(folder, alone)


def test_another_global_batch_is_refused(two, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(two / "sharded", folder)
    with pytest.raises(ValueError, match="gradient_accumulation_steps 1 .now 3."):
        run(folder, resume_from_checkpoint="latest", gradient_accumulation_steps=3, **SLOW)


def test_a_rank_that_is_killed_leaves_the_last_checkpoint(tmp_path, alone):
    died = torchrun(2, tmp_path, {"run": {"gradient_accumulation_steps": 1, "die": ["finetune", 4, 1]}})
    assert died.returncode != 0 and "SIGKILL" in died.stderr
    assert not (tmp_path / "run" / "pipeline").exists()
    run(tmp_path / "run", resume_from_checkpoint="latest", **SLOW)
    assert_same(tmp_path / "run", alone)


@pytest.mark.full
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_other_objectives_on_four_processes(objective, tmp_path):
    # half the usual learning rate, because the sum over four ranks adds about one rounding error per step
    overrides = OBJECTIVES[objective] | {"optimizer": SLOW["optimizer"] | {"learning_rate": 5e-4}}
    run(tmp_path / "alone", **SLOW | overrides)
    layout = {"gradient_accumulation_steps": 1, "parallel": {"ulysses_degree": 2, "shard_degree": 2}}
    done = torchrun(4, tmp_path, {"four": layout | overrides})
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "four", tmp_path / "alone")
