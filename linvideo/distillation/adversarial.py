"""The optional adversarial term (DMD2, section 4.3): a discriminator on the critic's features of noised samples.

It judges every token by itself, so that ranks that share a sample's tokens each judge their own. Real samples are the
teacher's, from the trajectory store: still nothing but the teacher's own data.
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
    """Keeps what block number `layer` of `critic` gave in the last forward."""

    def __init__(self, critic: nn.Module, layer: int):
        self._kept: torch.Tensor | None = None
        critic.blocks[layer].register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, arguments: tuple, output: torch.Tensor) -> None:
        self._kept = output

    def take(self) -> torch.Tensor:
        kept, self._kept = self._kept, None
        return kept


def feature_layer(model: nn.Module, layer: int | None) -> int:
    """The block to read, the middle one for None.

    Raises:
        ValueError: there is no such layer.
    """
    count = len(model.blocks)
    layer = count // 2 if layer is None else layer
    if not 0 <= layer < count:
        raise ValueError(f"dmd.adversarial_layer must lie in [0, {count - 1}], got {layer}")
    return layer


def attach_discriminator(critic: nn.Module, layer: int | None) -> Features:
    """Give `critic` a module `discriminator` that trains with it; returns where its input is to be had.

    Raises:
        ValueError: see feature_layer.
    """
    layer = feature_layer(critic, layer)
    critic.discriminator = Discriminator(critic.config.num_attention_heads * critic.config.attention_head_dim)
    return Features(critic, layer)


def real_loss(logits: torch.Tensor) -> torch.Tensor:
    """-log sigmoid(logits), mean: small where they say "real"."""
    return softplus(-logits).mean()


def fake_loss(logits: torch.Tensor) -> torch.Tensor:
    """-log (1 - sigmoid(logits)), mean."""
    return softplus(logits).mean()
