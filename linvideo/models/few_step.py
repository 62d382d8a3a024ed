"""The scheduler of a distilled model (DMD2, Yin et al., arXiv 2405.14867).

At each of a few fixed timesteps it jumps to x_0, which is then noised for the next one.
"""

import json
import zlib
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor


class FewStepScheduler(FlowMatchEulerDiscreteScheduler):
    """Scheduler with the step x' = (1 - t') (x - t u) + t' eps at fixed timesteps; the last step returns x_0.

    Each row of a batch has its own generator, which is seeded with the row's first sample. So the `generator` or
    `latents` of a call decide a row's whole video, whatever else is in the batch. (Pipelines pass no generator to a
    scheduler.)

    Args:
        timesteps: Decreasing timesteps 1000 t, from at most num_train_timesteps to more than 0.
        num_train_timesteps: Timestep that corresponds to t = 1.

    Raises:
        ValueError: The timesteps do not decrease within (0, num_train_timesteps], or sampling asks for another number
            of steps.
    """

    @register_to_config
    def __init__(self, timesteps: list[float] = (1000.0, 750.0, 500.0, 250.0), num_train_timesteps: int = 1000):
        expected = f"timesteps must fall from at most {num_train_timesteps} to more than 0"
        timesteps = [float(t) for t in timesteps]
        falls = all(a > b for a, b in zip(timesteps, timesteps[1:], strict=False))
        if not timesteps or not falls or not 0 < timesteps[-1] <= timesteps[0] <= num_train_timesteps:
            raise ValueError(f"{expected}, got {timesteps}")
        super().__init__(num_train_timesteps=num_train_timesteps, stochastic_sampling=True)
        self.register_to_config(timesteps=timesteps)
        self._generators: list[torch.Generator] | None = None  # one per row

    def to_json_string(self) -> str:
        """Return this class's own arguments only: loading would report those of the base class as unknown."""
        config = json.loads(super().to_json_string())
        own = {"_class_name", "_diffusers_version", "timesteps", "num_train_timesteps"}
        return json.dumps({name: value for name, value in config.items() if name in own}, indent=2) + "\n"

    @property
    def num_steps(self) -> int:
        return len(self.config.timesteps)

    def set_timesteps(self, num_inference_steps: int | None = None, device: str | torch.device | None = None) -> None:
        """Set the fixed timesteps; raise ValueError if num_inference_steps is neither None nor `num_steps`."""
        if num_inference_steps not in (None, self.num_steps):
            raise ValueError(f"this model was distilled to {self.num_steps} steps, got {num_inference_steps}")
        sigmas = [t / self.config.num_train_timesteps for t in self.config.timesteps]
        super().set_timesteps(sigmas=sigmas, device=device)
        self._generators = None

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[torch.Tensor]:
        """Do one step, computed in fp32 and returned in model_output's dtype."""
        if self.step_index is None:
            self._init_step_index(timestep)
        if self._generators is None:
            rows = sample.detach().float().cpu().numpy()
            self._generators = [torch.Generator().manual_seed(zlib.crc32(row.tobytes())) for row in rows]
        sigma, sigma_next = self.sigmas[self.step_index], self.sigmas[self.step_index + 1]
        clean = sample.float() - sigma * model_output.float()
        noise = randn_tensor(clean.shape, generator or self._generators, clean.device, torch.float32)
        result = ((1 - sigma_next) * clean + sigma_next * noise).to(model_output.dtype)
        self._step_index += 1
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=result) if return_dict else (result,)

    def stock(self) -> FlowMatchEulerDiscreteScheduler:
        """Return diffusers' own scheduler with the same timesteps, for folders that should load without linvideo.

        Its noise comes from torch's global generator, so a generator or latents do not reproduce a video.

        Raises:
            ValueError: The timesteps are not evenly spaced from num_train_timesteps down, which that scheduler needs.
        """
        terminal = self.config.timesteps[-1] / self.config.num_train_timesteps
        scheduler = FlowMatchEulerDiscreteScheduler(shift_terminal=terminal, stochastic_sampling=True)
        scheduler.set_timesteps(self.num_steps)
        wanted = torch.tensor(self.config.timesteps)
        if scheduler.timesteps.shape != wanted.shape or not torch.allclose(scheduler.timesteps, wanted, atol=1e-2):
            raise ValueError(
                f"diffusers' scheduler needs evenly spaced timesteps from {self.config.num_train_timesteps} down, got"
                f" {self.config.timesteps}"
            )
        return scheduler


def own_settings(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """Return the arguments that a distilled pipeline must be called with; for other pipelines, none.

    They are its number of steps and guidance_scale=1, since guidance is in its weights.
    """
    scheduler = pipeline.scheduler
    few = isinstance(scheduler, FewStepScheduler)
    return {"num_inference_steps": scheduler.num_steps, "guidance_scale": 1.0} if few else {}
