import hashlib

import pytest
import torch

from linvideo.demo.world import COLOURS, FREE_STEPS, WORLDS, Scenes, World, unit_directions

each_world = pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
larger_world = pytest.mark.parametrize("world", [WORLDS["middle"], WORLDS["large"]], ids=["middle", "large"])


def scenes(world: World, batch: int = 50, seed: int = 0) -> Scenes:
    return world.sample_scenes(batch, torch.Generator().manual_seed(seed))


def digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


# (scene, frame, channel, row) -> 16 pixels; sharp edges show a shape's position to a hundredth of a pixel.
PIXELS = {
    (0, 0, 2, 11): [-1.0] * 4 + [0.5269089] + [1.0] * 4 + [0.631803] + [-1.0] * 6,
    (21, 3, 0, 4): [-1.0] * 5 + [0.1337128] + [1.0] * 5 + [-0.1337128] + [-1.0] * 4,
    (63, 7, 1, 10): [0.8244877] + [1.0] * 5 + [-0.8244877] + [-1.0] * 9,
}


def test_small_world_is_the_shipped_teachers():
    """Captions and their order, samples and pixels are as they were when the packaged teacher was trained."""
    world = WORLDS["small"]
    assert digest("\n".join(world.training_captions()).encode()) == "423605a19e5eb721b7073451a635a19e"
    assert digest("\n".join(world.evaluation_captions(200)).encode()) == "10de079a7714a532b35792b6ce36bdac"
    sample = scenes(world, 64, seed=7)
    assert digest(world.caption_numbers(sample.captions()).numpy().tobytes()) == "d191653a485409ee75bd97e9ad73b956"
    video = world.render(sample)
    for (scene, frame, channel, row), pixels in PIXELS.items():  # processors differ by a few ulp
        torch.testing.assert_close(video[scene, channel, frame, row], torch.tensor(pixels), atol=2e-6, rtol=0)


@pytest.mark.parametrize("name, total, count", [("small", 144, 144), ("middle", 86400, 1000), ("large", 8294400, 1000)])
def test_captions_have_numbers(name, total, count):
    world = WORLDS[name]
    assert world.caption_total == total
    captions = world.training_captions()
    assert len(set(captions)) == count and captions == world.training_captions()
    numbers = world.caption_numbers(captions)
    assert 0 <= numbers.min() and numbers.max() < total and world.captions(numbers) == captions


@each_world
def test_scenes_have_the_captions_that_they_are_made_from(world):
    captions = world.evaluation_captions(300)
    assert world.scenes_from_captions(captions, torch.Generator()).captions() == captions
    sample = scenes(world)
    assert world.scenes_from_captions(sample.captions(), torch.Generator()).captions() == sample.captions()


def test_evaluation_captions_follow_the_seed():
    world = WORLDS["middle"]
    assert world.evaluation_captions(20) == world.evaluation_captions(20, seed=0) != world.evaluation_captions(20, 1)
    assert len(set(WORLDS["small"].evaluation_captions(144, seed=5))) == 144


def test_large_captions_read_like_this():
    (caption,) = WORLDS["large"].captions(torch.tensor([0]))
    assert caption == (
        "a red square moving right in front of a green square moving right in front of a blue square moving right"
        " camera still"
    )


@pytest.mark.parametrize(
    "name, caption",
    [
        ("small", "a purple square moving up"),
        ("small", "a red square moving up camera still"),
        ("middle", "a red square moving up"),
        ("middle", "a red square moving up in front of a blue disc moving up"),
        ("middle", "a red square moving up in front of a red disc moving up camera still"),  # the same colour twice
        ("middle", "a red square moving up in front of a blue disc moving up camera still please"),
    ],
)
def test_captions_of_no_scene_are_refused(name, caption):
    with pytest.raises(ValueError, match=f"{name} world has no caption 'a "):
        WORLDS[name].scenes_from_captions([caption], torch.Generator())


@each_world
def test_render_stays_in_range_and_in_frame(world):
    sample = scenes(world)
    video = world.render(sample)
    assert video.shape == (50, 3, world.frames, world.size, world.size)
    assert video.min() >= -1 and video.max() == 1
    # A shape that left the frame would lose mass, which blur at its edges changes only by a few percent.
    mass = world.masks(sample.shape, world.paths(sample.direction, sample.speed, sample.start)).sum((-1, -2))
    assert (mass.amin(-1) / mass.amax(-1)).min() > 0.8


@larger_world
def test_shapes_start_as_the_caption_says_and_bounce(world):
    sample = scenes(world, 200)
    path = world.paths(sample.direction, sample.speed, sample.start)
    assert path.min() >= world.margin - 1e-3 and path.max() <= world.size - world.margin + 1e-3
    step = path.diff(dim=2)
    along = (unit_directions()[sample.direction] * sample.speed[..., None])[:, :, None]
    torch.testing.assert_close(step[:, :, :FREE_STEPS], along.expand(-1, -1, FREE_STEPS, -1), atol=1e-4, rtol=0)
    bounced = (step * along < -1e-3).any(-1)  # [B, K, F - 1]
    assert 0.3 < bounced.any(-1).float().mean() < 1
    # Between bounces the speed along each axis is the caption's.
    steady = (step.abs() - along.abs()).abs() < 1e-3
    assert steady.float().mean() > 0.9


@larger_world
def test_the_shape_named_first_is_in_front(world):
    sample = scenes(world, 4)
    assert all(len(set(row)) == world.objects for row in sample.colour.tolist())
    sample.start[:], sample.direction[:], sample.speed[:] = world.size / 2, 0, 0.0
    middle = world.render(sample)[..., 0, world.size // 2, world.size // 2]
    torch.testing.assert_close((middle + 1) / 2, torch.tensor(list(COLOURS.values()))[sample.colour[:, 0]])


@larger_world
def test_the_background_moves_against_the_camera(world):
    pan, phase = torch.ones(5), torch.rand(5, 2, generator=torch.Generator().manual_seed(0)) * world.period
    still, left, right, up, down = world.background(torch.arange(5), pan, phase)
    assert torch.equal(still[0], still[-1])
    torch.testing.assert_close(right[1:, :, :-1], right[:-1, :, 1:], atol=1e-4, rtol=0)
    torch.testing.assert_close(left[1:, :, 1:], left[:-1, :, :-1], atol=1e-4, rtol=0)
    torch.testing.assert_close(down[1:, :-1], down[:-1, 1:], atol=1e-4, rtol=0)
    torch.testing.assert_close(up[1:, 1:], up[:-1, :-1], atol=1e-4, rtol=0)
    assert 0 <= right.min() and right.max() <= 0.25 and right.std() > 0.03


def test_scenes_move_to_the_device_that_renders():
    world = WORLDS["middle"]
    assert world.render(scenes(world, 2).to("meta")).device.type == "meta"
