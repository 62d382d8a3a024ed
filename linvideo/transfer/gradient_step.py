"""The gradient of one training step: its objective, on its states, over all micro-batches."""

import torch

from linvideo.run.gradient import accumulate
from linvideo.run.parallel import Ranks
from linvideo.trajectories.prompts import PromptEmbeddings
from linvideo.trajectories.seeding import generator
from linvideo.trajectories.store import TrajectoryStore
from linvideo.transfer import objectives
from linvideo.transfer.objectives import ObjectiveConfig
from linvideo.transfer.rollouts import StudentRollouts
from linvideo.transfer.train_config import TrainConfig


class GradientStep:
    """Add the gradient of a step to the student's parameters at each call.

    A step sees one global batch: gradient_accumulation_steps micro-batches of train_batch_size samples on each data
    rank. Every random draw belongs to the position of a sample in it. A different number of ranks, with a different
    number of micro-batches each, therefore trains on the same samples.

    Args:
        student: The model to train.
        teacher: The teacher, called like the student.
        store: The teacher's trajectories.
        prompts: Embeddings of the prompts.
        grid: Timesteps and sigmas of the sampler that the trajectories were made with.
        config: The options of the run.
        stage: Name of the stage, which is part of the seed of all draws.
        objective: The loss.
        ranks: The ranks of the run. None means this process alone.
    """

    def __init__(
        self,
        student: torch.nn.Module,
        teacher: torch.nn.Module,
        store: TrajectoryStore,
        prompts: PromptEmbeddings,
        grid: tuple[torch.Tensor, torch.Tensor],
        config: TrainConfig,
        stage: str,
        objective: ObjectiveConfig,
        ranks: Ranks | None = None,
    ):
        self.student, self.teacher, self.store, self.prompts = student, teacher, store, prompts
        self.config, self.stage, self.objective = config, stage, objective
        self.ranks = Ranks.alone(student.device) if ranks is None else ranks
        self.micro_batches = range(config.gradient_accumulation_steps)
        self.all_rollouts: list[StudentRollouts] = []  # one for each micro-batch
        if objective.name != "mse":
            arguments = (store, prompts, *grid, config.seed, student.device)
            self.all_rollouts = [StudentRollouts(self.positions(micro), *arguments) for micro in self.micro_batches]

    @property
    def global_batch(self) -> int:
        return self.config.global_batch(self.ranks.size)

    def positions(self, micro: int) -> range:
        return self.ranks.micro_batch(micro, self.config.train_batch_size)

    def __call__(self, step: int) -> tuple[str, float]:
        """Add the gradient of the global batch. Returns the name of the objective at `step` and the mean loss."""
        name = self.objective.at(step)
        return name, accumulate(lambda micro: self._loss(name, step, micro), self.student, self.config, self.ranks)

    def _loss(self, name: str, step: int, micro: int) -> torch.Tensor:
        positions, draws = self.positions(micro), (self.config.seed, self.stage)
        if name == "mse":
            batch = self.store.draw(positions, *draws, step, prompts=self.prompts, device=self.student.device)
            return objectives.teacher_state_mse(self.student, batch)
        rollouts = self.all_rollouts[micro]
        if name == "own_mse":
            return objectives.own_state_mse(self.student, self.teacher, rollouts)
        if name == "adm_step":
            return objectives.adm_sampler_step(self.student, self.teacher, rollouts, self.objective)
        share = torch.rand(self.global_batch, generator=generator(*draws, "dt", step))[list(positions)]
        # a share in (0, 1] of the largest step, which is at most half of the margin
        dt = (1 - share).to(self.student.device) * (rollouts.margin / 2).clamp_max(self.objective.max_dt)
        return objectives.adm_small_step(self.student, self.teacher, rollouts, dt, self.objective)

    def state_dict(self) -> dict:
        """Return the rollouts of all ranks, in the order of the global batch."""
        if not self.all_rollouts:
            return {}
        states = [rollouts.state_dict() for rollouts in self.all_rollouts]
        mine = {name: torch.stack([state[name] for state in states]) for name in states[0]}  # [micro, B, ...]
        every = {name: self.ranks.gather_samples(part) for name, part in mine.items()}  # [rank, micro, B, ...]
        # stored checkpoints have this key, an earlier word for rollouts
        return {"lanes": {name: part.transpose(0, 1).flatten(0, 2) for name, part in every.items()}}

    def load_state_dict(self, state: dict) -> None:
        for rollouts in self.all_rollouts:
            rollouts.load_state_dict({name: part[rollouts.positions] for name, part in state["lanes"].items()})
