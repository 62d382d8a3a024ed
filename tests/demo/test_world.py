import pytest
import torch

from linvideo.demo import metrics, world


def scenes(batch: int = 200, seed: int = 0) -> world.Scenes:
    return world.sample_scenes(batch, torch.Generator().manual_seed(seed))


def test_captions_name_the_scenes():
    sample = scenes()
    captions = world.all_captions()
    assert len(set(captions)) == 144
    assert sample.captions() == [captions[i] for i in world.caption_number(sample)]


def test_scenes_from_numbers_inverts_caption_number():
    numbers = torch.arange(144)
    assert torch.equal(world.caption_number(world.scenes_from_numbers(numbers, torch.Generator())), numbers)


def test_render_stays_in_range_and_in_frame():
    video = world.render(scenes())
    assert video.shape == (200, 3, world.FRAMES, world.SIZE, world.SIZE)
    assert video.min() == -1 and video.max() == 1
    # A shape that left the frame would lose mass; blur at its edges alone changes it by a few percent.
    mass = (video.amax(1) + 1).sum((-1, -2))
    assert (mass.min(1).values / mass.max(1).values).min() > 0.8


def test_metrics_recover_every_parameter():
    sample = scenes()
    found = metrics.fit(world.render(sample))
    for name in ("colour", "shape", "direction"):
        assert torch.equal(getattr(found.scenes, name), getattr(sample, name)), name
    torch.testing.assert_close(found.scenes.speed, sample.speed, atol=0.05, rtol=0)
    torch.testing.assert_close(found.scenes.start, sample.start, atol=0.15, rtol=0)
    # Far from the thresholds of a good video; what remains is the soft edge that the mask cuts off.
    assert found.straightness.max() < metrics.STRAIGHT / 3 and found.rerender_error.max() < metrics.CLEAN / 10


def test_judge_calls_the_truth_good_and_the_wrong_caption_bad():
    sample = scenes()
    video, numbers = world.render(sample), world.caption_number(sample)
    truth = metrics.judge(video, numbers)
    assert truth["all_right"] == truth["good"] == 1
    # The next caption differs in the direction (or, at its end, in shape and colour), never in nothing.
    wrong = metrics.judge(video, (numbers + 1) % 144)
    assert wrong["all_right"] == wrong["good"] == 0


def spoil_jitter(video: torch.Tensor) -> torch.Tensor:
    spoiled = video.clone()
    spoiled[:, :, ::2] = spoiled[:, :, ::2].roll(1, -1)
    return spoiled


def spoil_brightness(video: torch.Tensor) -> torch.Tensor:
    gain = torch.linspace(0.5, 1, world.FRAMES)[:, None, None]
    return (video + 1) * gain - 1


def spoil_noise(video: torch.Tensor) -> torch.Tensor:
    return video + 0.4 * torch.randn(video.shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "spoil, metric",
    [(spoil_jitter, "straightness_px"), (spoil_brightness, "flicker"), (spoil_noise, "rerender_error")],
)
def test_each_metric_sees_its_fault(spoil, metric):
    sample = scenes()
    video, numbers = world.render(sample), world.caption_number(sample)
    assert metrics.judge(spoil(video), numbers)[metric] > 3 * metrics.judge(video, numbers)[metric]


def test_coverage_sees_collapse():
    numbers = torch.zeros(100, dtype=torch.long)
    free = world.scenes_from_numbers(numbers, torch.Generator().manual_seed(2))
    stuck = world.scenes_from_numbers(numbers, torch.Generator().manual_seed(2))
    stuck.start[:] = stuck.start[0]
    stuck.speed[:] = stuck.speed[0]
    assert metrics.coverage(stuck, numbers) > 4 * metrics.coverage(free, numbers)


def test_psnr_is_ten_log_ten():
    video = world.render(scenes(3)) * 0.5
    assert metrics.psnr(video + 0.02, video) == pytest.approx(40.0, abs=1e-2)  # 10 log10(4 / 0.02^2)
