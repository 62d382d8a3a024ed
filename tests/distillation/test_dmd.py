"""Distribution matching computed by hand: distribution of t, guided teacher, the student's gradient, the critic."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy import SHAPE, AffineFlow, gaussian_velocity, toy_prompts

from linvideo.distillation import DistillConfig
from linvideo.distillation.dmd import critic_loss, draw_t, guided_velocity, matching_loss
from linvideo.distillation.dmd_step import DmdStep
from linvideo.run.read_config import from_dict

PROMPTS = toy_prompts()


def column(values):
    return values.view(-1, 1, 1, 1, 1)


def conditions(numbers=(0, 1, 2), negative=False):
    numbers = torch.tensor(numbers)
    return PROMPTS.conditions(numbers, torch.full(numbers.shape, negative))


class Recorded(AffineFlow):
    """A model that records its calls: (x, t, condition, u, whether gradients were enabled)."""

    def __init__(self, *coefficients):
        super().__init__(*coefficients)
        self.calls = []

    def forward(self, hidden_states, timestep, encoder_hidden_states, return_dict=False):
        (u,) = super().forward(hidden_states, timestep, encoder_hidden_states)
        condition = encoder_hidden_states.mean(dim=(1, 2))
        self.calls.append((hidden_states.detach(), timestep / 1000, condition, u.detach(), torch.is_grad_enabled()))
        return (u,)


# the distribution of t


@given(
    st.lists(st.floats(0, 1, exclude_max=True, width=32), min_size=1),
    st.floats(0.1, 20),
    st.floats(0.001, 0.4),
    st.floats(0.6, 0.999),
)
def test_t_is_shifted_and_clamped(uniform, shift, t_min, t_max):
    uniform = torch.tensor(uniform, dtype=torch.float64)
    t = draw_t(uniform, shift, t_min, t_max)
    for u, drawn in zip(uniform.tolist(), t.tolist(), strict=True):
        # the odds of t are `shift` times the odds of u: Wan's shift in another form than in the code
        odds = shift * u / (1 - u)
        assert drawn == pytest.approx(min(max(odds / (1 + odds), t_min), t_max), rel=1e-9)


def test_a_shift_of_one_leaves_the_uniform_numbers():
    uniform = torch.linspace(0.1, 0.9, 9)
    assert torch.allclose(draw_t(uniform, 1.0, 0.02, 0.98), uniform)
    assert draw_t(torch.tensor([0.0, 0.999]), 1.0, 0.02, 0.98).tolist() == pytest.approx([0.02, 0.98])


# the teacher


def test_the_teacher_is_guided_as_its_sampler_guides():
    teacher, x, t = Recorded(0.5, 0.3), torch.randn(3, *SHAPE), torch.tensor([0.2, 0.5, 0.9])
    u = guided_velocity(teacher, x, t, conditions(), conditions(negative=True), 4.0)
    base = 0.5 * x + column(0.3 * t)
    under_prompt, under_negative = base + column(torch.tensor([1.0, 2.0, 3.0])), base - 1
    assert torch.allclose(u, under_negative + 4 * (under_prompt - under_negative), atol=1e-5)
    assert not u.requires_grad and not any(call[-1] for call in teacher.calls)


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_an_unguided_teacher_is_evaluated_once(scale):
    teacher, x, t = Recorded(0.5, 0.3), torch.randn(3, *SHAPE), torch.tensor([0.2, 0.5, 0.9])
    u = guided_velocity(teacher, x, t, conditions(), None, scale)
    assert torch.allclose(u, 0.5 * x + column(0.3 * t + torch.tensor([1.0, 2.0, 3.0])), atol=1e-6)
    assert len(teacher.calls) == 1


# the gradient


@given(st.integers(0, 2**32), st.integers(1, 4), st.floats(0.02, 0.98))
def test_the_gradient_is_normalised_sample_by_sample(seed, batch, t_first):
    generator = torch.Generator().manual_seed(seed)
    clean, noise, u_fake, u_real = torch.randn(4, batch, *SHAPE, generator=generator, dtype=torch.float64)
    t = torch.rand(batch, generator=generator, dtype=torch.float64) * 0.9 + 0.05
    t[0] = t_first
    clean.requires_grad_()
    x = (1 - column(t)) * clean.detach() + column(t) * noise
    loss = matching_loss(clean, x, t, u_fake, u_real)
    loss.backward()

    values, largest = [], 0.0
    for i in range(batch):
        real, fake = x[i] - t[i] * u_real[i], x[i] - t[i] * u_fake[i]
        normaliser = (clean[i].detach() - real).abs().sum() / real.numel()
        by_hand = (fake - real) / normaliser / clean.numel()
        assert torch.allclose(clean.grad[i], by_hand, rtol=1e-12, atol=1e-15)
        values.append((fake - real).square().sum())
        largest = max(largest, float(real.abs().max()), float(fake.abs().max()))
    # only the value is fp32: both operands are off by at most half an ulp, and so is the root of the mean
    value, by_hand = float(loss.detach()) ** 0.5, float(sum(values) / clean.numel()) ** 0.5
    assert abs(value - by_hand) <= torch.finfo(torch.float32).eps * (largest + 4 * by_hand)


def test_the_size_of_a_samples_error_does_not_change_its_gradient():
    clean, u_fake, u_real, noise = torch.randn(4, 2, *SHAPE, dtype=torch.float64)
    t = torch.tensor([0.3, 0.7], dtype=torch.float64)

    def gradient(factor):
        sample = (factor * clean).requires_grad_()
        x = factor * ((1 - column(t)) * clean + column(t) * noise)
        matching_loss(sample, x, t, factor * u_fake, factor * u_real).backward()
        return sample.grad

    assert torch.allclose(gradient(1.0), gradient(torch.tensor([100.0, 0.01]).view(2, 1, 1, 1, 1)), rtol=1e-10)


def test_a_sample_that_the_teacher_estimates_exactly_has_a_finite_gradient():
    clean = torch.ones(1, *SHAPE, dtype=torch.float64, requires_grad=True)
    x, t = clean.detach().clone(), torch.tensor([0.5], dtype=torch.float64)
    matching_loss(clean, x, t, torch.full_like(x, 0.1), torch.zeros_like(x)).backward()
    assert torch.allclose(clean.grad, torch.full_like(x, -0.05 / 1e-6 / x.numel()), rtol=1e-9)


def test_a_critic_that_agrees_with_the_teacher_moves_nothing():
    clean = torch.randn(3, *SHAPE, requires_grad=True)
    x, t = torch.randn(3, *SHAPE), torch.tensor([0.2, 0.5, 0.9])
    model = AffineFlow(0.5, 0.3)
    (u_fake,) = model(x, 1000 * t, conditions().prompt_embeds)
    for scale, moves in ((1.0, False), (3.0, True)):
        u_real = guided_velocity(model, x, t, conditions(), conditions(negative=True), scale)
        clean.grad = None
        loss = matching_loss(clean, x, t, u_fake.detach(), u_real)
        loss.backward()
        assert bool(clean.grad.any()) == moves and bool(loss.detach()) == moves


# closed form: Gaussian data


@pytest.mark.parametrize("t", [0.05, 0.3, 0.7, 0.95])
def test_the_direction_is_that_of_the_kl_on_gaussians(t):
    (mean_q, variance_q), (mean_p, variance_p) = (0.7, 0.6), (-0.4, 1.3)
    x, clean = torch.randn(2, 1, 1000, dtype=torch.float64)
    u_q, u_p = gaussian_velocity(x, t, mean_q, variance_q), gaussian_velocity(x, t, mean_p, variance_p)
    clean.requires_grad_()
    matching_loss(clean, x, torch.tensor([t], dtype=torch.float64), u_q, u_p).backward()

    def score(mean, variance):
        return -(x - (1 - t) * mean) / ((1 - t) ** 2 * variance + t**2)

    # d KL(q_t || p_t) / dx is s_q - s_p; the weight that the loss omits is the same for the whole sample
    kl = score(mean_q, variance_q) - score(mean_p, variance_p)
    normaliser = (clean.detach() - (x - t * u_p)).abs().mean()
    direction = clean.grad * clean.numel() * normaliser  # x_0^fake - x_0^real
    assert torch.allclose((1 - t) / t**2 * direction, kl, rtol=1e-8, atol=1e-10)


def test_descending_moves_the_students_samples_from_the_critic_onto_the_teacher():
    """Check the sign end to end: with an ideal critic, a shift of the samples converges to the teacher's mean."""
    shift, mean_p, variance = torch.zeros((), requires_grad=True), 2.0, 1.0
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(1, 4000, generator=generator)
    base -= base.mean()
    optimizer = torch.optim.SGD([shift], lr=2.0)
    for step in range(60):
        t = torch.tensor([(0.3, 0.5, 0.8)[step % 3]])
        clean = base + shift
        with torch.no_grad():
            x = (1 - t) * clean + t * torch.randn(1, 4000, generator=generator)
            u_fake, u_real = (gaussian_velocity(x, float(t), mean, variance) for mean in (float(shift), mean_p))
        optimizer.zero_grad()
        matching_loss(clean, x, t, u_fake, u_real).backward()
        optimizer.step()
    # With equal variances, fake - real is the same at every x, and 0 when the shift is mean_p. No sampling error.
    assert float(shift.detach()) == pytest.approx(mean_p, abs=1e-3)


# the critic


def test_the_critic_learns_the_samples_flow():
    critic, clean, noise = AffineFlow(0.5, 0.3), torch.randn(3, *SHAPE), torch.randn(3, *SHAPE)
    t = torch.tensor([0.2, 0.5, 0.9])
    loss = critic_loss(critic, clean, t, noise, conditions())
    loss.backward()
    x = (1 - column(t)) * clean + column(t) * noise
    residual = 0.5 * x + column(0.3 * t + torch.tensor([1.0, 2.0, 3.0])) - (noise - clean)
    assert torch.allclose(loss.detach(), residual.square().mean())
    assert torch.allclose(critic.scale.grad, (2 * residual * x).mean(), rtol=1e-5)
    assert torch.allclose(critic.shift.grad, (2 * residual * column(t)).mean(), rtol=1e-5)


# one step of student and critic


def dmd_step(batch=4, accumulation=1, guidance_scale=3.0, timesteps=(1000.0, 600.0, 300.0), **dmd):
    values = {"train_batch_size": batch, "gradient_accumulation_steps": accumulation, "timesteps": list(timesteps)}
    values |= {"trajectories": {"guidance_scale": guidance_scale}, "dmd": dmd}
    config = from_dict({"output_dir": "unused", **values}, DistillConfig)
    student, teacher, critic = Recorded(0.5, 0.3), Recorded(0.2, -0.1), Recorded(0.4, 0.1)
    return DmdStep(student, teacher, critic, PROMPTS, SHAPE, 3.0, config)


def test_the_students_gradient_by_hand():
    step = dmd_step(batch=16)
    loss = step.student_gradient(4)
    assert [call[-1] for call in step.student.calls] == [False, False, True]  # two to get there, one trained
    x_s, s, condition, u, _ = step.student.calls[-1]
    assert torch.equal(s.unique(), torch.tensor([0.3, 0.6, 1.0]))
    assert set(condition.tolist()) == {1.0, 2.0, 3.0}
    clean = x_s - column(s) * u

    (x, t, of_critic, u_fake, has_gradient), *others = step.critic.calls
    assert not others and not has_gradient and torch.equal(of_critic, condition)
    assert bool((t >= 0.02).all() and (t <= 0.98).all()) and len(set(t.tolist())) == 16
    noise = (x - (1 - column(t)) * clean) / column(t)
    # mean and variance of 16 * 8 standard normals, within four standard errors
    assert abs(float(noise.mean())) < 4 / math.sqrt(128) and abs(float(noise.var()) - 1) < 4 * math.sqrt(2 / 128)
    under_prompt, under_negative = step.teacher.calls
    for call, wanted in ((under_prompt, condition), (under_negative, torch.full((16,), -1.0))):
        assert all(torch.equal(a, b) for a, b in zip(call, (x, t, wanted), strict=False))

    u_real = under_negative[3] + 3.0 * (under_prompt[3] - under_negative[3])
    difference = column(t) * (u_real - u_fake)  # x_0^fake - x_0^real
    normaliser = (clean - (x - column(t) * u_real)).abs().mean(dim=(1, 2, 3, 4))
    assert loss == pytest.approx(float(difference.square().mean()), rel=1e-5)
    # clean = x_s - s (scale x_s + shift s + c)
    by_hand = (difference / column(normaliser) * -column(s) * x_s).mean()
    assert torch.allclose(step.student.scale.grad, by_hand, rtol=1e-4)
    assert step.critic.scale.grad is None and step.teacher.scale.grad is None


def test_the_critic_learns_from_the_students_turn_or_from_new_rollouts():
    step = dmd_step()
    step.student_gradient(4)
    x_s, s, condition, u, _ = step.student.calls[-1]
    clean, (x_student, t_student, *_) = x_s - column(s) * u, step.critic.calls[-1]
    calls, gradient = len(step.student.calls), step.student.scale.grad.clone()
    loss = step.critic_gradient(4)
    assert len(step.student.calls) == calls  # no new rollout
    x, t, of_critic, u_fake, has_gradient = step.critic.calls[-1]
    assert has_gradient and torch.equal(of_critic, condition)
    assert not torch.isin(t, t_student).any()  # the critic has its own draws
    noise = (x - (1 - column(t)) * clean) / column(t)
    assert not torch.allclose(noise, (x_student - (1 - column(t_student)) * clean) / column(t_student), atol=0.1)
    residual = u_fake - (noise - clean)
    assert loss == pytest.approx(float(residual.square().mean()), rel=1e-4)
    assert torch.allclose(step.critic.scale.grad, (2 * residual * x).mean(), rtol=1e-4)

    alone = dmd_step()  # the same step without the student's turn
    assert alone.critic_gradient(4) == loss
    assert torch.equal(alone.critic.scale.grad, step.critic.scale.grad)
    assert not any(call[-1] for call in alone.student.calls) and alone.student.scale.grad is None
    assert torch.equal(step.student.scale.grad, gradient)

    step.critic_gradient(5)  # in the next step the kept samples are gone
    assert len(step.student.calls) == 2 * calls
    assert not torch.equal(step.critic.calls[-1][0], x)


def test_micro_batches_are_parts_of_one_global_batch():
    whole, parts = dmd_step(batch=4), dmd_step(batch=2, accumulation=2)
    for gradient in ("student_gradient", "critic_gradient"):
        losses = [getattr(step, gradient)(3) for step in (whole, parts)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for model in ("student", "critic"):
        for name in ("scale", "shift"):
            ours, theirs = (getattr(getattr(step, model), name).grad for step in (whole, parts))
            assert torch.allclose(ours, theirs, rtol=1e-4)
    starts = [torch.cat([call[0] for call in step.student.calls[::3]]) for step in (whole, parts)]
    assert torch.equal(*starts) and len(starts[0].unique(dim=0)) == 4


def test_every_step_has_new_draws():
    step = dmd_step()
    for number in range(3):
        step.student_gradient(number)
        step.critic_gradient(number)
    starts = torch.stack([call[0] for call in step.student.calls[::3]])
    assert len(starts.flatten(0, 1).unique(dim=0)) == 12
    assert len(torch.cat([call[1] for call in step.critic.calls]).unique()) == 24


def test_an_unguided_teacher_never_sees_the_negative_prompt():
    step = dmd_step(guidance_scale=1.0)
    step.student_gradient(0)
    assert len(step.teacher.calls) == 1 and bool((step.teacher.calls[0][2] > 0).all())


def test_one_step_starts_from_noise():
    step = dmd_step(batch=16, timesteps=(1000.0,))
    step.student_gradient(0)
    ((x, t, *_),) = step.student.calls
    assert bool((t == 1).all()) and abs(float(x.mean())) < 4 / math.sqrt(128)
