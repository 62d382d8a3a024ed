import math

import pytest
import torch
from toy import SHAPE, AffineFlow, gaussian_velocity, toy_prompts, toy_store

from linvideo.trajectories.flow import predict_velocity, score_from_velocity
from linvideo.transfer import objectives
from linvideo.transfer.objectives import ObjectiveConfig
from linvideo.transfer.rollouts import StudentRollouts

SIGMAS = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0])
TIMESTEPS = 1000 * SIGMAS[:-1]


@pytest.fixture
def store(tmp_path):
    return toy_store(tmp_path / "store", TIMESTEPS)


def make_rollouts(store, count=6):
    return StudentRollouts(range(count), store, toy_prompts(), TIMESTEPS, SIGMAS, seed=3, device="cpu")


def column(values):
    return values.view(-1, 1, 1, 1, 1)


def test_teacher_state_mse_is_the_mean_square_error_to_the_stored_velocity(store):
    student = AffineFlow(0.5, 0.3)
    batch = store.draw(range(5), 1, prompts=toy_prompts())
    condition = torch.where(batch.negative, -1.0, batch.prompt + 1.0)
    by_hand = 0.5 * batch.x + column(0.3 * batch.timestep / 1000 + condition) - batch.u
    assert torch.allclose(objectives.teacher_state_mse(student, batch), by_hand.square().mean())


def test_own_state_mse(store):
    student, teacher = AffineFlow(0.5, 0.3), AffineFlow(0.2, -0.1)
    rollouts = make_rollouts(store)
    x, t = rollouts.x.clone(), rollouts.sigma.clone()
    loss = objectives.own_state_mse(student, teacher, rollouts)
    assert torch.allclose(loss, (0.3 * x + column(0.4 * t)).square().mean())
    loss.backward()
    by_hand = (2 * (0.3 * x + column(0.4 * t)) * x).mean()
    assert torch.allclose(student.scale.grad, by_hand)
    assert teacher.scale.grad is None


@pytest.mark.parametrize("name", ["own_mse", "adm", "adm_step"])
def test_objectives_advance_the_rollouts_and_keep_the_teacher_out_of_autocast(name, store):
    student, teacher, rollouts = AffineFlow(0.5, 0.3), AffineFlow(0.2, -0.1), make_rollouts(store, count=12)
    autocast = {student: set(), teacher: set()}
    for model, seen in autocast.items():
        model.register_forward_pre_hook(lambda *_, seen=seen: seen.add(torch.is_autocast_enabled("cpu")))
    u = predict_velocity(student, rollouts.x, rollouts.timestep, rollouts.conditions()).detach()
    x, step, change = rollouts.x.clone(), rollouts.step.clone(), rollouts.sigma_next - rollouts.sigma
    autocast[student].clear()
    with torch.autocast("cpu", torch.bfloat16):
        if name == "own_mse":
            objectives.own_state_mse(student, teacher, rollouts)
        elif name == "adm":
            objectives.adm_small_step(student, teacher, rollouts, torch.full((12,), 1e-3), ObjectiveConfig())
        else:
            objectives.adm_sampler_step(student, teacher, rollouts, ObjectiveConfig())
    assert autocast == {student: {True}, teacher: {False}}
    goes_on = step + 1 < len(TIMESTEPS)
    assert 0 < goes_on.sum() < 12
    assert torch.equal(rollouts.step, torch.where(goes_on, step + 1, 0))  # those at the end restart
    assert torch.equal(rollouts.restarts, (~goes_on).long())
    assert torch.allclose(rollouts.x[goes_on], (x + column(change) * u)[goes_on])


@pytest.mark.parametrize("weight", ["unit", "score"])
def test_adm_small_step_by_hand(store, weight):
    student, teacher = AffineFlow(0.5, 0.3), AffineFlow(0.2, -0.1)
    rollouts, dt = make_rollouts(store), torch.tensor([0.01, 0.02, 0.03, 0.015, 0.005, 0.025])
    x, s = rollouts.x.clone(), rollouts.sigma.clone()
    condition = torch.where(rollouts.negative, -1.0, rollouts.prompt + 1.0)
    loss = objectives.adm_small_step(student, teacher, rollouts, dt, ObjectiveConfig(weight=weight, weight_clip=3.0))
    loss.backward()

    t = s - dt
    x_hat = x - column(dt) * (0.5 * x + column(0.3 * s + condition))
    residual = (0.2 - 0.5) * x_hat + column((-0.1 - 0.3) * t)  # u_T - u_S at x_hat
    w = torch.ones_like(t) if weight == "unit" else ((1 - t) / t).clamp(max=3.0)
    assert torch.allclose(loss.detach(), (column(w) * residual.square()).mean())
    # d x_hat / d scale = -dt x, and the gradient pushed into x_hat is w * residual / dt
    assert torch.allclose(student.scale.grad, -(column(w) * residual * x).mean(), rtol=1e-4)


def test_adm_sampler_step_by_hand(store):
    student, teacher = AffineFlow(0.5, 0.3), AffineFlow(0.2, -0.1)
    rollouts = make_rollouts(store, count=12)
    assert set(rollouts.step.tolist()) == {0, 1, 2, 3}  # the last step, which ends at t = 0, is among them
    x, s, after = rollouts.x.clone(), rollouts.sigma.clone(), rollouts.sigma_next.clone()
    condition = torch.where(rollouts.negative, -1.0, rollouts.prompt + 1.0)
    objectives.adm_sampler_step(student, teacher, rollouts, ObjectiveConfig(weight_clip=5.0)).backward()

    t = torch.where(after > 0, after, s / 2)
    x_hat = x - column(s - t) * (0.5 * x + column(0.3 * s + condition))
    residual = -0.3 * x_hat + column(-0.4 * t)
    w = ((1 - t) / t).clamp(max=5.0)
    assert torch.allclose(student.scale.grad, -(column(w * (s - t)) * residual * x).mean(), rtol=1e-4)


def test_adm_small_step_is_half_the_own_state_gradient_to_first_order(store):
    gradients = []
    for objective in ("mse", "adm"):
        student, teacher, rollouts = AffineFlow(0.5, 0.3), AffineFlow(0.2, -0.1), make_rollouts(store)
        if objective == "mse":
            objectives.own_state_mse(student, teacher, rollouts).backward()
        else:
            dt = torch.full((6,), 1e-4)
            objectives.adm_small_step(student, teacher, rollouts, dt, ObjectiveConfig()).backward()
        gradients.append(torch.stack([student.scale.grad, student.shift.grad]))
    assert torch.allclose(gradients[1], gradients[0] / 2, rtol=2e-3)


@pytest.mark.parametrize("t", [0.05, 0.3, 0.7, 0.95])
def test_score_identity_and_kl_gradient_on_gaussians(t):
    x = torch.randn(1000, dtype=torch.float64)
    mean_q, mean_p, variance = 0.7, -0.4, 0.6
    u_q, u_p = (gaussian_velocity(x, t, mean, variance) for mean in (mean_q, mean_p))
    marginal = (1 - t) ** 2 * variance + t**2
    score = -(x - (1 - t) * mean_q) / marginal
    assert torch.allclose(score_from_velocity(x, u_q, t), score, rtol=1e-9)

    # KL(q_t || p_t) = (m_q - m_p)^2 / (2 marginal) for equal variances, m = (1 - t) mean: its derivative by m_q
    by_hand = torch.full_like(x, (1 - t) * (mean_q - mean_p) / marginal)
    weight = torch.full((1000,), (1 - t) / t, dtype=torch.float64)
    assert torch.allclose(objectives.adm_gradient(u_p, u_q, weight), by_hand, rtol=1e-9)


def test_descending_adm_moves_a_student_distribution_onto_the_teachers():
    """Check the sign end to end: shifting the student's samples along the gradient gives them the teacher's mean."""
    shift = torch.zeros((), requires_grad=True)
    base, t, variance, mean_p = torch.randn(4000), 0.5, 1.0, 2.0
    marginal = (1 - t) ** 2 * variance + t**2
    optimizer = torch.optim.SGD([shift], lr=1.0)
    for _ in range(60):
        x_hat = base * math.sqrt(marginal) + (1 - t) * shift
        with torch.no_grad():
            u_p, u_q = (gaussian_velocity(x_hat, t, mean, variance) for mean in (mean_p, shift))
            gradient = objectives.adm_gradient(u_p, u_q, torch.full((4000,), (1 - t) / t))
        optimizer.zero_grad()
        objectives.descend(x_hat, gradient, torch.zeros(())).backward()
        optimizer.step()
    assert abs(float(shift.detach()) - mean_p) < 0.01


def test_descend_reads_the_value_and_pushes_the_gradient():
    sample = torch.randn(3, 4, requires_grad=True)
    gradient = torch.randn(3, 4)
    loss = objectives.descend(sample, gradient, torch.tensor(7.0))
    assert float(loss.detach()) == 7.0
    loss.backward()
    assert torch.allclose(sample.grad, gradient / 12)


def test_score_weight_is_clipped_at_zero_and_vanishes_at_one():
    weight = objectives.score_weight(torch.tensor([0.0, 0.1, 0.5, 1.0]), 5.0)
    assert torch.allclose(weight, torch.tensor([5.0, 5.0, 1.0, 0.0]))


def test_hybrid_alternates_after_the_mse_steps():
    config = ObjectiveConfig(name="hybrid", mse_steps=3)
    assert [config.at(step) for step in range(8)] == ["mse"] * 4 + ["adm", "mse", "adm", "mse"]
    assert ObjectiveConfig(name="adm_step").at(0) == "adm_step"


def test_losses_are_fp32_for_a_bf16_model(store):
    student = AffineFlow(0.5)
    student.dtype = torch.bfloat16
    batch = store.draw(range(2), 1, prompts=toy_prompts())
    assert predict_velocity(student, batch.x, batch.timestep, batch.conditions).dtype == torch.float32
    assert objectives.teacher_state_mse(student, batch).dtype == torch.float32
    assert batch.x.shape == (2, *SHAPE)
