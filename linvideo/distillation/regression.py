"""The first stage of a distillation: regression on the teacher's stored trajectories, without evaluating the teacher.

A deterministic sampler maps each state x_t of a trajectory to its end x_0. The student learns that map at its own few
timesteps: its velocity there should be (x_t - x_0) / t, which leads to x_0 in one jump. The student averages over what
    it
cannot predict of x_0, so its samples are blurred. But they cover the teacher's distribution, and distribution matching
then sharpens them.
"""

import torch

from linvideo.run.gradient import mean_square
from linvideo.trajectories.flow import like, predict_velocity
from linvideo.trajectories.prompts import PromptEmbeddings
from linvideo.trajectories.seeding import draw_indices
from linvideo.trajectories.store import TrajectoryStore


class TrajectoryJumps:
    """Draw pairs (x_t, x_0) with t close to one of the student's timesteps.

    For each timestep, the nearest stored state of a trajectory is used, at its own t. With a large stride it can be up
    to half a stride of sampler steps away.

    Args:
        store: A complete trajectory store.
        prompts: Embeddings of the prompts.
        timesteps: Timesteps of the student.
    """

    def __init__(self, store: TrajectoryStore, prompts: PromptEmbeddings, timesteps: list[float]):
        self.store, self.prompts = store, prompts
        distances = store.timesteps()[:, :, None] - torch.tensor(timesteps)  # [trajectories, S, K]
        self.nearest = distances.abs().argmin(dim=1)  # [trajectories, K]

    def loss(self, student: torch.nn.Module, positions: range, *name: int | str) -> torch.Tensor:
        """Return the mean over elements of |u_S(x_t, t, c) - (x_t - x_0) / t|^2.

        The pairs are those at `positions` of the batch `name`.
        """
        trajectories, steps = self.nearest.shape
        chosen = draw_indices(trajectories * steps, positions, *name)
        pairs = [divmod(index, steps) for index in chosen]
        kept = self.store.request["states_per_trajectory"]
        states = [trajectory * kept + int(self.nearest[trajectory, step]) for trajectory, step in pairs]
        batch = self.store.batch(states, self.prompts, student.device)
        # the sampler was guided by the prompt, even where the stored velocity has the negative condition
        sample, conditions = self.store.samples([trajectory for trajectory, _ in pairs], self.prompts, student.device)
        target = (batch.x - sample) / like(batch.t, sample)
        return mean_square(predict_velocity(student, batch.x, batch.timestep, conditions), target)
