"""The linear branch of a self-attention layer, and its mixture with softmax attention.

In LinVideo's selective transfer (arXiv 2510.08318) each layer has one learnable scalar r in [0, 1]:

    o = r * softmax_attn(q, k, v) + (1 - r) * linear_attn(q, k, v)

The linear branch uses Hedgehog's feature map, phi(x) = [softmax(x W), softmax(-x W)], where W is a [D, D] matrix per
head, separate for q and k. q and k arrive after the layer's q/k norm, with RoPE applied or left to the op.
"""

import torch
from torch import nn

from linvideo.nn.collectives import all_reduce_sum
from linvideo.ops import linear_attn, linear_attn_apply, linear_attn_state
from linvideo.ops.reference import WEIGHTED_MAPS

# "identity" is missing on purpose: without positive features the normalised form is undefined.
FEATURE_MAPS = ("hedgehog", "hedgehog_joint", "elu", "relu", "softmax")


class LinearAttentionBranch(nn.Module):
    """Normalised linear attention with its feature weights and, if `mixed`, the mixing scalar r.

    Args:
        heads: Number of heads H.
        head_dim: Number of channels per head D, a multiple of 8 up to 128.
        feature_map: Name of the feature map, one of `FEATURE_MAPS`. Only the hedgehog maps have weights.
        mixed: Whether the branch owns `r` and can mix itself with softmax attention.
        r_init: Initial value of r in [0, 1]; 1 is softmax attention alone. The branch does not bound r during training:
            the trainer clamps it.

    All parameters are fp32: `q_weight` and `k_weight` [H, D, D], which the op casts to q's dtype, and `r` [1], which is
    not 0-dimensional because FSDP2 cannot shard a scalar. They are raw parameters rather than `nn.Linear`, so that
    quantizers, layerwise casting and LoRA target patterns leave them alone.

    W starts at s = D**0.25 times the identity. For small x, phi(q).phi(k) = (2/D) (1 + s^2 q'.k' / D + ...), where '
    subtracts the mean over channels. With this s, that is exp(q'.k' / sqrt(D)) to first order, so the layer starts as
    close to the softmax attention that it replaces as phi allows. For "hedgehog_joint" the product is
    (1/2D) (1 + 4 s^2 q.k / D + ...), and s is half as large.

    Raises:
        ValueError: A size, the feature map or r_init is outside the ranges above.
    """

    def __init__(
        self, heads: int, head_dim: int, feature_map: str = "hedgehog", mixed: bool = True, r_init: float = 0.8
    ):
        super().__init__()
        if heads < 1:
            raise ValueError(f"heads must be at least 1, got {heads}")
        if head_dim % 8 or not 8 <= head_dim <= 128:
            raise ValueError(f"head_dim must be a multiple of 8 up to 128, got {head_dim}")
        if feature_map not in FEATURE_MAPS:
            raise ValueError(f"feature_map must be one of {', '.join(FEATURE_MAPS)}, got {feature_map!r}")
        if not 0.0 <= r_init <= 1.0:
            raise ValueError(f"r_init must lie in [0, 1], got {r_init}")
        self.heads, self.head_dim, self.feature_map = heads, head_dim, feature_map

        self.register_parameter("q_weight", None)
        self.register_parameter("k_weight", None)
        if feature_map in WEIGHTED_MAPS:
            size = head_dim**0.25 * (0.5 if feature_map == "hedgehog_joint" else 1.0)
            start = size * torch.eye(head_dim, dtype=torch.float32)
            self.q_weight = nn.Parameter(start.repeat(heads, 1, 1))
            self.k_weight = nn.Parameter(start.repeat(heads, 1, 1))
        self.register_parameter("r", None)
        if mixed:
            self.r = nn.Parameter(torch.full((1,), float(r_init), dtype=torch.float32))

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor] | None = None,
        softmax_out: torch.Tensor | None = None,
        key_mask: torch.Tensor | None = None,
        group: torch.distributed.ProcessGroup | None = None,
    ) -> torch.Tensor:
        """Return linear attention over q, k, v, mixed with `softmax_out` if that is given.

        The mixing happens here and not in the attention processor, because offloading hooks place a module's parameters
        only around that module's own forward.

        Args:
            q, k, v: Queries, keys and values [B, N, H, D].
            rope: Rotary embedding (cos, sin), each [N, D/2]; None if q and k have been rotated already.
            softmax_out: Softmax attention of the same q, k and v, [B, N, H, D].
            key_mask: Bool [B, N], True for the keys that count and False for, say, the padding of a text. None keeps
                all keys.
            group: Ranks that hold the other tokens of the same samples (context parallelism). They exchange one sum of
                H F (D + 1) numbers per sample, whatever the sequence length.

        Returns:
            [B, N, H, D] in q's dtype.

        Raises:
            ValueError: `softmax_out` is given to a layer without r, or the op refuses an argument.
        """
        if softmax_out is not None and self.r is None:
            raise ValueError("expected no softmax_out in a layer that is linear, not mixed (it has no r), got one")
        mix = None if softmax_out is None else (softmax_out, self.r)
        queries = {"feature_map": self.feature_map, "q_weight": self.q_weight, "rope": rope, "mix": mix}
        if group is None:
            return linear_attn(q, k, v, k_weight=self.k_weight, key_mask=key_mask, **queries)
        keys = {"feature_map": self.feature_map, "k_weight": self.k_weight, "rope": rope, "key_mask": key_mask}
        state, z = linear_attn_state(k, v, **keys)
        total = all_reduce_sum(torch.cat([state, z.unsqueeze(-1)], dim=-1), group)
        return linear_attn_apply(q, total[..., :-1].contiguous(), total[..., -1].contiguous(), **queries)

    def drop_r(self) -> None:
        """Make a mixed branch linear, in place."""
        self.r = None

    def extra_repr(self) -> str:
        mixed = self.r is not None
        return f"heads={self.heads}, head_dim={self.head_dim}, feature_map={self.feature_map}, mixed={mixed}"
