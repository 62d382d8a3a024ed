"""The mixture of Gaussians on which objectives are compared: its closed forms, the student and the result."""

import pytest
import torch

from benchmarks import mixture


@pytest.fixture(scope="module")
def flow():
    return mixture.Flow()


@pytest.mark.parametrize("t", [0.0, 0.05, 0.4, 0.9, 1.0])
def test_velocity_and_density_are_those_of_samples(flow, t):
    """E[(eps - x_0) f(x_t)] = E[u(x_t) f(x_t)] for indicators f of bins, and p_t is the density of the samples."""
    draws = torch.Generator().manual_seed(0)
    count = 400_000
    chosen = torch.multinomial(flow.teacher.weights, count, replacement=True, generator=draws)
    clean, noise = torch.randn(2, count, generator=draws, dtype=torch.float64)
    clean = flow.teacher.means[chosen] + flow.teacher.deviations[chosen] * clean
    x, time = (1 - t) * clean + t * noise, torch.tensor(t).double()
    edges = torch.linspace(-3, 3, 13).double()
    bins = torch.bucketize(x, edges)
    u = flow.teacher.velocity(x, time)
    for number in range(1, len(edges)):
        there = bins == number
        spread = (noise - clean - u)[there].std() / there.sum() ** 0.5
        assert ((noise - clean)[there].mean() - u[there].mean()).abs() < 5 * spread
        inner = torch.linspace(edges[number - 1], edges[number], 201).double()
        share = torch.trapezoid(flow.teacher.log_density(inner, time).exp(), inner)
        assert there.double().mean() == pytest.approx(share.item(), abs=0.003)


def test_the_score_identity_of_adm_holds(flow):
    """s_T = -(x + (1 - t) u) / t, on which ADM's gradient rests."""
    x, t = torch.linspace(-2, 2, 9).double().requires_grad_(True), torch.tensor(0.3).double()
    (score,) = torch.autograd.grad(flow.teacher.log_density(x, t).sum(), x)
    u = flow.teacher.velocity(x.detach(), t)
    assert torch.allclose(score, -(x.detach() + (1 - t) * u) / t, atol=1e-10)


def test_the_teacher_itself_is_a_fixed_point_of_both_fits(flow, monkeypatch):
    """A student that can represent the teacher's velocity is the teacher, with either objective."""
    line = mixture.Mixture((1.0,), (0.5,), (0.4,))  # its velocity is linear in x
    monkeypatch.setattr(flow, "teacher", line)
    expected = flow.teacher_states()[-1]
    for fit in (mixture.mse, mixture.own_mse):
        student = fit(flow)
        assert torch.allclose(flow.states(student)[-1], expected, atol=1e-4)
        for loss in (mixture.small_step_loss, mixture.sampler_step_loss):
            trained = mixture.train(flow, student, loss, 3)
            assert (flow.states(trained)[-1] - expected).abs().max() < 0.2


def test_the_exact_divergence_of_a_shifted_normal(flow, monkeypatch):
    """A student whose sampler is the identity gives the noise: KL(N(0, 1) || N(m, s^2)) is known."""
    monkeypatch.setattr(flow, "teacher", mixture.Mixture((1.0,), (0.5,), (2.0,)))
    still = torch.zeros(mixture.STEPS, mixture.KNOTS + 2).double()
    expected = torch.log(torch.tensor(2.0)) + (1 + 0.25) / 8 - 0.5
    assert mixture.reverse_kl(flow, still).item() == pytest.approx(expected.item(), abs=2e-3)


def test_a_sampler_step_narrows_the_modes_and_a_small_step_does_not(monkeypatch):
    monkeypatch.setattr(mixture, "PARTICLES", 301)
    flow = mixture.Flow()
    start = mixture.mse(flow)
    teacher = mixture.measure(flow, flow.teacher_states()[-1])
    small, whole = (
        mixture.measure(flow, flow.states(mixture.train(flow, start, loss, 300))[-1])
        for loss in (mixture.small_step_loss, mixture.sampler_step_loss)
    )
    assert teacher["w1"] == 0 and small["w1"] < 0.08 < 0.1 < whole["w1"]
    assert whole["deviation"] < 0.8 * teacher["deviation"] < small["deviation"]
    assert small["good"] < teacher["good"] < whole["good"]
