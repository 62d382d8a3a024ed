"""The optional adversarial term (DMD2, section 4.3): a discriminator on the critic's features of noised samples.

It judges every token separately, so that ranks that share the tokens of a sample can each judge their own. Real samples
are the teacher's samples from the trajectory store, so that even this term needs no data but the teacher's.
"""

import torch
from torch import nn
from torch.nn.functional import softplus


class Discriminator(nn.Module):
    """[B, N, C] features -> [B, N] logits, positive for real."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.layers(features)[..., 0].float()


class Features:
    """Keep the output of block `layer` of `critic` from the last forward."""

    def __init__(self, critic: nn.Module, layer: int):
        self._kept: torch.Tensor | None = None
        critic.blocks[layer].register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, arguments: tuple, output: torch.Tensor) -> None:
        self._kept = output

    def take(self) -> torch.Tensor:
        kept, self._kept = self._kept, None
        return kept


def feature_layer(model: nn.Module, layer: int | None) -> int:
    """Return the block (0-based) whose output the discriminator reads, by default the middle one.

    Raises:
        ValueError: The model has no such block.
    """
    count = len(model.blocks)
    layer = count // 2 if layer is None else layer
    if not 0 <= layer < count:
        raise ValueError(f"dmd.adversarial_layer must lie in [0, {count - 1}], got {layer}")
    return layer


def attach_discriminator(critic: nn.Module, layer: int | None) -> Features:
    """Add a module `discriminator`, to be trained with the critic, to `critic`; return the source of its input.

    Raises:
        ValueError: See feature_layer.
    """
    layer = feature_layer(critic, layer)
    critic.discriminator = Discriminator(critic.config.num_attention_heads * critic.config.attention_head_dim)
    return Features(critic, layer)


def real_loss(logits: torch.Tensor) -> torch.Tensor:
    """Return the mean of -log sigmoid(logits), which is small if the logits say "real"."""
    return softplus(-logits).mean()


def fake_loss(logits: torch.Tensor) -> torch.Tensor:
    """Return the mean of -log (1 - sigmoid(logits))."""
    return softplus(logits).mean()
