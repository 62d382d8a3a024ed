from types import SimpleNamespace

import pytest
import torch

from linvideo.nn import FEATURE_MAPS, Window, WindowAttentionBranch
from linvideo.ops.reference import activate

B, FRAMES, FRAME_TOKENS, H, D = 2, 4, 5, 2, 24


def qkv(scale: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, FRAMES * FRAME_TOKENS, H, D, generator=generator) for _ in range(3))
    return [scale * (x - x.mean(-1, keepdim=True)) for x in (q, k)] + [v]


@pytest.mark.parametrize("feature_map", ["hedgehog", "hedgehog_joint"])
def test_start_matches_softmax_attention_to_first_order(feature_map):
    q, k, v = qkv(scale=0.2)
    expected = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    branch = WindowAttentionBranch(H, D, feature_map, Window(chunk=1, overlap=0))
    assert set(branch.state_dict()) == {"q_weight", "k_weight", "log_gain"}
    start = (branch(q, k, v, FRAME_TOKENS) - expected).norm()
    with torch.no_grad():
        branch.log_gain += 1  # the far frames now weigh too much
    assert start < 0.03 * expected.norm() < 0.2 * (branch(q, k, v, FRAME_TOKENS) - expected).norm()


@pytest.mark.parametrize("feature_map", ["elu", "relu", "softmax"])
def test_start_of_the_maps_without_weights(feature_map):
    branch = WindowAttentionBranch(H, D, feature_map)
    assert set(branch.state_dict()) == {"log_gain"} and branch.log_gain.dtype == torch.float32
    q, k = torch.randn(2, 4096, D, generator=torch.Generator().manual_seed(0))
    mean = activate(q, feature_map).mean(0) @ activate(k, feature_map).mean(0)
    torch.testing.assert_close(branch.log_gain.exp() * mean, torch.ones(H), rtol=0.02, atol=0)


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_gradients_reach_all_parameters(feature_map):
    branch = WindowAttentionBranch(H, D, feature_map, Window(chunk=1, overlap=1, anchors=("last", "first")))
    branch(*qkv(), FRAME_TOKENS).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in branch.parameters())


def test_a_window_is_described_and_read_back():
    window = Window(chunk=1, overlap=2, anchors=("last", "first"))
    assert Window.of(window.settings()) == window == Window.of({**window.settings(), "anchors": ["first", "last"]})
    assert str(window) == "chunks of 1 latent frame, overlap 2, anchors first and last"
    assert str(Window.of({"causal": True})) == "chunks of 3 latent frames, overlap 1, causal"
    assert f"window={window}" in WindowAttentionBranch(H, D, window=window).extra_repr()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"chunk": 0}, "chunk must be an integer of at least 1, got 0"),
        ({"chunk": True}, "chunk must be"),
        ({"overlap": -1}, "overlap must be an integer of at least 0, got -1"),
        ({"overlap": 1.0}, "overlap must be"),
        ({"anchors": "first"}, "anchors must be a list"),
        ({"anchors": ["middle"]}, "anchors must be a list"),
        ({"anchors": ["first", "first"]}, "anchors must be a list"),
        ({"causal": 1}, "causal must be"),
        ({"causal": True, "anchors": ["last"]}, "last in a causal window"),
        ({"size": 3}, "any of chunk, overlap, anchors, causal"),
        ([3, 1], "must be a dictionary"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        Window.of(settings)
    assert "\n" not in str(error.value)


def test_context_parallelism_that_does_not_fit():
    """tests/models/test_families.py has what does fit, on two processes."""
    branch, group = WindowAttentionBranch(H, D), SimpleNamespace(size=lambda: 4)
    with pytest.raises(ValueError, match="that the context-parallel ranks divide in a window layer, got 2 heads on 4"):
        branch(*qkv(), FRAME_TOKENS, group=group)
    with pytest.raises(ValueError, match="no text tokens"):
        branch(*qkv(), FRAME_TOKENS, prefix_tokens=5, group=group)
