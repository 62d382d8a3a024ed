"""The conditions of a batch of states: the text, and for image-to-video models the first frame."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Conditions:
    """The conditions of B states.

    Args:
        prompt_embeds: Output of the text encoder [B, L, E].
        latents: Channels that an image-to-video model reads after those of the state [B, C, F, H, W]: the mask of given
            frames and the latents of the image. None for text-to-video models.
        image_embeds: Output of the image encoder [B, N, D]; None for models without one.
    """

    prompt_embeds: torch.Tensor
    latents: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompt_embeds)

    def __getitem__(self, index: torch.Tensor | slice) -> "Conditions":
        """The conditions of some of the states."""
        parts = (self.prompt_embeds, self.latents, self.image_embeds)
        return Conditions(*(None if part is None else part[index] for part in parts))

    def model_inputs(self, x: torch.Tensor, dtype: torch.dtype) -> dict[str, Any]:
        """Return the arguments of a Wan transformer's forward for states x [B, C, F, H, W], except for the timestep."""
        inputs = {"hidden_states": x.to(dtype), "encoder_hidden_states": self.prompt_embeds.to(dtype)}
        if self.latents is not None:
            inputs["hidden_states"] = torch.cat([inputs["hidden_states"], self.latents.to(dtype)], dim=1)
        if self.image_embeds is not None:
            inputs["encoder_hidden_states_image"] = self.image_embeds.to(dtype)
        return inputs
