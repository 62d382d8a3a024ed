"""The distance of videos from the world's distribution: a kernel distance on features of a small network.

It serves the same purpose as the Fréchet video distance, with two differences. The network is trained on this world,
because an I3D is no use on 16 pixels. And the estimate is the unbiased kernel estimate (Binkowski et al., arXiv
1801.01401), for which a few hundred videos are enough.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from linvideo.demo.world import COLOURS, DIRECTIONS, SHAPES, Scenes, World
from linvideo.trajectories.atomic_files import write_safetensors

FEATURES = 64
TRUTH = 1000  # videos of the world to compare with


class VideoNet(nn.Module):
    """A network from videos [B, 3, F, H, W] in [-1, 1] to features [B, 64].

    The features are learned with `head`, which gives for each colour a logit of its presence and logits of the shapes
    and of the directions.
    """

    def __init__(self):
        super().__init__()
        widths, layers = (3, 16, 32, FEATURES), []
        for before, after in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv3d(before, after, 3, stride=2, padding=1), nn.GroupNorm(4, after), nn.SiLU()]
        layers += [nn.AdaptiveAvgPool3d((2, 2, 2)), nn.Flatten(), nn.Linear(8 * FEATURES, FEATURES), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(FEATURES, len(COLOURS) * (1 + len(SHAPES) + len(DIRECTIONS)))

    def forward(self, videos: torch.Tensor) -> torch.Tensor:
        return self.body(videos)

    def logits(self, videos: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the logits of (presence [B, colours], shape [B, colours, 3], direction [B, colours, 8])."""
        per_colour = self.head(self(videos)).unflatten(1, (len(COLOURS), -1))
        return per_colour[..., 0], *per_colour[..., 1:].split([len(SHAPES), len(DIRECTIONS)], dim=-1)


def labels(scenes: Scenes) -> torch.Tensor:
    """Return int64 [objects, 4]: the video, colour, shape and direction of each object."""
    video = torch.arange(len(scenes.colour))[:, None].expand_as(scenes.colour)
    return torch.stack([video, scenes.colour, scenes.shape, scenes.direction], -1).flatten(0, 1)


def train_network(world: World, device: str, steps: int = 1000, batch: int = 64) -> tuple[VideoNet, float]:
    """Train the network; returns it and the share of objects whose shape and direction it recognises."""
    torch.manual_seed(0)
    net, draws = VideoNet().to(device), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        scenes = world.sample_scenes(batch, draws)
        video, colour, shape, direction = labels(scenes).to(device).T
        there, shapes, directions = net.logits(world.render(scenes.to(device)))
        present = torch.zeros_like(there)
        present[video, colour] = 1.0
        loss = nn.functional.binary_cross_entropy_with_logits(there, present)
        loss = loss + nn.functional.cross_entropy(shapes[video, colour], shape)
        loss = loss + nn.functional.cross_entropy(directions[video, colour], direction)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    net.eval().requires_grad_(False)
    scenes = world.sample_scenes(500, draws)
    video, colour, shape, direction = labels(scenes).to(device).T
    _, shapes, directions = net.logits(world.render(scenes.to(device)))
    right = (shapes[video, colour].argmax(-1) == shape) & (directions[video, colour].argmax(-1) == direction)
    return net, right.float().mean().item()


class WorldDistance:
    """The kernel distance to `TRUTH` videos of the world. The network is trained once and kept in `path`."""

    def __init__(self, path: Path, world: World, device: str):
        if not path.is_file():
            net, accuracy = train_network(world, device)
            write_safetensors(path, net.state_dict(), {"accuracy": f"{accuracy:.3f}"})
        self.net, self.device = VideoNet().to(device), device
        self.net.load_state_dict(load_file(path))
        self.net.eval().requires_grad_(False)
        truth = self._features(world.render(world.sample_scenes(TRUTH, torch.Generator().manual_seed(1))))
        self.mean, self.deviation = truth.mean(0), truth.std(0).clamp_min(1e-6)
        self.truth = self._standard(truth)

    def __call__(self, videos: torch.Tensor) -> float:
        return kernel_distance(self._standard(self._features(videos)), self.truth)

    def between(self, videos: torch.Tensor, others: torch.Tensor) -> float:
        """Return the kernel distance of two sets of videos."""
        return kernel_distance(*(self._standard(self._features(each)) for each in (videos, others)))

    def _standard(self, features: torch.Tensor) -> torch.Tensor:
        return (features - self.mean) / self.deviation

    def _features(self, videos: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.net(part.to(self.device)) for part in videos.split(64)]).double().cpu()


def kernel_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """Return the unbiased squared maximum mean discrepancy of x [n, d] and y [m, d] for the kernel (x y / d + 1)^3.

    If both have the same distribution, it is 0 on average, so it can be negative.
    """

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a):
        k, n = kernel(a, a), len(a)
        return (k.sum() - k.diagonal().sum()) / (n * (n - 1))

    return float(within(x) + within(y) - 2 * kernel(x, y).mean())
