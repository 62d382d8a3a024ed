"""The mixture of Gaussians on which objectives are compared: its closed forms, the losses and the command."""

import json
import math

import pytest
import torch
from torch import nn

from benchmarks import mixture


@pytest.fixture(scope="module")
def setup():
    return mixture.Setup()


@pytest.mark.parametrize("t", [0.0, 0.05, 0.4, 0.9, 1.0])
def test_velocity_and_density_are_those_of_samples(setup, t):
    """E[(eps - x_0) f(x_t)] = E[u(x_t) f(x_t)] for indicators f of bins, and p_t is the density of the samples."""
    draws = torch.Generator().manual_seed(0)
    count = 400_000
    chosen = torch.multinomial(setup.teacher.weights, count, replacement=True, generator=draws)
    clean, noise = torch.randn(2, count, generator=draws, dtype=torch.float64)
    clean = setup.teacher.means[chosen] + setup.teacher.deviations[chosen] * clean
    x, time = (1 - t) * clean + t * noise, torch.tensor(t).double()
    edges = torch.linspace(-3, 3, 13).double()
    bins = torch.bucketize(x, edges)
    u = setup.teacher(x, time)
    for number in range(1, len(edges)):
        there = bins == number
        spread = (noise - clean - u)[there].std() / there.sum() ** 0.5
        assert ((noise - clean)[there].mean() - u[there].mean()).abs() < 5 * spread
        inner = torch.linspace(edges[number - 1], edges[number], 201).double()
        share = torch.trapezoid(setup.teacher.log_density(inner, time).exp(), inner)
        assert there.double().mean() == pytest.approx(share.item(), abs=0.003)


def test_the_data_of_the_mixture(setup):
    """The share of good samples is that of the Gaussians: 99.73% of two, and of the wide one what lies in them."""
    normal = torch.distributions.Normal(0.0, 1.2)
    edges = torch.tensor([1.05, 1.95]).double()
    wide = 2 * (normal.cdf(edges[1]) - normal.cdf(edges[0])).item()
    found = mixture.compare(setup, setup.data)
    assert found["good"] == pytest.approx(0.85 * 0.9973 + 0.15 * wide, abs=0.002)
    assert found["w1_data"] == 0


def test_the_score_identity_of_adm_holds(setup):
    """s_T = -(x + (1 - t) u) / t, on which ADM's gradient rests."""
    x, t = torch.linspace(-2, 2, 9).double().requires_grad_(True), torch.tensor(0.3).double()
    (score,) = torch.autograd.grad(setup.teacher.log_density(x, t).sum(), x)
    u = setup.teacher(x.detach(), t)
    assert torch.allclose(score, -(x.detach() + (1 - t) * u) / t, atol=1e-10)


class Shifted(nn.Module):
    """The teacher plus a constant."""

    def __init__(self, teacher, shift: float = 0.0):
        super().__init__()
        self.teacher, self.shift = teacher, nn.Parameter(torch.tensor(shift).double())

    def forward(self, x, t):
        return self.teacher(x, t) + self.shift


@pytest.mark.parametrize("loss", [mixture.mse, mixture.own_mse, mixture.small_step, mixture.sampler_step])
def test_a_student_equal_to_the_teacher_stays_and_a_shifted_one_is_pulled_back(setup, loss):
    for shift, sign in ((0.0, 0), (0.1, 1), (-0.1, -1)):
        student = Shifted(setup.teacher, shift)
        (gradient,) = torch.autograd.grad(loss(setup, student), student.shift)
        assert gradient.sign() == sign if sign else gradient.abs() < 1e-12


class Linear(nn.Module):
    """A velocity a x + b, which makes the samples of the sampler normal."""

    def __init__(self, a: float, b: float):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.tensor(value).double()) for value in (a, b))

    def forward(self, x, t):
        return self.a * x + self.b


def test_the_exact_divergence_of_normal_samples(setup, monkeypatch):
    mean, deviation = 0.5, 2.0
    monkeypatch.setattr(setup, "teacher", mixture.Mixture((1.0,), (mean,), (deviation,)))
    student = Linear(0.7, -0.3)
    scale, shift = torch.ones(()).double(), torch.zeros(()).double()
    for t, t_next in zip(setup.times, setup.times[1:], strict=False):
        scale, shift = scale * (1 - (t - t_next) * student.a), shift - (t - t_next) * (student.a * shift + student.b)
    square = setup.noise.square().mean()  # a bit below 1, because the quantiles end
    expected = (deviation / scale).log() - square / 2
    expected = expected + ((scale**2 * square) + (shift - mean) ** 2) / (2 * deviation**2)
    assert scale < 0.6 and math.isclose(mixture.reverse_kl(setup, student).item(), expected.item(), abs_tol=1e-9)
    parameters = student.a, student.b
    wanted = torch.autograd.grad(expected, parameters)
    found = torch.autograd.grad(mixture.reverse_kl(setup, student), parameters)
    assert torch.allclose(torch.stack(found), torch.stack(wanted), atol=1e-9)


def test_the_command_compares_all_objectives(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mixture, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(mixture, "PICTURE", tmp_path / "picture.png")
    monkeypatch.setattr(mixture, "TRAIN_STEPS", 150)
    monkeypatch.setattr(mixture, "WIDTHS", (8,))
    monkeypatch.setattr(mixture, "SEEDS", 1)
    mixture.main([])
    text = capsys.readouterr().out
    (file,) = (tmp_path / "results").glob("*.json")
    rows = {row["setting"]: row for row in json.loads(file.read_text())["rows"]}
    assert len(rows) == 3 + len(mixture.OBJECTIVES)
    assert all(name.replace("|", "\\|") in text for name in rows)
    assert rows["teacher's samples"]["w1_samples"] == rows["teacher's data"]["w1_data"] == 0
    start = rows[mixture.START]
    for name in ("MSE on the teacher's states", "MSE on the student's own states", "ADM, small step"):
        assert rows[name]["own_state_error"] < start["own_state_error"]
    assert rows["ADM, one sampler step"]["own_state_error"] > start["own_state_error"]
    assert rows["exact KL(student || teacher)"]["w1_data"] < start["w1_data"]
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
