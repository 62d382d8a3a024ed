"""Exact metrics of generated videos of the embedded worlds, from geometry alone, without a learned judge.

A video is explained by fitting the world's own parameters to it (colours, shapes, paths, camera) and rendering them
again. All functions take videos as float [B, 3, frames, size, size] in [-1, 1]; K is the number of shapes of a video,
and F the number of its frames. Shapes are told apart by their colours, which differ within a video.
"""

import itertools
import math
from dataclasses import dataclass, fields

import torch

from linvideo.demo.world import CAMERAS, COLOURS, SHAPES, Scenes, World, unit_directions

STRAIGHT = 0.35  # pixels: a video is straight below this deviation from its paths
# Mean squared error for values in [-1, 1]: a video is clean below this distance to its re-rendering. All three limits
# allow a displacement of about half a pixel, which matters less in a larger picture; none allows a missing background.
CLEAN = {"small": 0.02, "middle": 0.012, "large": 0.012}
SHAPE_LIGHT = 0.2  # less than this in a pixel counts as background
ROUNDS = 4  # of fitting paths and rendering them again; the first one knows nothing about hidden shapes
PIXELS_AT_ONCE = 2**19  # over all shapes, frames and videos of one part of a batch, to limit its memory


@dataclass
class Fit:
    """The explanation of a batch of videos.

    Args:
        scenes: Parameters that explain the videos best.
        straightness: RMS distance of the centres from the fitted paths in pixels, float [B].
        rerender_error: Mean squared error between a video and its scene rendered again, for values in [-1, 1], float
            [B].
        flicker: Relative deviation of a shape's mass over the frames plus the deviation of its colour, float [B].
            Frames in which more than half of a shape is hidden do not count for it.
    """

    scenes: Scenes
    straightness: torch.Tensor
    rerender_error: torch.Tensor
    flicker: torch.Tensor


def fit(videos: torch.Tensor, world: World, order: torch.Tensor) -> Fit:
    """Explain videos.

    order: Expected colours from front to back, int64 [B, K]. The scenes keep this order for all colours that occur.
    """
    size = max(1, PIXELS_AT_ONCE // (world.objects * videos[0, 0].numel()))
    videos = videos.detach().float().cpu().clamp(-1, 1)
    parts = [fit_part(*part, world) for part in zip(videos.split(size), order.cpu().split(size), strict=True)]
    names = [field.name for field in fields(Scenes)[1:]]
    scenes = Scenes(world, *(torch.cat([getattr(part.scenes, name) for part in parts]) for name in names))
    return Fit(scenes, *(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Fit)[1:]))


def fit_part(videos: torch.Tensor, order: torch.Tensor, world: World) -> Fit:
    """Explain as many videos as fit into memory at once."""
    palette = torch.tensor(list(COLOURS.values()))
    light = (videos + 1) / 2
    strength, grey = shape_light(light, world)
    present = present_colours(light, strength, grey, order)
    masks = split(light, strength, grey, present)
    mass, centre = measure(masks)
    # Per frame, the colour of the pixels weighted by the mask; squared so that soft edges count little.
    weight = masks.square()
    hue = (light[:, None] * weight[:, :, None]).sum((-1, -2)) / weight.sum((-1, -2)).clamp(min=1e-3)[:, :, None]
    visible = mass > 0.8 * mass.amax(-1, keepdim=True) if world.bounce else torch.ones_like(mass, dtype=torch.bool)
    hue_mean = steady(hue, visible[:, :, None]).mean(-1)  # [B, K, 3]
    colour = torch.cdist(hue_mean.flatten(0, 1), palette).argmin(1).view_as(order)
    camera = fit_camera(grey, strength, world)
    background = world.background(*camera)

    if world.bounce:
        trust, hiding = visible.float(), torch.zeros_like(centre)
        for _ in range(ROUNDS):
            direction, speed, start = fit_bounces(centre - hiding, trust, world)
            path = world.paths(direction, speed, start)
            shape, rerender_error, ideal = closest_shapes(videos, world, colour, path, background)
            # The same measurement on the re-rendered scenes tells how hiding changes mass and centre.
            again = (world.compose(colour, ideal, background) + 1) / 2
            expected, expected_centre = measure(split(again, *shape_light(again, world), present))
            share = expected / ideal.sum((-1, -2)).clamp(min=1e-3)
            visible, trust = share > 0.5, share.square()
            # A damped step, because the pixels of an edge between two colours can change sides back and forth.
            hiding = hiding.lerp(expected_centre - path, 0.75)
        square = (centre - expected_centre).square().sum(-1) * visible
        straightness = (square.sum(-1) / visible.sum(-1).clamp(min=1)).sqrt()
        mass = mass / expected
    else:
        start, velocity, straightness = (x.unflatten(0, order.shape) for x in fit_line(centre.flatten(0, 1)))
        speed, direction = velocity.norm(dim=-1), (velocity @ unit_directions().T).argmax(-1)
        time = torch.arange(world.frames, dtype=torch.float32)
        path = start[:, :, None] + velocity[:, :, None] * time[:, None]
        shape, rerender_error, _ = closest_shapes(videos, world, colour, path, background)

    mass, hue = steady(mass, visible), steady(hue, visible[:, :, None])
    flicker = mass.std(-1) / mass.mean(-1).clamp(min=1e-3) + hue.std(-1).mean(-1)
    scenes = Scenes(world, colour, shape, direction, speed, start, *camera)
    return Fit(scenes, straightness.mean(1), rerender_error, flicker.mean(1))


def shape_light(light: torch.Tensor, world: World) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how much of a shape and how much grey each pixel shows, both float [B, F, size, size].

    light: [B, 3, F, size, size]. Every colour of the world has a channel at full strength and one without light, so the
        brightest channel gives the mask of the shapes and the darkest the background. In a world without camera the
        background is black by definition.
    """
    grey = light.amin(1) if world.camera else torch.zeros_like(light[:, 0])
    strength = light.amax(1) - grey
    return torch.where(strength > SHAPE_LIGHT, strength, 0.0), grey


def nearest(light: torch.Tensor, strength: torch.Tensor, grey: torch.Tensor, colours: torch.Tensor) -> torch.Tensor:
    """Return to which of these colours (int64 [B, J]), at the pixel's strength, each pixel is closest: int64
    [B, F, size, size] in [0, J)."""
    palette = torch.tensor(list(COLOURS.values()))[colours]  # [B, J, 3]
    likeness = torch.einsum("bcfyx,bjc->bjfyx", light - grey[:, None], palette)
    # |c - s p|^2 without |c|^2, divided by s.
    distance = strength[:, None] * palette.square().sum(-1)[:, :, None, None, None] - 2 * likeness
    label, least = torch.zeros_like(strength, dtype=torch.long), distance[:, 0]
    for j in range(1, distance.shape[1]):  # an argmin over a few planes, but many times faster
        label = torch.where(distance[:, j] < least, j, label)
        least = torch.minimum(distance[:, j], least)
    return label


def present_colours(
    light: torch.Tensor, strength: torch.Tensor, grey: torch.Tensor, order: torch.Tensor
) -> torch.Tensor:
    """Return the K colours with the most mass, int64 [B, K], in the given order if they occur in it."""
    batch, count = order.shape
    label = nearest(light, strength, grey, torch.arange(len(COLOURS)).expand(batch, -1))
    mass = torch.zeros(batch, len(COLOURS)).scatter_add_(1, label.flatten(1), strength.flatten(1))
    permutations = torch.tensor(list(itertools.permutations(range(count))))
    candidates = mass.topk(count).indices[:, permutations]  # [B, permutations, K]
    best = (candidates == order[:, None]).sum(-1).argmax(1)
    return candidates[torch.arange(batch), best]


def split(light: torch.Tensor, strength: torch.Tensor, grey: torch.Tensor, colours: torch.Tensor) -> torch.Tensor:
    """Return the mask of each colour, float [B, K, F, size, size]."""
    label = nearest(light, strength, grey, colours)
    return strength[:, None] * (label[:, None] == torch.arange(colours.shape[1])[:, None, None, None])


def measure(masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mass [B, K, F] and the centre of mass [B, K, F, 2] in pixels, of masks [B, K, F, size, size]."""
    pixel = torch.arange(masks.shape[-1], dtype=torch.float32) + 0.5
    mass = masks.sum((-1, -2)).clamp(min=1e-3)
    moments = (masks * pixel).sum((-1, -2)), (masks * pixel[:, None]).sum((-1, -2))
    return mass, torch.stack([moment / mass for moment in moments], -1)


def steady(values: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Replace the values [..., F] of frames that are not visible (bool [..., F]) by the mean of the visible ones."""
    mean = (values * visible).sum(-1, keepdim=True) / visible.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(visible, values, mean)


def fit_line(centre: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fit a line to points over time [B, F, 2] by least squares. Return its start [B, 2], its velocity [B, 2] and the
    RMS distance of the points from it [B]."""
    time = torch.arange(centre.shape[1], dtype=torch.float32)
    design = torch.stack([torch.ones_like(time), time], 1)
    solution = torch.linalg.lstsq(design.expand(len(centre), -1, -1), centre).solution
    residual = (centre - design @ solution).square().sum(-1).mean(1).sqrt()
    return solution[:, 0], solution[:, 1], residual


def fit_bounces(
    centre: torch.Tensor, weight: torch.Tensor, world: World
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fit a path that bounces between walls to points by least squares.

    Return its direction, int64 [B, K], speed, float [B, K], and start, float [B, K, 2].

    centre: Points [B, K, F, 2]. weight: Weight of each point's squared distance [B, K, F].
    """
    weight = weight + 1e-3
    low, high = world.margin, world.size - world.margin
    time = torch.arange(world.frames, dtype=torch.float32)
    # Along each axis, a shape moves with one of five multiples of its speed. All paths of an axis, on a grid, are
    # compared at once by |c - p|^2 = |c|^2 - 2 c p + |p|^2; then the two axes are added for each direction.
    slopes = torch.tensor([-1.0, -(0.5**0.5), 0.0, 0.5**0.5, 1.0])
    speeds = torch.linspace(0.75 * world.speed[0], 1.25 * world.speed[1], 17)
    starts = torch.linspace(low, high, 48)
    free = starts[:, None] + (slopes[:, None] * speeds)[..., None, None] * time  # [5, S, X, F]
    grid = world.reflect(free).flatten(0, 2) - world.size / 2
    offset = (centre - world.size / 2).transpose(-1, -2)  # [B, K, 2, F]
    error = weight[:, :, None] @ grid.square().T - 2 * (weight[:, :, None] * offset) @ grid.T
    # A start at a wall with a motion towards it looks like one with a motion away from it; the world has only the
    # latter.
    early = ((free[..., 2] < low) | (free[..., 2] > high)).flatten()
    error = error.masked_fill(early, math.inf)
    error, best = error.unflatten(-1, (len(slopes), len(speeds), len(starts))).min(-1)  # [B, K, 2, 5, S]
    along = (unit_directions()[:, :, None] - slopes).abs().argmin(-1)  # [8, 2], the slope of each direction and axis
    total = error[:, :, 0, along[:, 0]] + error[:, :, 1, along[:, 1]]  # [B, K, 8, S]
    choice = total.flatten(2).argmin(-1)
    direction, speed = choice // len(speeds), speeds[choice % len(speeds)]
    chosen = [best[:, :, axis, along[:, axis]].flatten(2).gather(2, choice[..., None]) for axis in (0, 1)]
    start = starts[torch.cat(chosen, -1)]

    # Gauss-Newton: between bounces the path is linear in start and speed, with a sign that every bounce flips.
    unit = unit_directions()[direction]
    for _ in range(5):
        free = start[:, :, None] + (unit * speed[..., None])[:, :, None] * time[:, None]
        sign = torch.where((free - low).remainder(2 * (high - low)) < high - low, 1.0, -1.0)  # [B, K, F, 2]
        along_speed = sign * unit[:, :, None] * time[:, None]
        jacobian = torch.cat([torch.diag_embed(sign), along_speed[..., None]], -1)  # [B, K, F, 2, 3]
        weighted = jacobian * weight[..., None, None]
        normal = torch.einsum("bkfai,bkfaj->bkij", weighted, jacobian) + 1e-4 * torch.eye(3)
        gradient = torch.einsum("bkfai,bkfa->bki", weighted, centre - world.reflect(free))
        change = torch.linalg.solve(normal, gradient)
        start, speed = (start + change[..., :2]).clamp(low, high), speed + change[..., 2]
    return direction, speed, start


def fit_camera(
    grey: torch.Tensor, strength: torch.Tensor, world: World
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fit the camera, int64 [B], its speed, float [B], and the background's phase, float [B, 2], as in `Scenes`.

    In each frame, the pattern's waves are fitted to the pixels without a shape by least squares; then comes the pan
    that best explains how the phases of the waves change. In a world without camera it is the still one.
    """
    batch = len(grey)
    if not world.camera:
        return torch.zeros(batch, dtype=torch.long), torch.zeros(batch), torch.zeros(batch, 2)
    wave_number = 2 * math.pi / world.period
    angle = wave_number * (torch.arange(world.size, dtype=torch.float32) + 0.5)
    flat = torch.ones(world.size, world.size)
    x, y = angle.expand_as(flat), angle[:, None].expand_as(flat)
    basis = torch.stack([flat, x.cos(), x.sin(), y.cos(), y.sin()]).flatten(1)  # [5, size^2]
    seen = (strength == 0).float().flatten(2)  # [B, F, size^2]
    normal = (seen @ (basis[:, None] * basis).flatten(0, 1).T).unflatten(-1, (5, 5)) + torch.eye(5)
    waves = torch.linalg.solve(normal, (seen * grey.flatten(2)) @ basis.T)
    turn = torch.complex(waves[..., 1::2], -waves[..., 2::2])  # [B, F, 2], exp(i wave_number corner) of x and y
    speeds = torch.linspace(0.75 * world.camera[0], 1.25 * world.camera[1], 41)
    vectors = torch.tensor(list(CAMERAS.values()), dtype=torch.float32)
    time = torch.arange(world.frames, dtype=torch.float32)
    pans = (vectors[:, None] * speeds[:, None]).flatten(0, 1)  # [5 S, 2]
    back = torch.polar(torch.ones(()), -wave_number * pans[:, None] * time[:, None])  # [5 S, F, 2]
    start = torch.einsum("bfa,hfa->bha", turn, back)
    best = start.abs().sum(-1).argmax(1)
    phase = start[torch.arange(batch), best].angle() / wave_number
    return best // len(speeds), speeds[best % len(speeds)], phase


def closest_shapes(
    videos: torch.Tensor, world: World, colour: torch.Tensor, path: torch.Tensor, background: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose, from front to back, the shapes whose rendering along the paths comes closest. Return them, int64 [B, K],
    the remaining mean squared error, float [B], and their masks, float [B, K, F, size, size]."""
    masks = [world.masks(torch.full_like(colour, shape), path) for shape in range(len(SHAPES))]
    chosen = masks[SHAPES.index("disc")].clone()  # until their turn comes
    shapes = []
    for k in range(world.objects):
        errors = []
        for mask in masks:
            chosen[:, k] = mask[:, k]
            errors.append((world.compose(colour, chosen, background) - videos).square().mean((1, 2, 3, 4)))
        error, shape = torch.stack(errors).min(0)
        chosen[:, k] = torch.stack([mask[:, k] for mask in masks])[shape, torch.arange(len(shape))]
        shapes.append(shape)
    return torch.stack(shapes, 1), error, chosen


def judge(videos: torch.Tensor, captions: list[str], world: World) -> dict[str, float]:
    """Return the metrics of a batch of videos that were made for these captions; see `score`.

    Raises:
        ValueError: The world does not have the caption.
    """
    return score(explain(videos, captions, world), captions, world)


def explain(videos: torch.Tensor, captions: list[str], world: World) -> Fit:
    """Return the scenes that fit the videos best. Raises as `judge`."""
    return fit(videos, world, wanted_scenes(captions, world).colour)


def wanted_scenes(captions: list[str], world: World) -> Scenes:
    """Return scenes with these captions, of which only what the captions say matters."""
    return world.scenes_from_captions(captions, torch.Generator().manual_seed(0))


def score(found: Fit, captions: list[str], world: World) -> dict[str, float]:
    """Compare the explanation of videos with their captions. Return the means over the batch:

    colour, shape, direction: Fraction of the shapes for which this is right.
    camera: Fraction of the videos for which it is right; only in worlds with a camera.
    all_right: Fraction of the videos in which all of these are right.
    good: Fraction of the videos that are all right, straight and clean.
    straightness_px, flicker, rerender_error: See `Fit`.
    coverage: Wasserstein-1 distances of start x, start y (pixels) and speed (pixels per frame) to the world's own
        distribution under the same captions, summed. 0 is perfect. This metric shows mode collapse.
    """
    wanted, numbers = wanted_scenes(captions, world), world.caption_numbers(captions)
    right = {name: getattr(found.scenes, name) == getattr(wanted, name) for name in ("colour", "shape", "direction")}
    if world.camera:
        right["camera"] = found.scenes.camera == wanted.camera
    all_right = torch.stack([values.view(len(captions), -1).all(1) for values in right.values()]).all(0)
    good = all_right & (found.straightness < STRAIGHT) & (found.rerender_error < CLEAN[world.name])
    return {name: mean(values) for name, values in right.items()} | {
        "all_right": mean(all_right),
        "good": mean(good),
        "straightness_px": mean(found.straightness),
        "flicker": mean(found.flicker),
        "rerender_error": mean(found.rerender_error),
        "coverage": coverage(
            found.scenes, world.scenes_from_numbers(numbers.repeat(50), torch.Generator().manual_seed(1))
        ),
    }


def coverage(scenes: Scenes, truth: Scenes) -> float:
    """Return the sum of the Wasserstein-1 distances of start x, start y and speed, over all shapes.

    Args:
        scenes: Scenes to compare, B of them.
        truth: Scenes with the same captions, n B of them for a whole number n.
    """
    pairs = [
        (scenes.start[..., 0], truth.start[..., 0]),
        (scenes.start[..., 1], truth.start[..., 1]),
        (scenes.speed, truth.speed),
    ]
    # Both are sorted and compared quantile by quantile: each value of the sample with n values of the truth.
    return sum(
        (a.flatten().sort().values[:, None] - b.flatten().sort().values.view(a.numel(), -1)).abs().mean().item()
        for a, b in pairs
    )


def psnr(videos: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB, averaged over videos, for values in [-1, 1] (peak-to-peak 2)."""
    difference = videos.float().cpu().clamp(-1, 1) - reference.float().cpu().clamp(-1, 1)
    error = difference.square().flatten(1).mean(1).clamp(min=1e-10)
    return (10 * torch.log10(4.0 / error)).mean().item()


def mean(values: torch.Tensor) -> float:
    return values.float().mean().item()
