"""One training step's gradient: which objective, on which states, over how many micro-batches."""

import torch

from linvideo.training import objectives
from linvideo.training.config import TrainConfig
from linvideo.training.lanes import StudentLanes
from linvideo.training.objectives import ObjectiveConfig
from linvideo.training.prompts import PromptEmbeddings
from linvideo.training.seeding import generator
from linvideo.training.store import TrajectoryStore


class GradientStep:
    """Calls add a step's gradient to the student's parameters; devices are the models' own.

    Args:
        grid: (timesteps, sigmas) of the sampler the trajectories were made with.
        stage: names the draws. objective: names the loss.
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
    ):
        self.student, self.teacher, self.store, self.prompts = student, teacher, store, prompts
        self.config, self.stage, self.objective = config, stage, objective
        self.lanes = None
        if objective.name != "mse":
            self.lanes = StudentLanes(config.train_batch_size, store, prompts, *grid, config.seed, student.device)

    def __call__(self, step: int) -> tuple[str, float]:
        """(name of the objective at `step`, mean loss over the micro-batches)."""
        name, count = self.objective.at(step), self.config.gradient_accumulation_steps
        total = torch.zeros((), device=self.student.device)
        for micro in range(count):
            with autocast(self.config, self.student.device):
                loss = self._loss(name, step * count + micro)
            (loss / count).backward()
            total += loss.detach() / count
        return name, float(total)

    def _loss(self, name: str, draw: int) -> torch.Tensor:
        if name == "mse":
            draws = (self.config.seed, self.stage, draw)
            batch = self.store.draw(
                self.config.train_batch_size, *draws, prompts=self.prompts, device=self.student.device
            )
            return objectives.teacher_state_mse(self.student, batch)
        if name == "own_mse":
            return objectives.own_state_mse(self.student, self.teacher, self.lanes)
        if name == "adm_step":
            return objectives.adm_sampler_step(self.student, self.teacher, self.lanes, self.objective)
        share = torch.rand(self.config.train_batch_size, generator=generator(self.config.seed, self.stage, "dt", draw))
        # in (0, 1] of the largest step, which leaves t at least half of sigma
        dt = (1 - share).to(self.student.device) * (self.lanes.sigma / 2).clamp_max(self.objective.max_dt)
        return objectives.adm_small_step(self.student, self.teacher, self.lanes, dt, self.objective)

    def state_dict(self) -> dict:
        return {} if self.lanes is None else {"lanes": self.lanes.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        if self.lanes is not None:
            self.lanes.load_state_dict(state["lanes"])


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16")
