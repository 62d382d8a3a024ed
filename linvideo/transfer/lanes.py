"""States on the student's own trajectories, without roll-outs: lanes, each one video being sampled by the student.

Every training step evaluates the student at the lanes' states anyway; that velocity also moves each lane one Euler step
along the sampler's grid (guided, when the sampler is). A lane that reaches the end restarts from fresh noise with
another prompt. Lanes start on stored teacher states, so they stand at all t from the first step. The lanes are hidden
state: they belong in the checkpoint. Multistep schedulers are replaced by Euler on their own grid.

One expert's lanes (Wan 2.2) stay in its range: the end is the last step there, and the low-noise expert's lanes restart
where the teacher's trajectories enter its range, the high-noise expert being no student of this run.
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


class StudentLanes:
    """The lanes of one forward.

    Args:
        positions: their places among all lanes of a step, one for each sample of its global batch.
        store: teacher trajectories made with the same grid.
        timesteps [n], sigmas [n + 1]: the sampler's grid.
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
            self.entries = (first == first.max()).nonzero().flatten().tolist()  # trajectories that were kept from there
        start = store.draw(self.positions, seed, "lanes", prompts=prompts, device=device)
        self.x = start.x
        # [B] each, on the CPU: the step on the grid, the condition, how often the lane began anew
        self.step = self._steps_of(start)
        self.prompt, self.negative = start.prompt, start.negative
        self.restarts = torch.zeros(len(self.positions), dtype=torch.long)

    @property
    def timestep(self) -> torch.Tensor:
        """[B], what the model is given (1000 t)."""
        return self.timesteps[self.step].to(self.x.device)

    @property
    def sigma(self) -> torch.Tensor:
        """[B], the lanes' t."""
        return self.sigmas[self.step].to(self.x.device)

    @property
    def sigma_next(self) -> torch.Tensor:
        return self.sigmas[self.step + 1].to(self.x.device)

    @property
    def room(self) -> torch.Tensor:
        """[B], how far t can fall from the lanes' before it leaves the range of the student, or is 0."""
        return (self.sigma - self.expert.t_min).clamp_min(0)

    def conditions(self) -> Conditions:
        """What each lane is trained under; kept until the lane restarts."""
        return self.prompts.conditions(self.prompt, self.negative, self.x.device)

    @torch.no_grad()
    def advance(self, student: torch.nn.Module, u: torch.Tensor) -> None:
        """Move every lane one sampler step; u [B, ...] is the student's velocity at the lanes' states, as they are."""
        u = u.detach()
        if self.guidance_scale != 1:  # the sampler also needs the condition that was not evaluated
            other = self.prompts.conditions(self.prompt, ~self.negative, self.x.device)
            u_other = predict_velocity(student, self.x, self.timestep, other)
            flip = like(self.negative, u)
            u = guide(torch.where(flip, u_other, u), torch.where(flip, u, u_other), self.guidance_scale)
        self.x = self.x + like(self.sigma_next - self.sigma, u) * u
        self.step = self.step + 1
        finished = (self.step >= self.end) | ~self.x.isfinite().flatten(1).all(dim=1).cpu()
        for lane in finished.nonzero().flatten().tolist():
            self._restart(lane)

    def _restart(self, lane: int) -> None:
        self.restarts[lane] += 1
        name = (self.seed, "lane", self.positions[lane], int(self.restarts[lane]))
        if self.expert.name == "low_noise":
            trajectory = self.entries[stable_hash(*name, "trajectory") % len(self.entries)]
            state = trajectory * self.store.request["states_per_trajectory"]
            start = self.store.batch([state], self.prompts, self.x.device)
            self.x[lane], self.step[lane], self.prompt[lane] = start.x[0], self._steps_of(start)[0], start.prompt[0]
        else:
            self.x[lane] = draw_noise(tuple(self.x.shape[1:]), *name, "noise").to(self.x.device)
            self.step[lane] = 0
            self.prompt[lane] = stable_hash(*name, "prompt") % len(self.prompts)
        self.negative[lane] = stable_hash(*name, "negative") / 2**63 < self.negative_probability

    def _steps_of(self, states: StateBatch) -> torch.Tensor:
        return (states.timestep.cpu()[:, None] - self.timesteps).abs().argmin(dim=1)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: getattr(self, name) for name in STATE}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        for name in STATE:
            setattr(self, name, state[name].to(getattr(self, name).device, copy=True))  # restarts write in place
