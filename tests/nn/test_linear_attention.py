import pytest
import torch
from safetensors.torch import load, save

from linvideo.nn import FEATURE_MAPS, LinearAttentionBranch

B, N, H, D = 2, 17, 2, 24


def qkv(scale: float = 1.0, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, N, H, D, generator=generator) for _ in range(3))
    return [(scale * q).to(dtype), (scale * k).to(dtype), v.to(dtype)]


def softmax_attention(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def randomized(branch: LinearAttentionBranch, seed: int = 0) -> LinearAttentionBranch:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in (branch.q_weight, branch.k_weight):
            weight += 0.3 * torch.randn(weight.shape, generator=generator)
    return branch


def test_hedgehog_follows_the_formula():
    branch = randomized(LinearAttentionBranch(H, D))
    q, k, v = (x.double() for x in qkv())

    def phi(x, weight):
        y = torch.einsum("bnhd,hde->bnhe", x, weight.double())
        return torch.cat([y.softmax(-1), (-y).softmax(-1)], dim=-1)

    scores = torch.einsum("bnhf,bmhf->bhnm", phi(q, branch.q_weight), phi(k, branch.k_weight))
    expected = torch.einsum("bhnm,bmhd->bnhd", scores / scores.sum(-1, keepdim=True), v)
    out = branch(q.float(), k.float(), v.float())
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_only_the_hedgehog_maps_have_weights(feature_map):
    branch = LinearAttentionBranch(H, D, feature_map=feature_map)
    names = {"q_weight", "k_weight", "r"} if feature_map.startswith("hedgehog") else {"r"}
    assert set(branch.state_dict()) == names
    assert branch.r.shape == (1,) and {p.dtype for p in branch.parameters()} == {torch.float32}
    assert branch(*qkv()).shape == (B, N, H, D)


@pytest.mark.parametrize("feature_map", ["hedgehog", "hedgehog_joint"])
def test_start_matches_softmax_attention_to_first_order(feature_map):
    q, k, v = qkv(scale=0.05)
    q = q - q.mean(-1, keepdim=True)  # a softmax over channels does not see their mean
    mean = v.mean(1, keepdim=True)  # both attentions give the mean at scale 0; compare how they leave it
    expected = softmax_attention(q, k, v) - mean
    branch = LinearAttentionBranch(H, D, feature_map=feature_map)
    assert (branch(q, k, v) - mean - expected).norm() < 0.05 * expected.norm()
    with torch.no_grad():  # an unscaled identity is far from it
        for weight in (branch.q_weight, branch.k_weight):
            weight /= D**0.25
    assert (branch(q, k, v) - mean - expected).norm() > 0.5 * expected.norm()


def test_weights_are_not_tied():
    branch = LinearAttentionBranch(H, D)
    saved = load(save(dict(branch.state_dict())))  # safetensors refuses tensors that share memory
    assert torch.equal(saved["q_weight"], saved["k_weight"])
    with torch.no_grad():
        branch.q_weight.zero_()
    assert branch.k_weight.abs().sum() > 0


def test_rope_is_applied_before_the_map():
    q, k, v = qkv()
    angles = torch.rand(N, D // 2, generator=torch.Generator().manual_seed(1))
    rope = angles.cos(), angles.sin()
    branch = randomized(LinearAttentionBranch(H, D))
    rotated = [
        torch.view_as_real(
            torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones(()), angles)[:, None]
        ).flatten(-2)
        for x in (q, k)
    ]
    torch.testing.assert_close(branch(q, k, v, rope=rope), branch(*rotated, v))


def test_mixing():
    q, k, v = qkv()
    softmax_out = softmax_attention(q, k, v)
    branch = randomized(LinearAttentionBranch(H, D, r_init=0.8))
    linear = branch(q, k, v)
    torch.testing.assert_close(branch(q, k, v, softmax_out=softmax_out), 0.8 * softmax_out + 0.2 * linear)
    with torch.no_grad():
        branch.r.fill_(1.0)
        assert torch.equal(branch(q, k, v, softmax_out=softmax_out), softmax_out)
        branch.r.fill_(0.0)
        assert torch.equal(branch(q, k, v, softmax_out=softmax_out), linear)


def test_gradient_reaches_r_and_weights():
    q, k, v = qkv()
    softmax_out = softmax_attention(q, k, v)
    branch = randomized(LinearAttentionBranch(H, D))
    target = torch.randn(B, N, H, D, generator=torch.Generator().manual_seed(1))
    (branch(q, k, v, softmax_out=softmax_out) * target).sum().backward()
    expected = ((softmax_out - branch(q, k, v)) * target).sum()
    torch.testing.assert_close(branch.r.grad, expected.reshape(1), rtol=1e-4, atol=1e-4)
    assert branch.q_weight.grad.abs().sum() > 0 and branch.k_weight.grad.abs().sum() > 0


def test_bf16_inputs_and_bf16_parameters():
    branch = randomized(LinearAttentionBranch(H, D))
    q, k, v = qkv()
    softmax_out = softmax_attention(q, k, v)
    expected = branch(q, k, v, softmax_out=softmax_out)
    for model in (branch, branch.to(torch.bfloat16)):
        out = model(*(x.bfloat16() for x in (q, k, v)), softmax_out=softmax_out.bfloat16())
        assert out.dtype == torch.bfloat16
        assert (out.float() - expected).norm() < 0.02 * expected.norm()


def test_drop_r():
    branch = LinearAttentionBranch(H, D)
    q, k, v = qkv()
    linear = branch(q, k, v)
    branch.drop_r()
    assert set(branch.state_dict()) == {"q_weight", "k_weight"}
    assert torch.equal(branch(q, k, v), linear)
    with pytest.raises(ValueError, match="linear, not mixed"):
        branch(q, k, v, softmax_out=v)
    other = LinearAttentionBranch(H, D, mixed=False)
    assert set(other.state_dict()) == set(branch.state_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": 0}, "heads"),
        ({"head_dim": 12}, "head_dim"),
        ({"head_dim": 136}, "head_dim"),
        ({"head_dim": 0}, "head_dim"),
        ({"feature_map": "identity"}, "feature_map"),
        ({"feature_map": "taylor"}, "feature_map"),
        ({"r_init": 1.1}, "r_init"),
        ({"r_init": float("nan")}, "r_init"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        LinearAttentionBranch(**{"heads": H, "head_dim": D, **arguments})
    assert "\n" not in str(error.value)
