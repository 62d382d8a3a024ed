import functools

import pytest
import torch
import torch.nn.functional as F

from linvideo.demo import judge
from linvideo.demo.world import WORLDS, Scenes, World

SPOILED = {"small": 64, "middle": 24, "large": 4}  # number of videos to spoil, limited by the time of larger ones


@functools.cache
def truth(name: str, batch: int, seed: int = 0) -> tuple[World, Scenes, torch.Tensor]:
    world = WORLDS[name]
    sample = world.sample_scenes(batch, torch.Generator().manual_seed(seed))
    return world, sample, world.render(sample)


def test_small_judgement_stays_what_it_was():
    """The published figures depend on it; half a million noisy pixels exercise every part of it."""
    world, sample, video = truth("small", 64, 7)
    noisy = video + 0.6 * (torch.rand(video.shape, generator=torch.Generator().manual_seed(8)) - 0.5)
    assert judge.judge(video, sample.captions(), world) == pytest.approx(
        {
            "colour": 1.0,
            "shape": 1.0,
            "direction": 1.0,
            "all_right": 1.0,
            "good": 1.0,
            "straightness_px": 0.04006950557231903,
            "flicker": 0.02695455402135849,
            "rerender_error": 0.00016521138604730368,
            "coverage": 0.4648051783442497,
        },
        rel=1e-5,
    )
    assert judge.judge(noisy, sample.captions(), world) == pytest.approx(
        {
            "colour": 1.0,
            "shape": 1.0,
            "direction": 1.0,
            "all_right": 1.0,
            "good": 1.0,
            "straightness_px": 0.05104232579469681,
            "flicker": 0.03865601494908333,
            "rerender_error": 0.015534241683781147,
            "coverage": 0.46558037772774696,
        },
        rel=1e-5,
    )


@pytest.mark.parametrize("name", WORLDS)
def test_judge_calls_the_truth_good_and_wrong_captions_bad(name):
    world, sample, video = truth(name, 200)
    found = judge.judge(video, sample.captions(), world)
    assert found["all_right"] >= 0.99 and found["good"] >= 0.99, found
    assert ("camera" in found) == bool(world.camera)
    part = SPOILED[name]
    shuffled = judge.judge(video[:part], sample.captions()[1 : part + 1], world)
    assert shuffled["all_right"] <= 0.05 and shuffled["good"] <= 0.05
    assert shuffled["colour"] < 0.7 and shuffled["direction"] < 0.5, shuffled


@pytest.mark.parametrize("name", WORLDS)
def test_fit_recovers_every_parameter(name):
    world, sample, video = truth(name, SPOILED[name])
    found = judge.fit(video, world, sample.colour)
    for part in ("colour", "shape", "direction", "camera"):
        assert torch.equal(getattr(found.scenes, part), getattr(sample, part)), part
    torch.testing.assert_close(found.scenes.speed, sample.speed, atol=0.05, rtol=0)
    torch.testing.assert_close(found.scenes.start, sample.start, atol=0.3, rtol=0)
    if world.camera:
        moves = sample.camera != 0
        torch.testing.assert_close(found.scenes.pan[moves], sample.pan[moves], atol=0.03, rtol=0)
        half = world.period / 2  # phases are equal modulo the period
        apart = (found.scenes.phase - sample.phase + half).remainder(world.period) - half
        assert apart.abs().max() < 0.3
    # Far below the thresholds of a good video: all that remains is the soft edge that the mask cuts off.
    assert found.straightness.max() < judge.STRAIGHT / 3
    assert found.rerender_error.max() < judge.CLEAN[name] / 10


def spoil_jitter(video: torch.Tensor) -> torch.Tensor:
    spoiled = video.clone()
    spoiled[:, :, ::2] = spoiled[:, :, ::2].roll(1, -1)
    return spoiled


def spoil_blur(video: torch.Tensor) -> torch.Tensor:
    return F.avg_pool3d(video, (1, 5, 5), 1, (0, 2, 2), count_include_pad=False)


def spoil_flicker(video: torch.Tensor) -> torch.Tensor:
    gain = torch.tensor([0.5, 1.0]).repeat(video.shape[2] // 2)[:, None, None]
    return (video + 1) * gain - 1


def spoil_noise(video: torch.Tensor) -> torch.Tensor:
    return video + 0.4 * torch.randn(video.shape, generator=torch.Generator().manual_seed(0))


def spoil_colours(video: torch.Tensor) -> torch.Tensor:
    return video.roll(1, 1)  # red becomes green, yellow cyan, ...


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize(
    "spoil, metric",
    [
        (spoil_jitter, "straightness_px"),
        (spoil_blur, "rerender_error"),
        (spoil_flicker, "flicker"),
        (spoil_noise, "rerender_error"),
        (spoil_colours, "colour"),
    ],
)
def test_each_metric_sees_its_fault(name, spoil, metric):
    world, sample, video = truth(name, SPOILED[name])
    clean = judge.judge(video, sample.captions(), world)
    spoiled = judge.judge(spoil(video), sample.captions(), world)
    if metric == "colour":
        assert spoiled["colour"] < 0.7
    else:
        assert spoiled[metric] > 3 * clean[metric]
    # Halving the brightness of every second frame isn't quite enough for the small world's threshold.
    assert spoiled["good"] <= (0.6 if (name, metric) == ("small", "flicker") else 0), spoiled


@pytest.mark.parametrize("name", ["middle", "large"])
def test_a_missing_background_is_not_good(name):
    world, sample, _ = truth(name, SPOILED[name])
    masks = world.masks(sample.shape, world.paths(sample.direction, sample.speed, sample.start))
    video = world.compose(sample.colour, masks, torch.full((1, 1, 1, 1), 0.125))
    assert judge.judge(video, sample.captions(), world)["good"] == 0


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0])
def test_a_video_of_nothing_is_judged_not_good(name, value):
    world, sample, video = truth(name, SPOILED[name])
    found = judge.judge(torch.full_like(video, value), sample.captions(), world)
    assert found["good"] == 0 and all(number == number for number in found.values()), found


def test_coverage_sees_collapse():
    world = WORLDS["small"]
    numbers = torch.zeros(100, dtype=torch.long)
    free = world.scenes_from_numbers(numbers, torch.Generator().manual_seed(2))
    stuck = world.scenes_from_numbers(numbers, torch.Generator().manual_seed(2))
    stuck.start[:] = stuck.start[0]
    stuck.speed[:] = stuck.speed[0]
    world_draws = world.scenes_from_numbers(numbers.repeat(50), torch.Generator().manual_seed(1))
    assert judge.coverage(stuck, world_draws) > 4 * judge.coverage(free, world_draws)
    assert judge.coverage(free, free) == 0


def test_psnr_is_ten_log_ten():
    video = truth("small", 64)[2] * 0.5
    assert judge.psnr(video + 0.02, video) == pytest.approx(40.0, abs=1e-2)  # 10 log10(4 / 0.02^2)
