"""Linear attention in an attention module of your own, with gradients: python examples/op.py"""

import torch
from torch import nn

from linvideo.ops import linear_attn
from linvideo.ops.reference import linear_attn_reference


class LinearSelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_qkv, self.to_out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        # Hedgehog's feature map learns a matrix per head, one for the queries and one for the keys
        identity = torch.eye(dim // heads).repeat(heads, 1, 1)
        self.q_weight, self.k_weight = nn.Parameter(identity.clone()), nn.Parameter(identity.clone())

    def forward(self, x, attention=linear_attn):
        # [batch, tokens, heads, channels] each: strided views, which the op takes without a copy
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return self.to_out(attention(q, k, v, q_weight=self.q_weight, k_weight=self.k_weight).flatten(2))


device = "cuda" if torch.cuda.is_available() else "cpu"
module, x = LinearSelfAttention(dim=128, heads=4).to(device), torch.randn(2, 1000, 128, device=device)
out = module(x)
out.square().mean().backward()
gradients = [parameter.grad for parameter in module.parameters()]

# The reference is a few lines of PyTorch for any dtype: in float64 it shows how exact the op is
module.double().zero_grad()
exact = module(x.double(), attention=linear_attn_reference)
exact.square().mean().backward()
pairs = [(out, exact), *zip(gradients, [parameter.grad for parameter in module.parameters()], strict=True)]
for name, (ours, theirs) in zip(["output", *dict(module.named_parameters())], pairs, strict=True):
    error = ((ours - theirs).norm() / theirs.norm()).item()
    print(f"{name}: relative error {error:.1e}")
    assert error < 1e-4
