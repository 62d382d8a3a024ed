"""The start of a distillation: regression on the teacher's stored trajectories, without a teacher at hand.

A deterministic sampler maps each state x_t of a trajectory to where the trajectory ends, x_0. The student learns that
map at its own few timesteps: its velocity there should be (x_t - x_0) / t, which brings it to x_0 in one jump. What it
cannot know of x_0 it averages over, so its samples are blurred; but they cover what the teacher's cover, from where
distribution matching sharpens them.
"""

import torch

from linvideo.run.gradient import mean_square
from linvideo.trajectories.flow import like, predict_velocity
from linvideo.trajectories.prompts import PromptEmbeddings
from linvideo.trajectories.seeding import draw_indices
from linvideo.trajectories.store import TrajectoryStore


class TrajectoryJumps:
    """Draws pairs (x_t, x_0) with t near to one of the student's timesteps.

    Args:
        store: complete. Of a trajectory's kept states the one nearest to a timestep stands for it, at its own t: a
            store with a large stride has them up to half a stride of sampler steps away.
        timesteps: the student's.
    """

    def __init__(self, store: TrajectoryStore, prompts: PromptEmbeddings, timesteps: list[float]):
        self.store, self.prompts = store, prompts
        distances = store.timesteps()[:, :, None] - torch.tensor(timesteps)  # [trajectories, S, K]
        self.nearest = distances.abs().argmin(dim=1)  # [trajectories, K]

    def loss(self, student: torch.nn.Module, positions: range, *name: int | str) -> torch.Tensor:
        """|u_S(x_t, t, c) - (x_t - x_0) / t|^2, mean over elements, of the pairs at `positions` of the batch
        `name`."""
        trajectories, steps = self.nearest.shape
        chosen = draw_indices(trajectories * steps, positions, *name)
        pairs = [divmod(index, steps) for index in chosen]
        kept = self.store.request["states_per_trajectory"]
        states = [trajectory * kept + int(self.nearest[trajectory, step]) for trajectory, step in pairs]
        batch = self.store.batch(states, self.prompts, student.device)
        # sampling was guided by the prompt, whatever condition the stored velocity is under
        sample, conditions = self.store.samples([trajectory for trajectory, _ in pairs], self.prompts, student.device)
        target = (batch.x - sample) / like(batch.t, sample)
        return mean_square(predict_velocity(student, batch.x, batch.timestep, conditions), target)
