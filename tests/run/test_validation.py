"""Validation makes the right videos, doesn't change the run, and survives interruptions."""

import shutil
import signal
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from pages import Page
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_resume import assert_same_run
from tiny import tiny_pipeline
from tiny_run import PROMPTS, run, tiny_config, tiny_teacher, watched

from linvideo.models import load_pipeline
from linvideo.run import read_metrics, validation
from linvideo.run.checkpoint import list_checkpoints, load_checkpoint
from linvideo.run.sample import decode, sample
from linvideo.run.signals import TrainingStopped
from linvideo.run.validation import Validator
from linvideo.run.video_metrics import compare
from linvideo.trajectories.prompts import encode_prompts, spread
from linvideo.trajectories.seeding import draw_noise
from linvideo.transfer import train, trainer

VALIDATION = {"steps": 4, "num_videos": 2, "num_inference_steps": 2, "fps": 8}
STEPS = [8, 9, 12, 15]  # selection is 5 to 9, fine-tuning 10 to 15
SIZE = {"height": 32, "width": 32, "num_frames": 5, "guidance_scale": 2.0, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    run(folder)
    return folder


@pytest.fixture(scope="module")
def validated(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("validated")
    run(folder, validation=VALIDATION, report_to="tensorboard")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    paths = (path for path in (folder / "validation").rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def assert_same_validation(folder: Path, reference: Path) -> None:
    assert read_metrics(folder / "validation.jsonl") == read_metrics(reference / "validation.jsonl")
    assert files(folder) == files(reference)


def test_the_report_shows_the_last_validation(validated):
    page = Page((validated / "report.html").read_text())
    assert page.links == [f"validation/{folder}/{i}.mp4" for i in range(2) for folder in ("teacher", "step-15")]
    assert all((validated / link).is_file() for link in page.links)
    assert all(f"“{PROMPTS[i]}”" in page.text for i in spread(len(PROMPTS), 2))


def test_the_run_is_the_same_with_and_without_validation(plain, validated):
    assert_same_run(validated, plain)
    assert not (plain / "validation").exists() and not (plain / "validation.jsonl").exists()


def test_what_is_written(validated):
    names = [f"validation/{name}/{i}.mp4" for name in ("teacher", *(f"step-{n}" for n in STEPS)) for i in (0, 1)]
    assert sorted(files(validated)) == sorted([*names, "validation/teacher.safetensors"])
    assert iio.imread(validated / names[0]).shape == (5, 32, 32, 3)
    rows = read_metrics(validated / "validation.jsonl")
    assert [row["step"] for row in rows] == STEPS
    assert [(row["stage"], row["stage_step"]) for row in rows[:3:2]] == [("selection", 4), ("finetune", 3)]
    events = EventAccumulator(str(validated / "logs")).Reload()
    for name in ("psnr", "ssim", "flicker", "teacher_flicker"):
        plotted = [(event.step, event.value) for event in events.Scalars(f"validation/{name}")]
        assert plotted == [(row["step"], pytest.approx(row[name])) for row in rows]
    assert [event.step for event in events.Images("validation/1")] == STEPS


def test_the_last_row_is_of_the_exported_weights(validated):
    """That shows that the averaged weights are validated, with the configured captions, seed and sampler."""
    pipelines = load_pipeline(validated / "pipeline"), tiny_teacher()
    prompts = encode_prompts(pipelines[1], PROMPTS, tiny_config("x").prompts)
    found = []
    for number in range(2):
        films = []
        for pipeline in pipelines:
            pipeline.set_progress_bar_config(disable=True)
            frames = pipeline(
                latents=draw_noise((1, 16, 2, 4, 4), 0, "validation", number),
                prompt_embeds=prompts.take(torch.tensor([spread(3, 2)[number]])),
                negative_prompt_embeds=prompts.take(torch.tensor([0]), torch.tensor([True])),
                output_type="pil",
                **SIZE,
            ).frames[0]
            films.append(torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2) / 255)
        found.append(compare(*films))
    row = read_metrics(validated / "validation.jsonl")[-1]
    for name in found[0]:
        assert row[name] == pytest.approx((found[0][name] + found[1][name]) / 2, rel=1e-4)


def test_sampling_and_decoding_match_the_pipeline():
    pipeline = tiny_pipeline()
    prompts = encode_prompts(pipeline, PROMPTS)
    embeds = {"prompt_embeds": prompts.take(torch.tensor([1])), "negative_prompt_embeds": prompts.table[-1:]}
    latents, grid = torch.randn(1, 16, 2, 4, 4), pipeline.scheduler.timesteps
    conditions = [prompts.conditions(torch.tensor([1]), torch.tensor([negative])) for negative in (False, True)]
    arguments = (pipeline.scheduler, {"guidance_scale": SIZE["guidance_scale"]}, SIZE["num_inference_steps"], latents)
    before = torch.get_rng_state()
    moves, to = [], pipeline.vae.to
    pipeline.vae.to = lambda device: (moves.append(device), to(device))[1]
    ours = decode(pipeline, sample(pipeline, *arguments, *conditions))
    assert moves == [latents.device, pipeline.vae.device]  # moved there and back
    assert torch.equal(torch.get_rng_state(), before)
    assert pipeline.scheduler.timesteps is grid and pipeline.vae is not None and pipeline.text_encoder is not None
    theirs = pipeline(latents=latents, output_type="pil", **embeds, **SIZE).frames[0]
    difference = np.stack(ours).astype(int) - np.stack(theirs)
    assert np.abs(difference).max() <= 1 and (difference != 0).mean() < 0.01  # a rounding error apart
    with pytest.warns(UserWarning, match="a validation video is not finite"):
        assert not np.stack(decode(pipeline, torch.full_like(latents, float("nan")))).any()
    steps = iter([False, True])
    assert sample(pipeline, *arguments, *conditions, lambda: next(steps)) is None


class Killed(Exception):
    pass


@pytest.mark.parametrize("moment", [1, 3, 8], ids=["teacher", "student", "a later student"])
def test_killed_in_a_validation(moment, tmp_path, validated, monkeypatch):
    folder, write, made = tmp_path / "run", Validator._write, []

    def kill(self, latents, path):
        made.append(path.parent.name)
        if len(made) == moment:
            raise Killed
        return write(self, latents, path)

    monkeypatch.setattr(Validator, "_write", kill)
    with pytest.raises(Killed):
        run(folder, validation=VALIDATION)
    run(folder, validation=VALIDATION, resume_from_checkpoint="latest")
    assert_same_run(folder, validated)
    assert_same_validation(folder, validated)
    # there is a checkpoint at step 8 but none at step 9
    assert made.count("teacher") == (3 if moment == 1 else 2) and made.count("step-15") == 2


@pytest.mark.parametrize("interrupted", [1, 3, 7])
def test_sigterm_ends_a_validation_and_saves_the_step(interrupted, tmp_path, validated, monkeypatch):
    folder, calls = tmp_path / "run", []

    def sample_and_terminate(*arguments, **settings):
        calls.append(0)
        if len(calls) == interrupted:
            signal.raise_signal(signal.SIGTERM)
        return sample(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(validation, "sample", sample_and_terminate)
        with pytest.raises(TrainingStopped, match="which is saved"):
            run(folder, validation=VALIDATION)
    assert len(calls) == interrupted  # sampling stopped there
    state = load_checkpoint(list_checkpoints(folder)[-1])[1]
    assert state["global_step"] == {1: 8, 3: 8, 7: 12}[interrupted]
    run(folder, validation=VALIDATION, resume_from_checkpoint="latest")
    assert_same_run(folder, validated)
    assert_same_validation(folder, validated)


def test_a_run_taken_back_validates_again(tmp_path, validated):
    folder = tmp_path / "run"
    run(folder, validation=VALIDATION, max_train_steps=6)
    (folder / "validation" / "step-99").mkdir()
    run(folder, validation=VALIDATION, resume_from_checkpoint=str(folder / "checkpoint-8"))
    assert_same_validation(folder, validated)


def test_own_prompts_and_other_settings(tmp_path, validated):
    own = VALIDATION | {"prompts": ["a cat"], "num_videos": 3}
    folder, teacher = tmp_path / "run", tiny_teacher()
    encoder, calls = teacher.text_encoder.forward, []
    teacher.text_encoder.forward = lambda *a, **k: (calls.append(seen.run.stage_step), encoder(*a, **k))[1]
    with watched() as seen:
        train(tiny_config(folder, validation=own), teacher, PROMPTS)
    assert calls and not any(calls)  # only before the first step
    made = files(folder)
    assert len([name for name in made if "teacher/" in name]) == 3
    assert len({made[f"validation/teacher/{i}.mp4"] for i in range(3)}) == 3  # one prompt with three different noises

    run(folder, validation=VALIDATION, resume_from_checkpoint=str(folder / "checkpoint-8"))  # a changed setting
    assert_same_run(folder, validated)
    now, theirs = files(folder), files(validated)
    name = "validation/teacher.safetensors"
    assert now[name] == theirs[name] != made[name]
    assert now["validation/step-15/1.mp4"] == theirs["validation/step-15/1.mp4"]

    run(folder, overwrite_output_dir=True, max_train_steps=1)
    assert not (folder / "validation").exists() and not (folder / "validation.jsonl").exists()


def test_a_damaged_teacher_file_is_made_again(tmp_path, validated):
    folder = tmp_path / "run"
    run(folder, validation=VALIDATION)
    file = folder / "validation" / "teacher.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    run(folder, validation=VALIDATION, resume_from_checkpoint=str(folder / "checkpoint-8"))
    assert_same_validation(folder, validated)


def test_validations_stay_when_models_cannot_be_made(tmp_path, validated, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(validated, folder)
    before = files(folder)
    monkeypatch.setattr(trainer, "make_models", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(folder, validation=VALIDATION, resume_from_checkpoint=str(folder / "checkpoint-8"))
    assert {name: content for name, content in files(folder).items() if name in before} == before
