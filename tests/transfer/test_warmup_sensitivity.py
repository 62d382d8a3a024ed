from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny_inputs, tiny_transformer

from linvideo.models import attention_types, convert
from linvideo.models.branches import feature_weights, linear_branches
from linvideo.ops.reference import features, rotate
from linvideo.trajectories.atomic_files import write_cached
from linvideo.trajectories.conditions import Conditions
from linvideo.trajectories.flow import predict_velocity
from linvideo.trajectories.store import StateBatch
from linvideo.transfer.sensitivity import layer_sensitivity, velocity_error
from linvideo.transfer.warmup import attention_output_errors, load_feature_maps, square_sums, start_gains


def make_batch(teacher, seed=1):
    inputs = tiny_inputs(batch=2, seed=seed)
    x, t, embeds = (inputs[name] for name in ("hidden_states", "timestep", "encoder_hidden_states"))
    with torch.no_grad():
        u = predict_velocity(teacher, x, t, Conditions(embeds))
    return StateBatch(x, u, t, Conditions(embeds), torch.zeros(2, dtype=torch.long), torch.zeros(2, dtype=torch.bool))


@pytest.fixture(scope="module")
def teacher():
    return tiny_transformer()


def test_square_sums():
    assert square_sums(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])).tolist() == [4, 17]


def test_warmup_errors_are_of_attention_outputs_on_teacher_activations(teacher):
    """Compare with q, k, v and softmax attention captured in the unconverted teacher, layer by layer."""
    student, batch = convert(teacher, layers=[0, 2], r_init=0.1), make_batch(teacher)
    errors = attention_output_errors(student, batch)
    assert list(errors) == [0, 2]

    seen = {}
    original = torch.nn.functional.scaled_dot_product_attention

    def record(query, key, value, **kwargs):
        out = original(query, key, value, **kwargs)
        if query.shape[2] == key.shape[2]:  # self-attention, [B, H, N, D]
            seen[len(seen)] = [x.transpose(1, 2) for x in (query, key, value, out)]
        return out

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
        predict_velocity(teacher, batch.x, batch.timestep, batch.conditions)
    assert len(seen) == 3
    for layer in (0, 2):
        q, k, v, out = seen[layer]
        difference, norm = square_sums(linear_branches(student)[layer](q, k, v), out)
        expected = difference / norm
        assert float(errors[layer]) == pytest.approx(float(expected.detach()), rel=1e-3)


def windowed(teacher, chunk=1):
    """Return the teacher with a mixed layer and two window layers."""
    student = convert(teacher, layers=[0])
    return convert(student, layers=[1, 2], mode="window", window={"chunk": chunk, "overlap": 0})


@pytest.mark.parametrize("converted", [convert, windowed])
def test_warmup_trains_the_feature_weights_only_and_lowers_the_error(teacher, converted):
    student = converted(teacher)
    optimizer = torch.optim.Adam(feature_weights(student).values(), lr=2e-2)
    before = attention_output_errors(student, make_batch(teacher, seed=9))
    for step in range(25):
        attention_output_errors(student, make_batch(teacher, seed=step + 10), backward=True)
        trained = {name for name, p in student.named_parameters() if p.grad is not None}
        assert trained == set(feature_weights(student))
        optimizer.step()
        optimizer.zero_grad()
    after = attention_output_errors(student, make_batch(teacher, seed=9))
    assert all(float(after[layer]) < 0.8 * float(before[layer]) for layer in before)


@pytest.mark.parametrize("converted", [convert, windowed])
def test_warmup_gradient_is_that_of_the_sum_over_layers(teacher, converted):
    student, batch = converted(teacher), make_batch(teacher)
    attention_output_errors(student, batch, backward=True)
    weight = student.blocks[1].attn1.linear_attn.q_weight
    analytic, step = weight.grad[1, 3, 5].item(), 1e-2
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[1, 3, 5] += sign * step
            values.append(float(attention_output_errors(student, batch)[1]))
            weight[1, 3, 5] -= sign * step
    assert analytic == pytest.approx((values[0] - values[1]) / (2 * step), rel=2e-2, abs=1e-6)


@pytest.mark.parametrize("chunk", [1, 2])
def test_gains_start_with_the_weight_that_softmax_gives_far_frames(teacher, chunk):
    """The gain is the mean log ratio of the two sums over far keys, of 3 frames of 16 tokens."""
    student, batch = windowed(teacher, chunk), make_batch(teacher)
    seen = {}
    with pytest.MonkeyPatch.context() as patch:
        branch = linear_branches(student)[1]
        measured = branch.measured_log_gain
        patch.setattr(
            branch, "measured_log_gain", lambda q, k, **more: seen.update(q=q, k=k, **more) or measured(q, k, **more)
        )
        start_gains(student, batch)
    q, k = (rotate(seen[name], *seen["rope"]).double() for name in "qk")
    of_chunk = torch.arange(48) // 16 // chunk
    far = of_chunk[:, None] != of_chunk
    logits = torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
    phi = [features(x, w.detach().double(), None, "hedgehog") for x, w in ((q, branch.q_weight), (k, branch.k_weight))]
    linear = torch.einsum("bnhf,bmhf->bhnm", *phi)
    ratio = logits.masked_fill(~far, -torch.inf).logsumexp(-1) - (linear * far).sum(-1).log()
    torch.testing.assert_close(branch.log_gain.detach().double(), ratio.mean((0, 2)), rtol=1e-4, atol=1e-4)


def test_gains_are_means_over_the_samples_of_all_ranks(teacher):
    """Of three ranks one has two samples, one has one, and one has a substitute that does not count."""
    both, seen = make_batch(teacher), []
    names = ("x", "u", "timestep", "conditions", "prompt", "negative")
    one, other = (StateBatch(*(getattr(both, name)[i : i + 1] for name in names)) for i in range(2))

    def gains(batch, total=None):
        student = windowed(teacher)
        start_gains(student, batch, total and SimpleNamespace(sum=total))
        return torch.stack([linear_branches(student)[layer].log_gain for layer in (1, 2)])

    for batch in (both, one, replace(other, counts=False)):
        gains(batch, lambda x: seen.append(x) or x)
    totals = [sum(seen[layer::2]) for layer in range(2)]
    found = gains(both, lambda x: totals.pop(0))
    torch.testing.assert_close(found, (2 * gains(both) + gains(one)) / 3)


def test_sensitivity_is_the_error_of_one_layer_linear(teacher):
    student, batch = convert(teacher, r_init=0.3), make_batch(teacher)
    errors, floor = layer_sensitivity(student, lambda: [batch], progress=False)
    assert floor < 1e-10  # all softmax is the teacher
    for layer in range(3):
        alone = convert(teacher, layers=[layer], mode="linear")
        assert errors[layer] == pytest.approx(velocity_error(alone, [batch]), rel=1e-5)
    assert all(block.attn1.attention_type == "mixed" for block in student.blocks)
    assert len({round(error, 9) for error in errors.values()}) == 3


def test_velocity_error_weighs_every_element_alike(teacher):
    student, batches = convert(teacher, mode="linear"), [make_batch(teacher, seed) for seed in (1, 2)]
    whole = [velocity_error(student, [batch]) for batch in batches]
    assert velocity_error(student, batches) == pytest.approx(sum(whole) / 2, rel=1e-6)
    with attention_types(student, dict.fromkeys(range(3), "softmax")):
        assert velocity_error(student, batches) < 1e-10


def test_feature_maps_without_weights_have_nothing_to_warm_up(teacher):
    assert feature_weights(convert(teacher, feature_map="elu")) == {}
    student = convert(convert(teacher, layers=[0], feature_map="elu"), layers=[1], mode="window", feature_map="elu")
    attention_output_errors(student, make_batch(teacher), backward=True)
    assert [name for name, p in student.named_parameters() if p.grad is not None] == [*feature_weights(student)]
    assert [*feature_weights(student)] == ["blocks.1.attn1.linear_attn.log_gain"]


def test_load_feature_maps_refuses_other_files(teacher, tmp_path):
    with pytest.raises(ValueError, match=r"cannot read .*missing\.safetensors"):
        load_feature_maps(convert(teacher), tmp_path / "missing.safetensors")
    weights = {name: x.detach().clone() for name, x in feature_weights(convert(teacher)).items()}
    name = next(iter(weights))
    for change, message in (
        (weights[name][:, :1], "expected .* of shape .* got"),  # would be broadcast
        (weights[name] * float("nan"), "is not finite"),
    ):
        save_file(weights | {name: change.contiguous()}, tmp_path / "feature_maps.safetensors")
        with pytest.raises(ValueError, match=message):
            load_feature_maps(convert(teacher), tmp_path / "feature_maps.safetensors")
    linear, windows = convert(teacher, layers=[1]), convert(teacher, layers=[1], mode="window")
    for own, other, kinds in ((linear, windows, ("linear", "window")), (windows, linear, ("window", "linear"))):
        file = tmp_path / f"{kinds[1]}.safetensors"
        save_file({name: x.detach().clone() for name, x in feature_weights(other).items()}, file)
        with pytest.raises(
            ValueError, match="blocks.1.attn1.linear_attn of a {} layer in .*, got that of a {}".format(*kinds)
        ):
            load_feature_maps(own, file)
    file = tmp_path / "maps.safetensors"
    write_cached(file, weights, "maps")
    load_feature_maps(convert(teacher), file)
    content = bytearray(file.read_bytes())
    content[-3] ^= 1  # flips a bit of a weight, which stays finite
    file.write_bytes(content)
    with pytest.raises(ValueError, match="maps.safetensors is damaged"):
        load_feature_maps(convert(teacher), file)


def test_sensitivities_that_are_not_finite_choose_no_layers(teacher):
    student, batch = convert(teacher), make_batch(teacher)
    with torch.no_grad():
        student.blocks[1].attn1.linear_attn.q_weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="the velocity error with layer 1 alone converted is nan"):
        layer_sensitivity(student, lambda: [batch], progress=False)
