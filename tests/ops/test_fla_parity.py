"""hedgehog_joint is flash-linear-attention's HedgehogFeatureMap, whose bias starts at 0."""

import pytest
import torch

from linvideo.ops import linear_attn
from linvideo.ops.reference import features

feature_map = pytest.importorskip("fla.modules.feature_map", reason="needs flash-linear-attention")


@pytest.mark.filterwarnings("ignore")
def test_hedgehog_joint_is_that_of_fla():
    """The features and the attention computed from them agree; fla's linear layer is x @ weight.T."""
    torch.manual_seed(0)
    maps = [feature_map.HedgehogFeatureMap(16) for _ in range(2)]
    with torch.no_grad():
        for each in maps:
            assert not each.layer.bias.any()
            each.layer.weight += 0.3 * torch.randn(16, 16)
    q, k, v = torch.randn(3, 2, 20, 1, 16)
    weights = [each.layer.weight.T[None] for each in maps]
    phi_q, phi_k = (each(x) for each, x in zip(maps, (q, k), strict=True))
    torch.testing.assert_close(features(q, weights[0], None, "hedgehog_joint"), phi_q)
    scores = torch.einsum("bnhf,bmhf->bhnm", phi_q, phi_k)
    expected = torch.einsum("bhnm,bmhd->bnhd", scores / scores.sum(-1, keepdim=True), v)
    out = linear_attn(q, k, v, feature_map="hedgehog_joint", q_weight=weights[0], k_weight=weights[1])
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
