"""The student's rollouts: videos that the student is sampling while it trains, advanced one step per training step.

Every training step evaluates the student at the current states of its rollouts anyway. The same velocity also advances
each rollout by one Euler step on the sampler's grid (with guidance if the sampler uses it), so states on the student's
own trajectories cost no sampling of their own. A rollout that reaches the end restarts from fresh noise with another
prompt. Rollouts start from stored teacher states, so that every t is covered from the first training step. Their states
are hidden state and belong in the checkpoint. Multistep schedulers are replaced by Euler steps on the same grid.

When one expert of Wan 2.2 is trained, its rollouts stay in that expert's range of t. They end at the last step in the
range. The low-noise expert's rollouts restart where the teacher's trajectories enter its range, because the other
expert, which would produce those states, is not trained in this run.
"""

from collections.abc import Sequence

import torch

from linvideo.trajectories.conditions import Conditions
from linvideo.trajectories.experts import stored_expert, stored_guidance
from linvideo.trajectories.flow import guide, like, predict_velocity
from linvideo.trajectories.prompts import PromptEmbeddings
from linvideo.trajectories.seeding import draw_noise, stable_hash
from linvideo.trajectories.store import StateBatch, TrajectoryStore

STATE = ("x", "step", "prompt", "negative", "restarts")


class StudentRollouts:
    """The rollouts of one micro-batch, one for each of its samples.

    Args:
        positions: Positions of the rollouts in the global batch.
        store: Teacher trajectories, recorded on the same grid.
        prompts: Text embeddings to sample under.
        timesteps: [n], the sampler's timesteps.
        sigmas: [n + 1], the sampler's t, with the final 0.
        seed: Seed of the start states, noise and prompts.
        device: Device that holds the states.
    """

    def __init__(
        self,
        positions: Sequence[int],
        store: TrajectoryStore,
        prompts: PromptEmbeddings,
        timesteps: torch.Tensor,
        sigmas: torch.Tensor,
        seed: int,
        device: torch.device | str,
    ):
        self.positions, self.store, self.prompts, self.seed = list(positions), store, prompts, seed
        self.expert, self.guidance_scale = stored_expert(store.request), stored_guidance(store.request)
        self.negative_probability = store.request["negative_probability"]
        self.timesteps, self.sigmas = timesteps.cpu(), sigmas.cpu()
        self.end = self.expert.steps(self.timesteps).stop
        if self.expert.name == "low_noise":
            first = store.timesteps()[:, 0]
            # trajectories whose first stored state is the first step in the range
            self.entries = (first == first.max()).nonzero().flatten().tolist()
        start = store.draw(self.positions, seed, "lanes", prompts=prompts, device=device)  # see _restart for the name
        self.x = start.x
        # [B] each, on the CPU: the step on the grid, the condition, the number of restarts
        self.step = self._steps_of(start)
        self.prompt, self.negative = start.prompt, start.negative
        self.restarts = torch.zeros(len(self.positions), dtype=torch.long)

    @property
    def timestep(self) -> torch.Tensor:
        """[B], the timestep as the model takes it (1000 t)."""
        return self.timesteps[self.step].to(self.x.device)

    @property
    def sigma(self) -> torch.Tensor:
        """[B], the current t."""
        return self.sigmas[self.step].to(self.x.device)

    @property
    def sigma_next(self) -> torch.Tensor:
        return self.sigmas[self.step + 1].to(self.x.device)

    @property
    def margin(self) -> torch.Tensor:
        """[B], the distance from the current t down to the end of the student's range (to 0 without experts)."""
        return (self.sigma - self.expert.t_min).clamp_min(0)

    def conditions(self) -> Conditions:
        """Return the condition of each rollout, which stays the same until it restarts."""
        return self.prompts.conditions(self.prompt, self.negative, self.x.device)

    @torch.no_grad()
    def advance(self, student: torch.nn.Module, u: torch.Tensor) -> None:
        """Advance every rollout by one sampler step; u [B, ...] is the student's velocity at the current states."""
        u = u.detach()
        if self.guidance_scale != 1:  # guidance also needs the velocity under the other condition
            other = self.prompts.conditions(self.prompt, ~self.negative, self.x.device)
            u_other = predict_velocity(student, self.x, self.timestep, other)
            flip = like(self.negative, u)
            u = guide(torch.where(flip, u_other, u), torch.where(flip, u, u_other), self.guidance_scale)
        self.x = self.x + like(self.sigma_next - self.sigma, u) * u
        self.step = self.step + 1
        finished = (self.step >= self.end) | ~self.x.isfinite().flatten(1).all(dim=1).cpu()
        for index in finished.nonzero().flatten().tolist():
            self._restart(index)

    def _restart(self, index: int) -> None:
        self.restarts[index] += 1
        # an earlier word for a rollout. It names the random stream, so another word would change the result of a seed.
        name = (self.seed, "lane", self.positions[index], int(self.restarts[index]))
        if self.expert.name == "low_noise":
            trajectory = self.entries[stable_hash(*name, "trajectory") % len(self.entries)]
            state = trajectory * self.store.request["states_per_trajectory"]
            start = self.store.batch([state], self.prompts, self.x.device)
            self.x[index], self.step[index], self.prompt[index] = start.x[0], self._steps_of(start)[0], start.prompt[0]
        else:
            self.x[index] = draw_noise(tuple(self.x.shape[1:]), *name, "noise").to(self.x.device)
            self.step[index] = 0
            self.prompt[index] = stable_hash(*name, "prompt") % len(self.prompts)
        self.negative[index] = stable_hash(*name, "negative") / 2**63 < self.negative_probability

    def _steps_of(self, states: StateBatch) -> torch.Tensor:
        return (states.timestep.cpu()[:, None] - self.timesteps).abs().argmin(dim=1)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: getattr(self, name) for name in STATE}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        for name in STATE:
            setattr(self, name, state[name].to(getattr(self, name).device, copy=True))  # restarts write in place
