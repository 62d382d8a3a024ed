"""Models and prompts for which every loss can be written down by hand."""

import torch

from linvideo.trajectories.prompts import PromptEmbeddings
from linvideo.trajectories.store import TrajectoryStore

SHAPE = (2, 1, 2, 2)  # C, F, H, W


class AffineFlow(torch.nn.Module):
    """u(x, t, c) = scale * x + shift * t + mean(c), called like a Wan transformer."""

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, scale: float, shift: float = 0.0):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(float(scale)))
        self.shift = torch.nn.Parameter(torch.tensor(float(shift)))

    def forward(self, hidden_states, timestep, encoder_hidden_states, return_dict=False):
        t = (timestep / 1000).view(-1, 1, 1, 1, 1)
        mean = encoder_hidden_states.mean(dim=(1, 2)).view(-1, 1, 1, 1, 1)
        return (self.scale * hidden_states + self.shift * t + mean,)


def toy_prompts(count: int = 3) -> PromptEmbeddings:
    """Return prompts of 2 tokens with 2 numbers: all i + 1 for prompt i, all -1 for the negative prompt."""
    embeds = torch.arange(1.0, count + 1).view(-1, 1, 1).expand(count, 2, 2)
    return PromptEmbeddings(embeds, -torch.ones(1, 2, 2))


def toy_store(path, timesteps: torch.Tensor, seed: int = 0, **request) -> TrajectoryStore:
    """Return a store with 4 trajectories of random numbers at the given timesteps, in two shards."""
    steps = len(timesteps)
    values = {"num_trajectories": 4, "shard_size": 2, "states_per_trajectory": steps, "seed": seed}
    values |= {"guidance_scale": 1.0, "negative_probability": 0.25}
    store = TrajectoryStore(path, {**values, **request})
    generator = torch.Generator().manual_seed(seed)
    for number in store.missing_shards():
        store.write_shard(
            number,
            {
                "x": torch.randn(2, steps, *SHAPE, generator=generator),
                "u": torch.randn(2, steps, *SHAPE, generator=generator),
                "timestep": timesteps.expand(2, steps).clone(),
                "negative": torch.rand(2, steps, generator=generator) < 0.25,
                "prompt": torch.tensor([0, 1]),
                "sample": torch.randn(2, *SHAPE, generator=generator),
            },
        )
    return store


def gaussian_velocity(x, t, mean, variance):
    """Return E[eps - x_0 | x_t = x] for x_0 ~ N(mean, variance I), in closed form."""
    marginal = (1 - t) ** 2 * variance + t**2
    eps = t * (x - (1 - t) * mean) / marginal
    x_0 = mean + (1 - t) * variance * (x - (1 - t) * mean) / marginal
    return eps - x_0
