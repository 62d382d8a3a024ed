"""What a model denoises a batch of states under: text, and for image-to-video models what the first frame says."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Conditions:
    """Of B states.

    Args:
        prompt_embeds: [B, L, E], of the text encoder.
        latents: [B, C, F, H, W], the channels an image-to-video model takes after the state's (the mask of given frames
            and the image's latents); None for text-to-video models.
        image_embeds: [B, N, D], of the image encoder; None for models without one.
    """

    prompt_embeds: torch.Tensor
    latents: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompt_embeds)

    def __getitem__(self, index: torch.Tensor | slice) -> "Conditions":
        """Those of some of the states."""
        parts = (self.prompt_embeds, self.latents, self.image_embeds)
        return Conditions(*(None if part is None else part[index] for part in parts))

    def model_inputs(self, x: torch.Tensor, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments of a Wan transformer's forward for the states x [B, C, F, H, W], all but the timestep."""
        inputs = {"hidden_states": x.to(dtype), "encoder_hidden_states": self.prompt_embeds.to(dtype)}
        if self.latents is not None:
            inputs["hidden_states"] = torch.cat([inputs["hidden_states"], self.latents.to(dtype)], dim=1)
        if self.image_embeds is not None:
            inputs["encoder_hidden_states_image"] = self.image_embeds.to(dtype)
        return inputs
