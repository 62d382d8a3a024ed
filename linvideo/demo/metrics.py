"""Exact metrics on generated videos of the embedded world: no learned judge, only geometry.

A video is explained by fitting the world's own parameters to it (colour, shape, straight path) and rendering them
again. All functions take videos as float [B, 3, FRAMES, SIZE, SIZE] in [-1, 1].
"""

from dataclasses import dataclass

import torch

from linvideo.demo import world

STRAIGHT = 0.35  # pixels: a video is straight below this deviation from its line
CLEAN = 0.02  # mean squared error in [-1, 1] units: a video is clean below this distance to its re-rendering


@dataclass
class Fit:
    """What a batch of videos shows. scenes: the parameters that explain it best; straightness: float [B], RMS distance
    of the centre from the fitted line in pixels; rerender_error: float [B], mean squared error in [-1, 1] units between
    the video and the scenes rendered again; flicker: float [B], relative deviation of the shape's mass over the frames
    plus the deviation of its colour."""

    scenes: world.Scenes
    straightness: torch.Tensor
    rerender_error: torch.Tensor
    flicker: torch.Tensor


def fit(videos: torch.Tensor) -> Fit:
    videos = videos.detach().float().cpu().clamp(-1, 1)
    light = (videos + 1) / 2
    # Every colour of the world has a channel at full strength, so the brightest channel is the shape's mask.
    mask = light.amax(1)
    mask = torch.where(mask > 0.2, mask, 0.0)
    mass = mask.sum((-1, -2)).clamp(min=1e-3)  # [B, F]
    pixel = torch.arange(world.SIZE, dtype=torch.float32) + 0.5
    centre = torch.stack([(mask * pixel).sum((-1, -2)) / mass, (mask * pixel[:, None]).sum((-1, -2)) / mass], -1)

    start, velocity, residual = fit_line(centre)
    speed = velocity.norm(dim=1)
    direction = (velocity @ world.unit_directions().T).argmax(1)

    # Per frame, the colour of the pixels weighted by the mask; squared so that soft edges count little.
    weight = mask.square()
    colours = (light * weight[:, None]).sum((-1, -2)) / weight.sum((-1, -2)).clamp(min=1e-3)[:, None]  # [B, 3, F]
    palette = torch.tensor(list(world.COLOURS.values()))
    colour = torch.cdist(colours.mean(-1), palette).argmin(1)

    # The shape is the one whose rendering along the fitted line comes closest.
    time = torch.arange(world.FRAMES, dtype=torch.float32)
    path = start[:, None] + velocity[:, None] * time[None, :, None]
    errors = []
    for shape in range(len(world.SHAPES)):
        drawn = (
            world.coverage_of(torch.full_like(colour, shape), path)[:, None] * palette[colour][:, :, None, None, None]
        )
        errors.append((2 * drawn - 1 - videos).square().mean((1, 2, 3, 4)))
    rerender_error, shape = torch.stack(errors).min(0)

    flicker = mass.std(1) / mass.mean(1) + colours.std(-1).mean(1)
    return Fit(world.Scenes(colour, shape, direction, speed, start), residual, rerender_error, flicker)


def fit_line(centre: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Least-squares line through points over time. centre: [B, F, 2] -> start [B, 2], velocity [B, 2] and the RMS
    distance of the points from it [B]."""
    time = torch.arange(centre.shape[1], dtype=torch.float32)
    design = torch.stack([torch.ones_like(time), time], 1)
    solution = torch.linalg.lstsq(design.expand(len(centre), -1, -1), centre).solution
    residual = (centre - design @ solution).square().sum(-1).mean(1).sqrt()
    return solution[:, 0], solution[:, 1], residual


def judge(videos: torch.Tensor, numbers: torch.Tensor) -> dict[str, float]:
    """Means over a batch of videos made for the captions with these numbers (int64 [B], see `world.all_captions`).

    colour, shape, direction: fraction right; all_right: all three; good: all right, straight and clean;
    straightness_px, flicker, rerender_error: see `Fit`; coverage: Wasserstein-1 distance of start (pixels) and speed
    (pixels per frame) to the world's own law under the same captions, summed over the three; 0 is perfect, and it is
    the one that shows mode collapse.
    """
    found = fit(videos)
    wanted = world.scenes_from_numbers(numbers, torch.Generator().manual_seed(0))
    colour = found.scenes.colour == wanted.colour
    shape = found.scenes.shape == wanted.shape
    direction = found.scenes.direction == wanted.direction
    all_right = colour & shape & direction
    good = all_right & (found.straightness < STRAIGHT) & (found.rerender_error < CLEAN)
    return {
        "colour": mean(colour),
        "shape": mean(shape),
        "direction": mean(direction),
        "all_right": mean(all_right),
        "good": mean(good),
        "straightness_px": mean(found.straightness),
        "flicker": mean(found.flicker),
        "rerender_error": mean(found.rerender_error),
        "coverage": coverage(found.scenes, numbers),
    }


def coverage(scenes: world.Scenes, numbers: torch.Tensor, draws: int = 50) -> float:
    """Sum of the Wasserstein-1 distances of start x, start y and speed to `draws` samples of the world per caption."""
    truth = world.scenes_from_numbers(numbers.repeat(draws), torch.Generator().manual_seed(1))
    pairs = [
        (scenes.start[:, 0], truth.start[:, 0]),
        (scenes.start[:, 1], truth.start[:, 1]),
        (scenes.speed, truth.speed),
    ]
    # Both sorted and compared quantile by quantile; the truth holds `draws` values for every one of the sample's.
    return sum((a.sort().values[:, None] - b.sort().values.view(-1, draws)).abs().mean().item() for a, b in pairs)


def psnr(videos: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean over videos of the peak signal-to-noise ratio in dB, for values in [-1, 1] (peak-to-peak 2)."""
    difference = videos.float().cpu().clamp(-1, 1) - reference.float().cpu().clamp(-1, 1)
    error = difference.square().flatten(1).mean(1).clamp(min=1e-10)
    return (10 * torch.log10(4.0 / error)).mean().item()


def mean(values: torch.Tensor) -> float:
    return values.float().mean().item()
