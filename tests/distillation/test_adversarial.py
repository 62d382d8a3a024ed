"""The optional adversarial term: its losses, its features, its part in a step, and that it is off by default."""

import pytest
import torch
from tiny import TEXT_DIM, tiny_inputs, tiny_transformer
from torch.nn.functional import logsigmoid

from linvideo.distillation import DistillConfig
from linvideo.distillation.adversarial import Discriminator, attach_discriminator, fake_loss, real_loss
from linvideo.distillation.dmd_step import DmdStep
from linvideo.run.read_config import from_dict
from linvideo.trajectories.prompts import PromptEmbeddings
from linvideo.trajectories.store import TrajectoryStore

SHAPE = (16, 1, 4, 4)  # 4 tokens
WEIGHT = 0.25


def test_the_losses_by_hand():
    logits = torch.tensor([[-3.0, 0.0], [0.5, 4.0]], dtype=torch.float64)
    assert torch.allclose(real_loss(logits), -logsigmoid(logits).mean())
    assert torch.allclose(fake_loss(logits), -torch.log(1 - torch.sigmoid(logits)).mean())
    sure = torch.full((2, 3), 20.0)
    assert real_loss(sure) < 1e-6 and fake_loss(-sure) < 1e-6 and fake_loss(sure) > 19 and real_loss(-sure) > 19


def test_every_token_is_judged_by_itself():
    torch.manual_seed(0)
    discriminator, features = Discriminator(8), torch.randn(2, 5, 8)
    logits = discriminator(features)
    assert logits.shape == (2, 5) and logits.dtype == torch.float32
    assert torch.allclose(discriminator(features[:, 2:]), logits[:, 2:], atol=1e-6)
    changed = features.clone()
    changed[0, 3] += torch.randn(8)
    assert (discriminator(changed) != logits).nonzero().tolist() == [[0, 3]]
    with torch.autocast("cpu", torch.bfloat16):
        assert discriminator(features).dtype == torch.float32  # softplus of bf16 logits would lose small losses


@pytest.mark.parametrize("layer, expected", [(0, 0), (2, 2), (None, 1)])
def test_the_features_are_the_named_layers_output(layer, expected):
    critic, outputs = tiny_transformer(), {}
    for number, block in enumerate(critic.blocks):
        block.register_forward_hook(lambda _, __, output, number=number: outputs.update({number: output}))
    features = attach_discriminator(critic, layer)
    critic(**tiny_inputs())
    taken = features.take()
    assert taken is outputs[expected] and features.take() is None
    assert critic.discriminator(taken).shape == taken.shape[:2] == (2, 48)
    assert all(name in dict(critic.named_parameters()) for name in ("discriminator.layers.1.weight", "proj_out.weight"))


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_layer_that_does_not_exist(layer):
    critic = tiny_transformer()
    with pytest.raises(ValueError, match=rf"^dmd\.adversarial_layer must lie in \[0, 2\], got {layer}$"):
        attach_discriminator(critic, layer)
    assert not hasattr(critic, "discriminator")


# in a step


def real_samples(path) -> TrajectoryStore:
    request = {"num_trajectories": 3, "shard_size": 2, "states_per_trajectory": 1, "guidance_scale": 1.0}
    store, generator = TrajectoryStore(path, request), torch.Generator().manual_seed(5)
    for number in store.missing_shards():
        rows = list(store.shard_trajectories(number))
        x = torch.randn(len(rows), 1, *SHAPE, generator=generator)
        states = {"x": x, "u": -x, "timestep": torch.full((len(rows), 1), 1000.0)}
        states |= {"negative": torch.zeros(len(rows), 1, dtype=torch.bool), "prompt": torch.tensor(rows) % 2}
        store.write_shard(number, states | {"sample": 2 * x[:, 0] + 1})
    return store


def watched(model) -> list[dict[str, torch.Tensor]]:
    """Record x, t, text and u of all further calls, detached."""
    calls = []

    def keep(_, __, kwargs, output):
        x, text = kwargs["hidden_states"].detach(), kwargs["encoder_hidden_states"]
        calls.append({"x": x, "t": kwargs["timestep"] / 1000, "text": text, "u": output[0].detach()})

    model.register_forward_hook(keep, with_kwargs=True)
    return calls


def dmd_step(tmp_path, weight=WEIGHT, **settings) -> DmdStep:
    values = {"train_batch_size": 3, "num_steps": 2, "trajectories": {"guidance_scale": 2.0}, **settings}
    config = from_dict({"output_dir": "unused", **values, "dmd": {"adversarial_weight": weight}}, DistillConfig)
    student, teacher, critic = (tiny_transformer(2, seed=seed) for seed in (0, 1, 2))
    torch.manual_seed(0)
    features = attach_discriminator(critic, None) if weight else None
    generator = torch.Generator().manual_seed(3)
    embeds = torch.randn(3, 5, TEXT_DIM, generator=generator)
    prompts, store = PromptEmbeddings(embeds[:2], embeds[2:]), real_samples(tmp_path / "store") if weight else None
    return DmdStep(
        student, teacher.requires_grad_(False), critic, prompts, SHAPE, 3.0, config, features=features, store=store
    )


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def column(t):
    return t.view(-1, 1, 1, 1, 1)


def velocity(model, x, call):
    return model(hidden_states=x, timestep=1000 * call["t"], encoder_hidden_states=call["text"], return_dict=False)[0]


def test_the_students_turn_adds_the_weighted_loss_and_its_gradient(tmp_path):
    plain, step = dmd_step(tmp_path, weight=0.0), dmd_step(tmp_path)
    of_student, of_critic = watched(step.student), watched(step.critic)
    losses = [each.student_gradient(2) for each in (plain, step)]
    added = {name: grad - gradients(plain.student)[name] for name, grad in gradients(step.student).items()}
    (judged,), rolled_out = of_critic, of_student[-1]
    assert torch.equal(judged["text"], rolled_out["text"])

    t, s = column(judged["t"]), column(rolled_out["t"])
    noise = (judged["x"] - (1 - t) * (rolled_out["x"] - s * rolled_out["u"])) / t
    clean = rolled_out["x"] - s * velocity(step.student, rolled_out["x"], rolled_out)
    velocity(step.critic, (1 - t) * clean + t * noise, judged)
    term = WEIGHT * real_loss(step.critic.discriminator(step.features.take()))
    assert losses[1] - losses[0] == pytest.approx(float(term.detach()), rel=1e-4)
    step.student.zero_grad()
    term.backward()
    by_hand = gradients(step.student)
    assert by_hand.keys() == added.keys()
    largest = max(float(grad.abs().max()) for grad in gradients(plain.student).values())
    # tolerance for the difference of two gradients, each with the fp32 rounding errors of a dozen layers
    assert max(float((added[name] - by_hand[name]).abs().max()) for name in added) < 1e-5 * largest
    assert max(float(grad.abs().max()) for grad in by_hand.values()) > 1e-3 * largest


def test_the_critic_learns_to_tell_samples_apart(tmp_path):
    plain, step = dmd_step(tmp_path, weight=0.0), dmd_step(tmp_path)
    of_student, of_critic, logits = watched(plain.student), watched(step.critic), []
    step.critic.discriminator.register_forward_hook(lambda _, __, output: logits.append(output.detach()))
    plain.student_gradient(2)
    losses = [each.critic_gradient(2) for each in (plain, step)]
    fake, real = logits
    term = WEIGHT * (fake_loss(fake) + real_loss(real))
    assert losses[1] - losses[0] == pytest.approx(float(term), rel=1e-4)
    trained = gradients(step.critic)
    assert all(bool(trained[f"discriminator.layers.{i}.{name}"].any()) for i in (1, 3) for name in ("weight", "bias"))

    # real samples come from the store, with noise like the student's and the prompts that they were made with
    of_fake, of_real = of_critic
    assert torch.equal(of_fake["t"], of_real["t"])
    clean = of_student[-1]["x"] - column(of_student[-1]["t"]) * of_student[-1]["u"]
    found = clean + (of_real["x"] - of_fake["x"]) / (1 - column(of_real["t"]))
    samples, conditions = step.store.samples(range(3), step.prompts)
    # tolerance for rounding numbers of at most order 10, divided by 1 - t >= 0.02
    numbers = [[i for i in range(3) if torch.allclose(sample, samples[i], atol=1e-3)] for sample in found]
    assert [len(each) for each in numbers] == [1, 1, 1]
    assert torch.equal(of_real["text"], conditions.prompt_embeds[[each[0] for each in numbers]])


def test_the_critics_gradient_is_the_same_without_the_leftovers_of_the_students_turn(tmp_path):
    step, alone = dmd_step(tmp_path), dmd_step(tmp_path)
    step.student_gradient(2)
    left = gradients(step.critic)
    assert any(bool(grad.any()) for grad in left.values())  # so the run has to clear them
    step.critic.zero_grad()
    losses = [each.critic_gradient(2) for each in (step, alone)]
    assert losses[0] == losses[1]
    ours, theirs = gradients(step.critic), gradients(alone.critic)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_it_is_off_by_default(tmp_path):
    assert DistillConfig("a").dmd.adversarial_weight == 0.0
    step = dmd_step(tmp_path, weight=0.0)
    step.student_gradient(0)
    assert not hasattr(step.critic, "discriminator") and gradients(step.critic) == {}


def test_mixed_precision_gives_every_weight_its_gradient(tmp_path):
    """Autocast must not reuse the weights that it cast in a rollout's first forwards, which have no gradient."""
    exact, mixed = dmd_step(tmp_path), dmd_step(tmp_path, mixed_precision="bf16")
    for step in (exact, mixed):
        step.student_gradient(2)
        step.critic.zero_grad()
        step.critic_gradient(2)
    for name in ("student", "critic"):
        ours, theirs = (gradients(getattr(step, name)) for step in (mixed, exact))
        assert ours.keys() == theirs.keys() == dict(getattr(exact, name).named_parameters()).keys()
        flat, expected = (torch.cat([each[key].flatten() for key in theirs]) for each in (ours, theirs))
        # a few bf16 rounding errors of 2^-8 each and nearly random sign
        assert float((flat - expected).norm() / expected.norm()) < 4 * 2**-8
