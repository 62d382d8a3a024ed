"""The few-step scheduler: its step, what it refuses, and that a pipeline folder keeps it."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny import generate, tiny_pipeline

import linvideo
from linvideo.commands.main import main
from linvideo.models import FewStepScheduler, load_pipeline

FOUR = [1000.0, 750.0, 500.0, 250.0]


def test_a_step_jumps_to_the_clean_sample_and_adds_noise_again():
    scheduler, x, u = FewStepScheduler(FOUR), torch.randn(2, 3), torch.randn(2, 3)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == FOUR and scheduler.sigmas.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(2, 3, generator=torch.Generator().manual_seed(3))
    stepped = scheduler.step(u, scheduler.timesteps[0], x, generator=generator, return_dict=False)[0]
    torch.testing.assert_close(stepped, 0.25 * (x - u) + 0.75 * noise)
    for t in scheduler.timesteps[1:]:
        before, stepped = stepped, scheduler.step(u, t, stepped).prev_sample
    torch.testing.assert_close(stepped, before - 0.25 * u)  # the last one adds no noise


def test_the_first_sample_decides_the_noise():
    def sample(x, steps=3):
        scheduler = FewStepScheduler([1000, 600, 300])
        scheduler.set_timesteps(device="cpu")
        for t in scheduler.timesteps[:steps]:
            x = scheduler.step(torch.zeros_like(x), t, x, return_dict=False)[0]
        return x

    before = torch.get_rng_state()
    one, other = torch.randn(1, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 4)
    assert torch.equal(sample(one), sample(one))
    assert not torch.allclose(sample(one, 1) - 0.4 * one, sample(other, 1) - 0.4 * other)
    assert torch.equal(torch.get_rng_state(), before)
    assert sample(one.bfloat16()).dtype == torch.bfloat16


def test_a_row_does_not_depend_on_its_neighbours():
    def sample(x):
        scheduler = FewStepScheduler([1000, 600, 300])
        scheduler.set_timesteps(device="cpu")
        for t in scheduler.timesteps:
            x = scheduler.step(torch.tanh(x), t, x, return_dict=False)[0]
        return x

    rows = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    together = sample(rows)
    for order in ([0], [2, 1], [1, 0, 2]):
        torch.testing.assert_close(sample(rows[order]), together[order])


@pytest.mark.parametrize("timesteps", [[], [500, 500], [250, 500], [1001], [500, 0], [10, -1], [float("nan")]])
def test_timesteps_must_decrease(timesteps):
    with pytest.raises(ValueError, match="must fall from at most 1000 to more than 0"):
        FewStepScheduler(timesteps)


def test_another_number_of_steps_is_refused():
    with pytest.raises(ValueError, match="distilled to 4 steps, got 50"):
        FewStepScheduler(FOUR).set_timesteps(50)


@pytest.mark.parametrize("timesteps", [FOUR, [1000.0, 500.0], [1000.0, 800.0, 600.0, 400.0, 200.0]])
def test_the_stock_scheduler_has_the_same_timesteps(timesteps):
    stock = FewStepScheduler(timesteps).stock()
    assert type(stock) is FlowMatchEulerDiscreteScheduler and stock.config.stochastic_sampling
    again = FlowMatchEulerDiscreteScheduler.from_config(stock.config)
    again.set_timesteps(len(timesteps))
    assert again.timesteps.tolist() == pytest.approx(timesteps, abs=1e-2)


def test_timesteps_that_the_stock_scheduler_cannot_express_are_refused():
    with pytest.raises(ValueError, match="evenly spaced"):
        FewStepScheduler([1000.0, 937.5, 833.3, 625.0]).stock()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("few") / "pipeline"
    pipeline = tiny_pipeline(linvideo.convert(tiny_pipeline().transformer, layers=[0], mode="linear"))
    pipeline.scheduler = FewStepScheduler([1000.0, 500.0])
    pipeline.save_pretrained(path)
    return path


def test_a_pipeline_folder_keeps_it(folder):
    pipeline = load_pipeline(folder)
    assert type(pipeline.scheduler) is FewStepScheduler and pipeline.scheduler.config.timesteps == [1000.0, 500.0]
    first, second = (generate(pipeline, seed=4) for _ in range(2))
    assert np.array_equal(first, second) and not np.array_equal(first, generate(pipeline, seed=5))
    generators = [torch.Generator().manual_seed(seed) for seed in (9, 4)]
    size = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "max_sequence_length": 16}
    prompts = ["two boats", "a red circle moves left"]
    pair = pipeline(prompts, generator=generators, guidance_scale=3.0, negative_prompt="", output_type="np", **size)
    np.testing.assert_allclose(pair.frames[1], first, atol=1e-4)
    with pytest.raises(ValueError, match="distilled to 2 steps"):
        generate(pipeline, num_inference_steps=3)


@pytest.mark.parametrize("first", ["linvideo", "diffusers"])
def test_diffusers_loads_it_whichever_is_imported_first(folder, first):
    second = "diffusers" if first == "linvideo" else "linvideo"
    code = (
        f"import {first}, {second}; from diffusers import WanPipeline; p = WanPipeline.from_pretrained({str(folder)!r})"
    )
    done = subprocess.run([sys.executable, "-c", code + "; print(type(p.scheduler).__name__)"], capture_output=True)
    assert done.stdout.decode().strip() == "FewStepScheduler", done.stderr.decode()


def test_generate_uses_its_steps_and_no_guidance(folder, tmp_path, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr("diffusers.WanPipeline.__call__", lambda self, **settings: asked.append(settings) or 1 / 0)
    size = ["--height", "32", "--width", "32", "--num_frames", "5", "--prompt", "a fox", "--device", "cpu"]
    command = ["generate", str(folder), "--output", str(tmp_path / "x.mp4"), *size]
    for more in ([], ["--num_inference_steps", "2", "--guidance_scale", "1"]):
        with pytest.raises(ZeroDivisionError):
            main([*command, *more])
        assert (asked[-1]["num_inference_steps"], asked[-1]["guidance_scale"]) == (2, 1.0)
    assert main([*command, "--guidance_scale", "2"]) == 2 and len(asked) == 2
    assert "guidance_scale of this distilled model must be 1.0, got 2.0" in capsys.readouterr().err
