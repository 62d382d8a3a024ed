"""Objectives that did worse or diverged and are therefore not in the library; kept here so that this can be repeated.

Except for "uniform_t", they use states of the student's own rollouts, as "adm" and "adm_step" do.
"""

import copy

import torch

from linvideo.distillation.dmd import critic_loss, matching_loss
from linvideo.distillation.rollout import noised
from linvideo.run.gradient import descend, mean_square, teacher_velocity
from linvideo.trajectories.conditions import Conditions
from linvideo.trajectories.flow import NUM_TRAIN_TIMESTEPS, like, predict_velocity
from linvideo.trajectories.seeding import generator
from linvideo.transfer.gradient_step import GradientStep
from linvideo.transfer.objectives import adm_gradient, sampler_step_end, score_weight, teacher_state_mse
from linvideo.transfer.rollouts import StudentRollouts

SCORE_NETS = ("adm_score_net", "dmd")


class AblationStep(GradientStep):
    """A GradientStep with one more kind of loss.

    adm_renoise: ADM at x_hat_t = (1 - t) x_0 + t eps, where x_0 is the student's one-step estimate and t is drawn anew
        from the sampler's grid. The student's score is its own.
    adm_score_net: ADM at the end of a sampler step, like "adm_step", but the student's score comes from a separate
        network. It is trained on the samples at the end of rollouts, one step for each step of the student.
    dmd: Distribution matching at the one-step estimate of x_0 (Yin et al., arXiv 2311.18828). A score network is
        trained on these estimates, and the gradient is normalised by the distance to the teacher's estimate.
    own_mse_for_adm: The configured objective, with "own_mse" in place of "adm".
    uniform_t: The configured objective, but "mse" draws its states so that t is uniform; the sampler's grid has more
        large t.
    """

    def __init__(self, kind: str | None, student, teacher, store, prompts, grid, *arguments):
        super().__init__(student, teacher, store, prompts, grid, *arguments)
        self.kind, self.sigmas = kind, grid[1]
        if kind in SCORE_NETS:
            self.score_net = (
                copy.deepcopy(self.teacher).float().requires_grad_(True)
            )  # in bf16 small updates would be lost
            self.score_optimizer = torch.optim.AdamW(
                self.score_net.parameters(), lr=self.config.optimizer.learning_rate, weight_decay=0.0
            )
        if kind == "adm_score_net":
            self.all_rollouts = [RecordingRollouts(rollouts, self.store) for rollouts in self.all_rollouts]

    @property
    def rollouts(self) -> StudentRollouts:
        """The rollouts of the only micro-batch: ablations run in one process with one micro-batch per step."""
        return self.all_rollouts[0]

    def _loss(self, name: str, step: int, micro: int) -> torch.Tensor:
        if self.kind == "uniform_t" and name == "mse":
            return teacher_state_mse(self.student, self._uniform_t(step))
        if self.kind == "own_mse_for_adm" and name == "adm":
            name = "own_mse"
        if self.kind in (None, "own_mse_for_adm", "uniform_t"):
            return super()._loss(name, step, micro)
        draws = generator(self.config.seed, self.stage, self.kind, step)
        return getattr(self, f"_{self.kind}")(draws)

    def _adm_renoise(self, draws: torch.Generator) -> torch.Tensor:
        rollouts, conditions = self.rollouts, self.rollouts.conditions()
        u = predict_velocity(self.student, rollouts.x, rollouts.timestep, conditions)
        clean = rollouts.x - like(rollouts.sigma, u) * u
        t, noise = self._t_and_noise(clean, draws)
        loss = self._adm(noised(clean, t, noise), t, conditions, self.student)
        rollouts.advance(self.student, u)
        return loss

    def _adm_score_net(self, draws: torch.Generator) -> torch.Tensor:
        rollouts, conditions = self.rollouts, self.rollouts.conditions()
        t = sampler_step_end(rollouts)
        u = predict_velocity(self.student, rollouts.x, rollouts.timestep, conditions)
        loss = self._adm(rollouts.x - like(rollouts.sigma - t, u) * u, t, conditions, self.score_net)
        rollouts.advance(self.student, u)
        self._fit_score_net(*rollouts.samples(self.config.train_batch_size, draws), draws)
        return loss

    def _adm(self, x_hat: torch.Tensor, t: torch.Tensor, conditions: Conditions, judge) -> torch.Tensor:
        """Return ADM's loss at a state of the student, with `judge` as the network for the student's score."""
        with torch.no_grad():
            u_teacher = teacher_velocity(self.teacher, x_hat, NUM_TRAIN_TIMESTEPS * t, conditions)
            u_judge = predict_velocity(judge, x_hat, NUM_TRAIN_TIMESTEPS * t, conditions)
        gradient = adm_gradient(u_teacher, u_judge, score_weight(t, self.objective.weight_clip))
        return descend(x_hat, gradient, mean_square(u_teacher, u_judge))

    def _dmd(self, draws: torch.Generator) -> torch.Tensor:
        rollouts, conditions = self.rollouts, self.rollouts.conditions()
        u = predict_velocity(self.student, rollouts.x, rollouts.timestep, conditions)
        clean = rollouts.x - like(rollouts.sigma, u) * u
        t, noise = self._t_and_noise(clean, draws)
        x = noised(clean, t, noise)
        with torch.no_grad():
            u_real, u_fake = (
                predict_velocity(model, x, NUM_TRAIN_TIMESTEPS * t, conditions)
                for model in (self.teacher, self.score_net)
            )
        rollouts.advance(self.student, u)
        self._fit_score_net(clean.detach(), conditions, draws)
        return matching_loss(clean, x, t, u_fake, u_real)

    def _t_and_noise(self, clean: torch.Tensor, draws: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw t, from the grid without its ends, and noise for each sample."""
        grid = self.sigmas[1:-1]
        t = grid[torch.randint(len(grid), (len(clean),), generator=draws)].to(clean.device)
        return t, torch.randn(clean.shape, generator=draws).to(clean.device)

    def _fit_score_net(self, clean: torch.Tensor, conditions: Conditions, draws: torch.Generator) -> None:
        """Train the score network with one step of flow matching on samples of the student."""
        torch.clear_autocast_cache()  # it may hold weights of the network that were cast without gradients
        loss = critic_loss(self.score_net, clean, *self._t_and_noise(clean, draws), conditions)
        self.score_optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.score_net.parameters(), self.config.optimizer.max_grad_norm)
        self.score_optimizer.step()

    def _uniform_t(self, step: int):
        """Draw teacher states; the probability of a sampler step is proportional to the range of t that it covers."""
        draws = generator(self.config.seed, self.stage, "uniform t", step)
        count, kept = self.config.train_batch_size, self.store.request["states_per_trajectory"]
        kept_step = torch.multinomial(-self.sigmas.diff(), count, replacement=True, generator=draws)
        trajectory = torch.randint(self.store.request["num_trajectories"], (count,), generator=draws)
        return self.store.batch((trajectory * kept + kept_step).tolist(), self.prompts, self.student.device)


class RecordingRollouts(StudentRollouts):
    """Rollouts that keep their last `kept` final samples; at first these are the teacher's."""

    def __init__(self, rollouts: StudentRollouts, store, kept: int = 64):
        self.__dict__.update(rollouts.__dict__)
        states = store.request["states_per_trajectory"]
        last = [states - 1 + states * (i % store.request["num_trajectories"]) for i in range(kept)]
        batch = store.batch(last, self.prompts, self.x.device)
        self.ended = batch.x - like(batch.t, batch.u) * batch.u
        self.ended_prompt, self.ended_negative, self.next = batch.prompt, batch.negative, 0

    def _restart(self, index: int) -> None:
        if self.x[index].isfinite().all():
            slot = self.next % len(self.ended)
            self.ended[slot] = self.x[index]
            self.ended_prompt[slot], self.ended_negative[slot] = self.prompt[index], self.negative[index]
            self.next += 1
        super()._restart(index)

    def samples(self, count: int, draws: torch.Generator) -> tuple[torch.Tensor, Conditions]:
        """Draw `count` of the kept samples; returns them with their conditions."""
        chosen = torch.randint(len(self.ended), (count,), generator=draws)
        under = self.prompts.conditions(self.ended_prompt[chosen], self.ended_negative[chosen], self.x.device)
        return self.ended[chosen.to(self.x.device)], under
