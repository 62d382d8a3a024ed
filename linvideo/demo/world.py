"""The embedded world: one coloured shape on black that moves straight at a constant speed.

Everything about a video is known exactly (colour, shape, direction, speed, start), so generated videos can be judged
without a learned metric. Space is measured in pixels, time in frames; y points down as in images.
"""

from dataclasses import dataclass

import torch

FRAMES, SIZE = 8, 16
COLOURS = {
    "red": (1.0, 0.0, 0.0),
    "green": (0.0, 1.0, 0.0),
    "blue": (0.0, 0.0, 1.0),
    "yellow": (1.0, 1.0, 0.0),
    "magenta": (1.0, 0.0, 1.0),
    "cyan": (0.0, 1.0, 1.0),
}
SHAPES = ("square", "disc", "cross")
DIRECTIONS = {
    "right": (1, 0),
    "down-right": (1, 1),
    "down": (0, 1),
    "down-left": (-1, 1),
    "left": (-1, 0),
    "up-left": (-1, -1),
    "up": (0, -1),
    "up-right": (1, -1),
}
SPEED = (0.7, 1.2)  # pixels per frame
MARGIN = 3.0  # the shape's centre keeps this distance from the border


@dataclass
class Scenes:
    """A batch of videos as parameters. colour, shape, direction: int64 [B] indices into the tables above;
    speed: float [B] in pixels per frame; start: float [B, 2], the centre (x, y) in the first frame in pixels."""

    colour: torch.Tensor
    shape: torch.Tensor
    direction: torch.Tensor
    speed: torch.Tensor
    start: torch.Tensor

    def captions(self) -> list[str]:
        rows = zip(self.colour.tolist(), self.shape.tolist(), self.direction.tolist(), strict=True)
        return [caption(*row) for row in rows]


def caption(colour: int, shape: int, direction: int) -> str:
    return f"a {list(COLOURS)[colour]} {SHAPES[shape]} moving {list(DIRECTIONS)[direction]}"


def all_captions() -> list[str]:
    """The 144 captions, ordered so that number ((colour * 3) + shape) * 8 + direction names that scene."""
    return [caption(c, s, d) for c in range(len(COLOURS)) for s in range(len(SHAPES)) for d in range(len(DIRECTIONS))]


def caption_number(scenes: Scenes) -> torch.Tensor:
    """Index into `all_captions`, int64 [B]."""
    return (scenes.colour * len(SHAPES) + scenes.shape) * len(DIRECTIONS) + scenes.direction


def scenes_from_numbers(numbers: torch.Tensor, generator: torch.Generator) -> Scenes:
    """Scenes with the captions of the given numbers (int64 [B]) and random speed and start."""
    batch = len(numbers)
    direction = numbers % len(DIRECTIONS)
    shape = numbers // len(DIRECTIONS) % len(SHAPES)
    colour = numbers // (len(DIRECTIONS) * len(SHAPES))
    speed = SPEED[0] + (SPEED[1] - SPEED[0]) * torch.rand(batch, generator=generator)
    travel = unit_directions()[direction] * speed[:, None] * (FRAMES - 1)
    # Uniform over the starts from which the whole path stays inside the margin.
    low = MARGIN - travel.clamp(max=0)
    high = SIZE - MARGIN - travel.clamp(min=0)
    start = low + (high - low) * torch.rand(batch, 2, generator=generator)
    return Scenes(colour, shape, direction, speed, start)


def sample_scenes(batch: int, generator: torch.Generator) -> Scenes:
    """Scenes with captions drawn uniformly."""
    total = len(COLOURS) * len(SHAPES) * len(DIRECTIONS)
    return scenes_from_numbers(torch.randint(total, (batch,), generator=generator), generator)


def unit_directions() -> torch.Tensor:
    """Unit vectors (x, y) of the eight directions, float [8, 2]."""
    vectors = torch.tensor(list(DIRECTIONS.values()), dtype=torch.float32)
    return vectors / vectors.norm(dim=1, keepdim=True)


def coverage_of(shape: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """Anti-aliased masks. shape: int64 [B]; centre: float [B, F, 2] -> float [B, F, SIZE, SIZE] in [0, 1]."""
    pixel = torch.arange(SIZE, dtype=torch.float32) + 0.5
    dx = (pixel[None, None, None, :] - centre[..., 0, None, None]).abs()
    dy = (pixel[None, None, :, None] - centre[..., 1, None, None]).abs()
    dx, dy = torch.broadcast_tensors(dx, dy)
    square = torch.maximum(dx, dy) - 2.5
    disc = torch.sqrt(dx * dx + dy * dy) - 2.8
    cross = torch.minimum(torch.maximum(dx - 3.0, dy - 1.0), torch.maximum(dx - 1.0, dy - 3.0))
    distance = torch.stack([square, disc, cross])[shape, torch.arange(len(shape))]
    return (0.5 - distance).clamp(0, 1)


def render(scenes: Scenes) -> torch.Tensor:
    """Videos of the scenes, float [B, 3, FRAMES, SIZE, SIZE] in [-1, 1]."""
    time = torch.arange(FRAMES, dtype=torch.float32)
    velocity = unit_directions()[scenes.direction] * scenes.speed[:, None]
    centre = scenes.start[:, None] + velocity[:, None] * time[None, :, None]
    colour = torch.tensor(list(COLOURS.values()))[scenes.colour]
    video = coverage_of(scenes.shape, centre)[:, None] * colour[:, :, None, None, None]
    return video * 2 - 1
