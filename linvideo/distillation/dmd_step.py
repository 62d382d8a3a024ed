"""One step of distribution matching: the gradients of student and critic over a global batch.

As everywhere in training, each random draw (prompt, noise, t, and the step of the rollout that is trained) belongs to
the position of a sample in the global batch.
"""

from collections.abc import Callable

import torch

from linvideo.distillation.adversarial import Features, fake_loss, real_loss
from linvideo.distillation.distill_config import DistillConfig
from linvideo.distillation.dmd import critic_loss, draw_t, guided_velocity, matching_loss
from linvideo.distillation.rollout import jump, noised, states_at
from linvideo.run.gradient import accumulate
from linvideo.run.parallel import Ranks
from linvideo.trajectories.conditions import Conditions
from linvideo.trajectories.flow import NUM_TRAIN_TIMESTEPS, predict_velocity
from linvideo.trajectories.prompts import PromptEmbeddings
from linvideo.trajectories.seeding import draw_indices, draw_noise, generator
from linvideo.trajectories.store import TrajectoryStore

STAGE = "dmd"


class DmdStep:
    """Compute the gradients of the steps. The optimizers belong to the caller.

    Args:
        student: The few-step student.
        teacher: The teacher, called like the student.
        critic: The critic, with a discriminator if `features` is given.
        prompts: Embeddings of the prompts.
        shape: Shape (C, F, H, W) of a sample.
        flow_shift: Shift of the distribution of t.
        config: The options of the run.
        features: Input of the discriminator. None for a run without one.
        store: Trajectories with the real samples that the discriminator learns from.
        ranks: The ranks of the run. None means this process alone.
    """

    def __init__(
        self,
        student: torch.nn.Module,
        teacher: Callable,
        critic: torch.nn.Module,
        prompts: PromptEmbeddings,
        shape: tuple[int, ...],
        flow_shift: float,
        config: DistillConfig,
        features: Features | None = None,
        store: TrajectoryStore | None = None,
        ranks: Ranks | None = None,
    ):
        self.student, self.teacher, self.critic, self.prompts, self.shape = student, teacher, critic, prompts, shape
        self.flow_shift, self.config, self.features, self.store = flow_shift, config, features, store
        self.ranks = Ranks.alone(student.device) if ranks is None else ranks
        self.sigmas = torch.tensor(config.scheduler().config.timesteps) / NUM_TRAIN_TIMESTEPS
        self.samples: dict[int, torch.Tensor] = {}  # micro-batch -> samples from the student's turn

    def student_gradient(self, step: int) -> float:
        """Add the student's gradient of step `step` and return the mean loss.

        An adversarial term leaves gradients in the critic, too, which the caller has to clear.
        """
        return accumulate(lambda micro: self._student_loss(step, micro), self.student, self.config, self.ranks)

    def critic_gradient(self, step: int) -> float:
        """Add the critic's gradient of step `step` and return the mean loss.

        It uses the samples of the student's turn if there was one in this step, otherwise new ones.
        """
        loss = accumulate(lambda micro: self._critic_loss(step, micro), self.critic, self.config, self.ranks)
        self.samples.clear()
        return loss

    def _student_loss(self, step: int, micro: int) -> torch.Tensor:
        positions, (prompt, conditions) = self._positions(micro), self._prompts(step, micro)
        clean = self._roll_out(step, micro, conditions)
        self.samples[micro] = clean.detach()
        t, noise = self._t_and_noise(step, positions, "student")
        x = noised(clean, t, noise)
        with torch.set_grad_enabled(self.features is not None):
            u_fake = predict_velocity(self.critic, x, NUM_TRAIN_TIMESTEPS * t, conditions)
        negative = self.prompts.conditions(prompt, torch.ones_like(prompt, dtype=torch.bool), clean.device)
        scale = self.config.trajectories.guidance_scale
        u_real = guided_velocity(self.teacher, x.detach(), t, conditions, negative, scale)
        loss = matching_loss(clean, x, t, u_fake, u_real)
        return loss if self.features is None else loss + self._adversarial(real_loss, u_fake)

    def _critic_loss(self, step: int, micro: int) -> torch.Tensor:
        positions, (_, conditions) = self._positions(micro), self._prompts(step, micro)
        if micro in self.samples:
            clean = self.samples[micro]
        else:
            with torch.no_grad():
                clean = self._roll_out(step, micro, conditions)
        t, noise = self._t_and_noise(step, positions, "critic")
        loss = critic_loss(self.critic, clean, t, noise, conditions)
        if self.features is None:
            return loss
        loss = loss + self._adversarial(fake_loss)
        draws = (self.config.seed, STAGE, step, "real")
        trajectories = draw_indices(self.store.request["num_trajectories"], positions, *draws)
        real, conditions = self.store.samples(trajectories, self.prompts, clean.device)
        u = predict_velocity(self.critic, noised(real, t, noise), NUM_TRAIN_TIMESTEPS * t, conditions)
        return loss + self._adversarial(real_loss, u)

    def _adversarial(
        self, judge: Callable[[torch.Tensor], torch.Tensor], u: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the weighted loss of the discriminator on the critic's last forward.

        u is the velocity of that forward, unless another loss depends on it already.
        """
        mine = self.config.dmd.adversarial_weight * judge(self.critic.discriminator(self.features.take()))
        # the other losses are those of whole samples, this one only of the tokens that this rank holds
        shared = mine / self.ranks.context_size
        loss = shared + (mine - shared).detach()
        # The gradient of the features needs the critic's outermost weights. FSDP2 gathers them when u gets a gradient.
        return loss if u is None else loss + 0 * u.sum()

    def _roll_out(self, step: int, micro: int, conditions: Conditions) -> torch.Tensor:
        """Return x_0 [B, C, F, H, W] of one jump from the student's own states, with gradient if that is enabled."""
        positions = self._positions(micro)
        index = torch.tensor(draw_indices(len(self.sigmas), positions, self.config.seed, STAGE, step, "index"))
        x = states_at(self.student, self.sigmas, index, lambda k: self._noise(step, positions, f"step {k}"), conditions)
        return jump(self.student, x, self.sigmas[index].to(x.device), conditions)

    # Draws.

    def _positions(self, micro: int) -> range:
        return self.ranks.micro_batch(micro, self.config.train_batch_size)

    def _prompts(self, step: int, micro: int) -> tuple[torch.Tensor, Conditions]:
        draws = (self.config.seed, STAGE, step, "prompt")
        prompt = torch.tensor(draw_indices(len(self.prompts), self._positions(micro), *draws))
        return prompt, self.prompts.conditions(prompt, device=self.student.device)

    def _noise(self, step: int, positions: range, purpose: str) -> torch.Tensor:
        name = (self.config.seed, STAGE, step, purpose)
        return torch.stack([draw_noise(self.shape, *name, p) for p in positions]).to(self.student.device)

    def _t_and_noise(self, step: int, positions: range, whose: str) -> tuple[torch.Tensor, torch.Tensor]:
        draws = generator(self.config.seed, STAGE, step, f"t of the {whose}")
        uniform = torch.rand(self.config.global_batch(self.ranks.size), generator=draws)[list(positions)]
        t = draw_t(uniform, self.flow_shift, self.config.dmd.t_min, self.config.dmd.t_max)
        return t.to(self.student.device), self._noise(step, positions, f"noise of the {whose}")
