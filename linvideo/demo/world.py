"""The embedded worlds: coloured shapes that move at constant speeds, in three sizes.

In the small world, a single shape moves straight over a black background. In the others, several shapes of different
colours bounce off the edges of the picture; a shape that is named earlier is in front of later ones. Behind them is a
dim grey pattern, over which the camera pans. The edges move with the camera, so it does not change how shapes move in
the picture.

Everything about a video is known exactly (colours, shapes, directions, speeds, starts, camera), so generated videos can
be judged without a learned metric. Space is measured in pixels and time in frames; y points down, as in images. Light
is between 0 and 1; videos store it as 2 light - 1.
"""

import itertools
import math
import re
from dataclasses import dataclass, fields

import torch

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
CAMERAS = {"still": (0, 0), "left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
GREY = 0.25  # the brightest light of the background; every shape has 1.0 in some channel
FREE_STEPS = 4  # no shape meets a wall in the first frames, so that the caption's direction can be seen


@dataclass(frozen=True)
class World:
    """The settings of a world.

    Args:
        name: Name of the world.
        frames: Number of frames of a video.
        size: Height and width of a video in pixels.
        objects: Number of shapes in a video, all of different colours.
        scale: Scale of the shapes; 1 means a radius of about 3 pixels.
        speed: Range of the shapes' speeds in pixels per frame.
        bounce: Whether shapes bounce off the edges of the picture; if not, every path ends before them.
        camera: Range of the camera's speed in pixels per frame; None for a world without camera and background.
        period: Period of the background's pattern in pixels.
    """

    name: str
    frames: int
    size: int
    objects: int
    scale: float
    speed: tuple[float, float]
    bounce: bool = False
    camera: tuple[float, float] | None = None
    period: int = 0

    @property
    def margin(self) -> float:
        """Smallest distance between a shape's centre and the border, in pixels."""
        return 3.0 * self.scale

    @property
    def caption_total(self) -> int:
        return math.prod(self._radices())

    def captions(self, numbers: torch.Tensor) -> list[str]:
        """Return the captions with these numbers, int64 [B].

        Each caption has a number in [0, caption_total). Directions vary fastest, then shapes, colours and the camera;
        with one shape, the number is ((colour * 3) + shape) * 8 + direction.
        """
        return self.scenes_from_numbers(numbers, torch.Generator(numbers.device)).captions()

    def caption_numbers(self, captions: list[str]) -> torch.Tensor:
        """Return the numbers of captions, int64 [B]: the inverse of `captions`.

        Raises:
            ValueError: This world does not have the caption.
        """
        one = rf"a ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) moving ({'|'.join(DIRECTIONS)})"
        camera = f" camera ({'|'.join(CAMERAS)})" if self.camera else ""
        pattern = re.compile(" in front of ".join([one] * self.objects) + camera)
        orders = {order: number for number, order in enumerate(self._colour_orders())}
        names, shapes, ways, cameras = list(COLOURS), list(SHAPES), list(DIRECTIONS), list(CAMERAS)
        numbers = []
        for text in captions:
            match = pattern.fullmatch(text)
            words = match.groups() if match else ()
            order = tuple(names.index(word) for word in words[: 3 * self.objects : 3])
            if order not in orders:
                raise ValueError(f"the {self.name} world has no caption {text!r}")
            digits = [cameras.index(words[-1]) if self.camera else 0, orders[order]]
            digits += [shapes.index(word) for word in words[1 : 3 * self.objects : 3]]
            digits += [ways.index(word) for word in words[2 : 3 * self.objects : 3]]
            number = 0
            for digit, radix in zip(digits, self._radices(), strict=True):
                number = number * radix + digit
            numbers.append(number)
        return torch.tensor(numbers, dtype=torch.long)

    def training_captions(self, count: int = 1000) -> list[str]:
        """Return all captions in the order of their numbers, or a fixed sample of `count` different ones if there are
        more."""
        if self.caption_total <= count:
            return self.captions(torch.arange(self.caption_total))
        order = torch.randperm(self.caption_total, generator=torch.Generator().manual_seed(98))
        return self.captions(order[:count])

    def evaluation_captions(self, count: int, seed: int = 0) -> list[str]:
        """Return captions in a shuffled order that depends on `seed`, repeated as needed."""
        order = torch.randperm(self.caption_total, generator=torch.Generator().manual_seed(99 + seed))
        return self.captions(order.repeat(-(-count // self.caption_total))[:count])

    def sample_scenes(self, batch: int, generator: torch.Generator) -> "Scenes":
        """Draw scenes with uniformly distributed captions, on the generator's device."""
        device = generator.device
        numbers = torch.randint(self.caption_total, (batch,), generator=generator, device=device)
        return self.scenes_from_numbers(numbers, generator)

    def scenes_from_captions(self, captions: list[str], generator: torch.Generator) -> "Scenes":
        """Draw scenes with these captions and random speeds and starts, on the generator's device.

        Raises:
            ValueError: This world does not have the caption.
        """
        return self.scenes_from_numbers(self.caption_numbers(captions).to(generator.device), generator)

    def scenes_from_numbers(self, numbers: torch.Tensor, generator: torch.Generator) -> "Scenes":
        """Draw the same for captions given by number (int64 [B], see `captions`)."""
        device, batch, count = numbers.device, len(numbers), self.objects
        camera, order, *digits = torch.unravel_index(numbers, self._radices())
        colour = torch.tensor(self._colour_orders(), device=device)[order]
        shape, direction = torch.stack(digits[:count], 1), torch.stack(digits[count:], 1)

        def uniform(low, high, *size: int) -> torch.Tensor:
            return low + (high - low) * torch.rand(batch, *size, generator=generator, device=device)

        speed = uniform(*self.speed, count)
        # Uniform over all starts from which the shape meets no wall on its whole path or, in a world that bounces, on
        # its first steps.
        steps = FREE_STEPS if self.bounce else self.frames - 1
        travel = unit_directions(device)[direction] * speed[..., None] * steps
        low = self.margin - travel.clamp(max=0)
        high = self.size - self.margin - travel.clamp(min=0)
        start = uniform(low, high, count, 2)
        if self.camera:
            pan, phase = uniform(*self.camera), uniform(0.0, self.period, 2)
        else:
            pan, phase = torch.zeros(batch, device=device), torch.zeros(batch, 2, device=device)
        return Scenes(self, colour, shape, direction, speed, start, camera=camera, pan=pan, phase=phase)

    def paths(self, direction: torch.Tensor, speed: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """Return the centres in every frame, float [B, K, frames, 2]. direction, speed: [B, K]; start: [B, K, 2]."""
        time = torch.arange(self.frames, dtype=torch.float32, device=start.device)
        velocity = unit_directions(start.device)[direction] * speed[..., None]
        path = start[:, :, None] + velocity[:, :, None] * time[:, None]
        return self.reflect(path) if self.bounce else path

    def reflect(self, path: torch.Tensor) -> torch.Tensor:
        """Fold the coordinates of a path without walls back into the picture, as bouncing off the walls does."""
        width = self.size - 2 * self.margin
        return self.margin + width - ((path - self.margin).remainder(2 * width) - width).abs()

    def render(self, scenes: "Scenes") -> torch.Tensor:
        """Render videos of the scenes on their device, float [B, 3, frames, size, size] in [-1, 1]."""
        path = self.paths(scenes.direction, scenes.speed, scenes.start)
        background = self.background(scenes.camera, scenes.pan, scenes.phase)
        return self.compose(scenes.colour, self.masks(scenes.shape, path), background)

    def masks(self, shape: torch.Tensor, path: torch.Tensor) -> torch.Tensor:
        """Return anti-aliased masks in [0, 1], float [B, K, F, size, size], as if nothing were in front of the shapes.

        shape: int64 [B, K]. path: Centres, float [B, K, F, 2].
        """
        pixel = torch.arange(self.size, dtype=torch.float32, device=path.device) + 0.5
        dx = (pixel - path[..., 0, None, None]).abs()
        dy = (pixel[:, None] - path[..., 1, None, None]).abs()
        s = self.scale
        square = torch.maximum(dx, dy) - 2.5 * s
        disc = torch.sqrt(dx * dx + dy * dy) - 2.8 * s
        cross = torch.minimum(torch.maximum(dx - 3.0 * s, dy - 1.0 * s), torch.maximum(dx - 1.0 * s, dy - 3.0 * s))
        shape = shape[..., None, None, None]
        distance = torch.where(shape == 0, square, torch.where(shape == 1, disc, cross))
        return (0.5 - distance).clamp(0, 1)

    def background(self, camera: torch.Tensor, pan: torch.Tensor, phase: torch.Tensor) -> torch.Tensor:
        """Return the light behind the shapes, float [B, frames, size, size]; in a world without camera, a 0 that
        broadcasts.

        camera: int64 [B]. pan: Speed of the camera, float [B]. phase: Point of the pattern at the picture's corner in
            the first frame, float [B, 2].
        """
        if not self.camera:
            return torch.zeros(1, 1, 1, 1, device=phase.device)
        time = torch.arange(self.frames, dtype=torch.float32, device=phase.device)
        pixel = torch.arange(self.size, dtype=torch.float32, device=phase.device) + 0.5
        vector = torch.tensor(list(CAMERAS.values()), dtype=torch.float32, device=phase.device)[camera]
        corner = phase[:, None] + (vector * pan[:, None])[:, None] * time[:, None]  # [B, F, 2]
        wave = torch.cos(2 * math.pi / self.period * (pixel + corner[..., None]))  # [B, F, 2, size]
        return GREY / 4 * (2 + wave[:, :, 0, None, :] + wave[:, :, 1, :, None])

    def compose(self, colour: torch.Tensor, masks: torch.Tensor, background: torch.Tensor) -> torch.Tensor:
        """Compose videos in [-1, 1] from colours (int64 [B, K]), masks (see `masks`; the first is in front) and the
        background."""
        palette = torch.tensor(list(COLOURS.values()), device=masks.device)[colour]
        light = background[:, None]
        for k in reversed(range(masks.shape[1])):
            mask = masks[:, k, None]
            light = light * (1 - mask) + mask * palette[:, k, :, None, None, None]
        return light * 2 - 1

    def _radices(self) -> tuple[int, ...]:
        cameras = len(CAMERAS) if self.camera else 1
        return (cameras, len(self._colour_orders()), *[len(SHAPES)] * self.objects, *[len(DIRECTIONS)] * self.objects)

    def _colour_orders(self) -> list[tuple[int, ...]]:
        return list(itertools.permutations(range(len(COLOURS)), self.objects))


@dataclass
class Scenes:
    """The parameters of a batch of videos, with K shapes each; the first shape is in front.

    Args:
        world: World of the videos.
        colour, shape, direction: Indices into the tables above, int64 [B, K].
        speed: Speeds in pixels per frame, float [B, K].
        start: Centres (x, y) in the first frame in pixels, float [B, K, 2].
        camera: Indices into CAMERAS, int64 [B].
        pan: Speeds of the camera in pixels per frame, float [B].
        phase: Phases of the background in pixels, float [B, 2].
    """

    world: World
    colour: torch.Tensor
    shape: torch.Tensor
    direction: torch.Tensor
    speed: torch.Tensor
    start: torch.Tensor
    camera: torch.Tensor
    pan: torch.Tensor
    phase: torch.Tensor

    def captions(self) -> list[str]:
        names, ways, cameras = list(COLOURS), list(DIRECTIONS), list(CAMERAS)
        texts = []
        for row, camera in zip(
            torch.stack([self.colour, self.shape, self.direction], -1).tolist(), self.camera.tolist(), strict=True
        ):
            text = " in front of ".join(f"a {names[c]} {SHAPES[s]} moving {ways[d]}" for c, s, d in row)
            texts.append(text + (f" camera {cameras[camera]}" if self.world.camera else ""))
        return texts

    def to(self, device: torch.device | str) -> "Scenes":
        world, *tensors = (getattr(self, field.name) for field in fields(self))
        return Scenes(world, *(tensor.to(device) for tensor in tensors))


def unit_directions(device: torch.device | str = "cpu") -> torch.Tensor:
    """Return the unit vectors (x, y) of the eight directions, float [8, 2]."""
    vectors = torch.tensor(list(DIRECTIONS.values()), dtype=torch.float32, device=device)
    return vectors / vectors.norm(dim=1, keepdim=True)


WORLDS = {
    world.name: world
    for world in (
        World("small", frames=8, size=16, objects=1, scale=1.0, speed=(0.7, 1.2)),
        World(
            "middle",
            frames=16,
            size=32,
            objects=2,
            scale=1.5,
            speed=(0.8, 1.6),
            bounce=True,
            camera=(0.4, 0.8),
            period=16,
        ),
        World(
            "large",
            frames=16,
            size=64,
            objects=3,
            scale=3.0,
            speed=(1.5, 3.0),
            bounce=True,
            camera=(0.8, 1.6),
            period=32,
        ),
    )
}
