"""A distillation that is killed and continued equals an uninterrupted one bit for bit: student, critic, EMA."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_distill_run import run
from tiny_run import ENVIRONMENT, HELPERS

from linvideo.distillation.dmd_step import DmdStep
from linvideo.run import metrics_log, read_metrics
from linvideo.run.checkpoint import list_checkpoints, load_checkpoint
from linvideo.run.signals import TrainingStopped

TENSORS = "shard-00001-model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """Return the folder, and the critic at the end."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    return folder, run(folder).models.critic.state_dict()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def assert_same_run(folder: Path, reference: Path) -> None:
    assert_equal(weights(folder), weights(reference))
    assert read_metrics(folder / "metrics.jsonl") == read_metrics(reference / "metrics.jsonl")
    names = [path.name for path in list_checkpoints(reference)]
    assert [path.name for path in list_checkpoints(folder)] == names
    for name in names:
        # one file has all tensors: models (in the stage dmd also the critic), optimizers, EMA, torch's generators
        ours, theirs = (load_file(path / name / TENSORS) for path in (folder, reference))
        assert_equal(ours, theirs)
        plain, expected = (json.loads((path / name / "state.json").read_text()) for path in (folder, reference))
        for part in ("stage", "stage_step", "global_step", "nonfinite", "components"):  # all but the seconds
            of_run, of_reference = (dict(state["state"]["items"])[part] for state in (plain, expected))
            assert of_run == of_reference, part
    assert not list(folder.glob(".tmp-*"))


def kill(folder: Path, *point: object, **overrides) -> None:
    """Start a run that kills itself at `point`."""
    script = str(HELPERS / "tiny_distill_run.py")
    command = [sys.executable, script, str(folder), json.dumps(overrides), *map(str, point)]
    killed = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (folder / "pipeline").exists()


POINTS = [("regression", 3), ("dmd", 6), ("export", 0)]  # step 6 trains the student, too, one step after the checkpoint
MORE = [
    ("trajectories", 1),
    ("regression", 4),
    ("dmd", 1),
    ("dmd", 3),
    ("dmd", 4),
    ("checkpoint", 2),
    ("checkpoint", 5),
]


@pytest.mark.parametrize("stage, step", POINTS + [pytest.param(*point, marks=pytest.mark.full) for point in MORE])
def test_killed_and_resumed(stage, step, tmp_path, uninterrupted):
    folder, (reference, critic) = tmp_path / "run", uninterrupted
    kill(folder, stage, step)
    resumed = run(folder, resume_from_checkpoint="latest")
    assert_same_run(folder, reference)
    if stage != "export":
        assert_equal(resumed.models.critic.state_dict(), critic)


def test_checkpoints_hold_everything_that_trains(uninterrupted):
    folder, _ = uninterrupted
    stages = {}
    for path in list_checkpoints(folder):
        model, state = load_checkpoint(path)
        has_critic = any(name.startswith("critic.") for name in model)
        stages[int(path.name.removeprefix("checkpoint-"))] = (state["stage"], has_critic, set(state["components"]))
    parts = {"optimizer", "critic_optimizer", "ema"}
    assert stages == {
        2: ("regression", False, {"optimizer"}),
        4: ("dmd", True, set()),
        6: ("dmd", True, parts),
        8: ("dmd", True, parts),
        10: ("dmd", True, parts),
        11: ("export", False, set()),
    }


@pytest.mark.parametrize("step", [4, 6])
def test_resume_takes_the_run_back_to_a_named_checkpoint(step, tmp_path, uninterrupted):
    folder, (reference, _) = tmp_path / "run", uninterrupted
    shutil.copytree(reference, folder)
    run(folder, resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert_same_run(folder, reference)


def test_resume_does_not_repeat_what_is_done(tmp_path, uninterrupted, monkeypatch):
    folder, (reference, _) = tmp_path / "run", uninterrupted
    shutil.copytree(reference, folder)
    steps, original = [], DmdStep.critic_gradient
    monkeypatch.setattr(DmdStep, "critic_gradient", lambda step, n: (steps.append(n), original(step, n))[1])
    run(folder, resume_from_checkpoint=str(folder / "checkpoint-8"))
    assert steps == [4, 5, 6]


@pytest.mark.parametrize("stage, step", [pytest.param("regression", 1, marks=pytest.mark.full), ("dmd", 3)])
def test_sigterm_saves_the_step_and_ends_the_run(stage, step, tmp_path, uninterrupted, monkeypatch):
    write, folder, (reference, _) = metrics_log.MetricsLog.write, tmp_path / "run", uninterrupted

    def write_and_terminate(log, row):
        write(log, row)
        if (row["stage"], row["stage_step"]) == (stage, step):
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(metrics_log.MetricsLog, "write", write_and_terminate)
        with pytest.raises(TrainingStopped, match=f"after step {step} of {stage}, which is saved"):
            run(folder)
    saved = list_checkpoints(folder)[-1]
    state = load_checkpoint(saved)[1]
    assert (state["stage"], state["stage_step"]) == (stage, step)
    run(folder, resume_from_checkpoint="latest")
    shutil.rmtree(saved)  # the uninterrupted run has no checkpoint at this step
    assert_same_run(folder, reference)


def test_without_the_first_stage_and_average(tmp_path):
    """Other components: none of the regression, no EMA, no discriminator."""
    settings = {"regression": {"max_train_steps": 0}, "use_ema": False, "dmd": {"student_every": 2}}
    run(tmp_path / "whole", **settings)
    folder = tmp_path / "run"
    shutil.copytree(tmp_path / "whole", folder)
    run(folder, resume_from_checkpoint=str(folder / "checkpoint-4"), **settings)
    assert_same_run(folder, tmp_path / "whole")


def test_a_finished_distillation_is_extended(tmp_path):
    rate = {"lr_scheduler": "constant", "lr_warmup_steps": 0}
    settings, folder = {"optimizer": rate, "critic_optimizer": rate}, tmp_path / "run"
    run(folder, **settings, max_train_steps=4)
    run(tmp_path / "whole", **settings)
    run(folder, **settings, resume_from_checkpoint="latest")
    assert_equal(weights(folder), weights(tmp_path / "whole"))
    assert read_metrics(folder / "metrics.jsonl") == read_metrics(tmp_path / "whole" / "metrics.jsonl")
    with pytest.raises(ValueError, match="max_train_steps cannot change from 7 to 0 after"):
        run(folder, **settings, resume_from_checkpoint="latest", max_train_steps=0)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"dmd": {"student_every": 2, "adversarial_weight": 0.1}}, r"dmd\.student_every 3 \(now 2\)"),
        ({"dmd": {"student_every": 3}}, r"dmd\.adversarial_weight 0\.1 \(now 0\.0\)"),
        ({"max_train_steps": 8}, "from 7 to 8 .*: optimizer.lr_scheduler cosine, critic_optimizer.lr_scheduler poly"),
        ({"num_steps": 4}, r"num_steps 2 \(now 4\)"),
        ({"critic_optimizer": {"learning_rate": 1.0}}, r"critic_optimizer\.learning_rate 0\.0004 \(now 1\.0\)"),
        ({"train_batch_size": 3}, r"train_batch_size 2 \(now 3\)"),
    ],
)
def test_another_config_is_refused(changed, message, uninterrupted):
    reference, _ = uninterrupted
    before = sorted((str(path), path.stat().st_mtime_ns) for path in reference.rglob("*"))
    with pytest.raises(ValueError, match=message):
        run(reference, resume_from_checkpoint="latest", **changed)
    assert sorted((str(path), path.stat().st_mtime_ns) for path in reference.rglob("*")) == before


def test_the_checkpoint_of_a_transfer_is_refused(tmp_path):
    from tiny_run import run as transfer

    transfer(tmp_path, max_train_steps=0, warmup={"max_train_steps": 1}, selection={"method": "layers", "layers": [1]})
    with pytest.raises(ValueError, match="the checkpoint was made with"):
        run(tmp_path, resume_from_checkpoint="latest")
