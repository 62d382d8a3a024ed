"""Changes of the model that the library does not have."""

import torch

from linvideo.models.branches import feature_weights, linear_branches
from linvideo.nn import LinearAttentionBranch
from linvideo.ops.reference import features, rotate


class RopeAfterBranch(LinearAttentionBranch):
    """RoPE on the features in place of q and k: o = R phi(q) (R phi(k))^T v / phi(q) z. R makes features negative, so
    the denominator goes without it (Su et al., RoFormer, arXiv 2104.09864, equation 19). Each half of hedgehog's
    features turns like q itself."""

    def forward(self, q, k, v, rope=None, softmax_out=None, group=None):
        if softmax_out is not None or group is not None:
            raise ValueError("RoPE after the feature map knows neither mixture nor context parallelism")
        phi_q, phi_k = (features(x, w, None, self.feature_map) for x, w in ((q, self.q_weight), (k, self.k_weight)))
        turned_q, turned_k = (
            torch.cat([rotate(part, *rope) for part in phi.split(self.head_dim, dim=-1)], dim=-1)
            for phi in (phi_q, phi_k)
        )
        state = torch.einsum("bmhf,bmhd->bhfd", turned_k, v)
        share = torch.einsum("bnhf,bhf->bnh", phi_q, phi_k.sum(1))
        return torch.einsum("bnhf,bhfd->bnhd", turned_q, state) / (share[..., None] + 1e-6)


def rope_after(student: torch.nn.Module) -> None:
    for branch in linear_branches(student).values():
        branch.__class__ = RopeAfterBranch


def lora(student: torch.nn.Module) -> None:
    """Only low-rank updates of the attention and feed-forward matrices train, and the feature maps."""
    from peft import LoraConfig

    student.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
    student.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=targets))
    for weight in feature_weights(student).values():
        weight.requires_grad_(True)
