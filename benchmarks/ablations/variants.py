"""Changes of the model that aren't in the library."""

import torch

from linvideo.models.branches import feature_weights, linear_branches
from linvideo.nn import LinearAttentionBranch
from linvideo.ops.reference import features, rotate


class RopeAfterBranch(LinearAttentionBranch):
    """A branch with RoPE on the features in place of q and k: o = R phi(q) (R phi(k))^T v / phi(q) z.

    R can make features negative, so the denominator is without it (Su et al., RoFormer, arXiv 2104.09864, equation 19).
    Each half of hedgehog's features is rotated like q itself.
    """

    def forward(self, q, k, v, rope=None, softmax_out=None, key_mask=None, group=None):
        if any(x is not None for x in (softmax_out, key_mask, group)):
            raise ValueError(
                "expected no mixture, key mask or context parallelism, which RoPE after the feature map doesn't support"
            )
        phi_q, phi_k = (features(x, w, None, self.feature_map) for x, w in ((q, self.q_weight), (k, self.k_weight)))
        rotated_q, rotated_k = (
            torch.cat([rotate(part, *rope) for part in phi.split(self.head_dim, dim=-1)], dim=-1)
            for phi in (phi_q, phi_k)
        )
        state = torch.einsum("bmhf,bmhd->bhfd", rotated_k, v)
        share = torch.einsum("bnhf,bhf->bnh", phi_q, phi_k.sum(1))
        return torch.einsum("bnhf,bhfd->bnhd", rotated_q, state) / (share[..., None] + 1e-6)


def rope_after(student: torch.nn.Module) -> None:
    """Make all linear branches of a student apply RoPE after the feature map."""
    for branch in linear_branches(student).values():
        branch.__class__ = RopeAfterBranch


def lora(student: torch.nn.Module) -> None:
    """Train only low-rank updates of the attention and feed-forward matrices, and the feature maps."""
    from peft import LoraConfig

    student.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
    student.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=targets))
    for weight in feature_weights(student).values():
        weight.requires_grad_(True)
