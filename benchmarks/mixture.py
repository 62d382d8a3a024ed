"""Objectives where everything is known: `python -m benchmarks.mixture`, a few minutes on a CPU core.

Does anytime distribution matching (ADM) move a student towards its teacher's distribution, or towards its modes? Here
the teacher samples from a mixture of three Gaussians on a line, two narrow ones, the "good" samples, and a wide one
between them. Its velocity and its score are known in closed form. The student is a network that is too small to be
equal to the teacher. All students continue from the same one, which was trained shortly with MSE, as fine-tuning
continues from a conversion. Expectations are means over the quantiles of the noise, so the sampling error is small.

It prints a table, and writes the rows to benchmarks/results/mixture and a picture to docs/results/mixture.png.
"""

import argparse
import copy
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks import results
from benchmarks.tables import table_line
from linvideo.run.gradient import descend
from linvideo.transfer.objectives import ObjectiveConfig, adm_gradient, score_weight

WEIGHTS, MEANS, DEVIATIONS = (0.60, 0.25, 0.15), (-1.5, 1.5, 0.0), (0.15, 0.15, 1.2)
GOOD = 3.0  # standard deviations from the mean of a narrow Gaussian, within which a sample is good
STEPS, SHIFT = 12, 4.0  # of the sampler, as in the small world
PARTICLES = 501
WIDTH = 8  # of the student's two hidden layers
START_STEPS, START_RATE = 300, 1e-2  # of the training that all students share
RATE, LENGTHS = 3e-3, (300, 1200)
HEADINGS = (
    "", "good, %", "of these in the smaller mode, %", "deviation in the modes", "W1 to the teacher", "velocity error"
)  # fmt: skip
FOLDER, PICTURE = results.FOLDER / "mixture", Path(__file__).parents[1] / "docs" / "results" / "mixture.png"


class Mixture:
    """A mixture of Gaussians on a line, seen through rectified flow: x_t = (1 - t) x_0 + t eps.

    Args:
        weights, means, deviations: Those of the components.
    """

    def __init__(self, weights: tuple[float, ...], means: tuple[float, ...], deviations: tuple[float, ...]):
        self.weights, self.means, self.deviations = (torch.tensor(x).double() for x in (weights, means, deviations))

    def log_density(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Return log p_t(x) of x [...] at t [...]."""
        return self._joint(x, t).logsumexp(-1)

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Return the velocity E[eps - x_0 | x_t = x] of x [...] at t [...]."""
        variance, offset = self._variance(t), self._offset(x, t)
        clean = self.means + (1 - t[..., None]) * self.deviations.square() / variance * offset
        return (self._joint(x, t).softmax(-1) * (t[..., None] / variance * offset - clean)).sum(-1)

    def _variance(self, t: torch.Tensor) -> torch.Tensor:
        return ((1 - t[..., None]) * self.deviations).square() + t[..., None] ** 2

    def _offset(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x[..., None] - (1 - t[..., None]) * self.means

    def _joint(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Return log(weight_i p_t(x | i)) [..., components]."""
        variance = self._variance(t)
        square = self._offset(x, t).square() / variance
        return self.weights.log() - 0.5 * (square + (2 * math.pi * variance).log())


class Student(nn.Module):
    """A small network for the velocity of x [...] at t [...]."""

    def __init__(self):
        super().__init__()
        hidden = nn.Linear(2, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh()
        self.layers = nn.Sequential(*hidden, nn.Linear(WIDTH, 1)).double()

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        s = t / (SHIFT - (SHIFT - 1) * t)  # evenly spaced over the sampler's steps
        return self.layers(torch.stack([x, 4 * s.expand_as(x) - 2], -1))[..., 0]


class Setup:
    """The teacher, the sampler and the noise."""

    def __init__(self):
        s = torch.linspace(1, 0, STEPS + 1).double()
        self.times = SHIFT * s / (1 + (SHIFT - 1) * s)
        self.teacher = Mixture(WEIGHTS, MEANS, DEVIATIONS)
        quantiles = (torch.arange(PARTICLES).double() + 0.5) / PARTICLES
        self.noise = torch.distributions.Normal(0.0, 1.0).icdf(quantiles)
        self.teacher_states = self.states(self.teacher)  # [STEPS + 1, n]

    @property
    def t(self) -> torch.Tensor:
        """[STEPS, 1], the t before each step."""
        return self.times[:-1, None]

    def states(self, velocity: Callable, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Return the states [STEPS + 1, n] before each step and after the last."""
        states = [self.noise if noise is None else noise]
        for t, t_next in zip(self.times, self.times[1:], strict=False):
            states.append(states[-1] - (t - t_next) * velocity(states[-1], t))
        return torch.stack(states)

    @torch.no_grad()
    def own_states(self, student: Student) -> torch.Tensor:
        """Return the states [STEPS, n] before each step of the student's own samples."""
        return self.states(student)[:-1]

    def error(self, velocity: Callable, x: torch.Tensor) -> torch.Tensor:
        """Return the velocity error on states x [STEPS, n] before each step."""
        return (velocity(x, self.t) - self.teacher(x, self.t)).square().mean()


def mse(setup: Setup, student: Student) -> torch.Tensor:
    """Return the velocity error on the teacher's states."""
    return setup.error(student, setup.teacher_states[:-1])


def own_mse(setup: Setup, student: Student) -> torch.Tensor:
    """Return the velocity error on the student's own states."""
    return setup.error(student, setup.own_states(student))


def small_step(setup: Setup, student: Student) -> torch.Tensor:
    """Return the loss of small-step ADM, as linvideo.transfer.objectives.adm_small_step with its largest step."""
    x, t = setup.own_states(student), setup.t
    dt = (t / 2).clamp(max=ObjectiveConfig.max_dt)
    u = student(x, t)
    x_hat = (x - dt * u).detach()
    return _adm(setup, student, -u, x_hat, t - dt, torch.ones_like(t))


def sampler_step(setup: Setup, student: Student) -> torch.Tensor:
    """Return the loss of ADM after one sampler step, as linvideo.transfer.objectives.adm_sampler_step."""
    x, t = setup.own_states(student), setup.t
    end = setup.times[1:, None].clone()
    end[-1] = t[-1] / 2  # at t = 0 there is no score
    x_hat = x - (t - end) * student(x, t)
    return _adm(setup, student, x_hat, x_hat.detach(), end, score_weight(end, ObjectiveConfig.weight_clip))


def _adm(setup, student, moved, x_hat, t, weight) -> torch.Tensor:
    with torch.no_grad():
        u_teacher, u_student = setup.teacher(x_hat, t), student(x_hat, t)
    return descend(moved, adm_gradient(u_teacher, u_student, weight), (u_teacher - u_student).square().mean())


def reverse_kl(setup: Setup, student: Student) -> torch.Tensor:
    """Return KL(student's samples || teacher's data), which ADM is derived from, with the exact density of the samples.

    It is that of the noise, divided by the slope of the sampler's map.
    """
    noise = setup.noise.clone().requires_grad_(True)
    x = setup.states(student, noise)[-1]
    (slope,) = torch.autograd.grad(x.sum(), noise, create_graph=True)
    log_density = torch.distributions.Normal(0.0, 1.0).log_prob(noise) - slope.abs().clamp(min=1e-6).log()
    return (log_density - setup.teacher.log_density(x, setup.times[-1])).mean()


OBJECTIVES = {
    "MSE on the teacher's states": mse,
    "MSE on the student's own states": own_mse,
    "ADM, small step": small_step,
    "ADM, one sampler step": sampler_step,
    "exact KL(student || teacher)": reverse_kl,
}


def train(setup: Setup, student: Student, loss: Callable, steps: int, rate: float) -> Student:
    """Return a copy of the student after `steps` steps of Adam with a cosine schedule."""
    student = copy.deepcopy(student)
    optimizer = torch.optim.Adam(student.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(setup, student).backward()
        optimizer.step()
        schedule.step()
    return student


def measure(setup: Setup, velocity: Callable) -> dict[str, float]:
    """Compare the samples of a student, or of the teacher, with the teacher's."""
    with torch.no_grad():
        states = setup.states(velocity)
        error = setup.error(velocity, states[:-1]).item()
    x, teacher = states[-1], setup.teacher_states[-1]
    inside = [(x - MEANS[i]).abs() < GOOD * DEVIATIONS[i] for i in (0, 1)]
    good = (inside[0] | inside[1]).sum().item()
    squares = sum((x[mode] - x[mode].mean()).square().sum().item() for mode in inside if mode.any())
    return {
        "good": good / len(x),
        "smaller_mode": inside[1].sum().item() / max(good, 1),
        "deviation": math.sqrt(squares / max(good, 1)),
        "w1": (x.sort().values - teacher.sort().values).abs().mean().item(),
        "own_state_error": error,
    }


def line(row: dict) -> str:
    shares = [f"{100 * row[key]:.1f}" for key in ("good", "smaller_mode")]
    rest = [f"{row[key]:.3f}" for key in ("deviation", "w1", "own_state_error")]
    return table_line([row["setting"], *shares, *rest])


def students(setup: Setup) -> dict[str, Callable]:
    """Return the teacher and all students by name."""
    torch.manual_seed(0)
    start = train(setup, Student(), mse, START_STEPS, START_RATE)
    trained = {
        f"{name}, {length:,} steps": train(setup, start, loss, length, RATE)
        for name, loss in OBJECTIVES.items()
        for length in LENGTHS
    }
    return {"teacher": setup.teacher, "start of all students": start, **trained}


def draw(setup: Setup, found: dict[str, Callable], path: Path) -> None:
    """Draw a histogram of the samples of each one, over the teacher's in grey."""
    from matplotlib.figure import Figure

    columns = 4
    figure = Figure(figsize=(13, 2.6 * math.ceil(len(found) / columns)), layout="constrained")
    axes = figure.subplots(math.ceil(len(found) / columns), columns, sharex=True, squeeze=False).flat
    bins = {"bins": 80, "range": (-3, 3)}
    teacher = setup.teacher_states[-1].numpy()
    for axis, (name, velocity) in zip(axes, found.items(), strict=False):
        with torch.no_grad():
            axis.hist(teacher, color="0.85", **bins)
            axis.hist(setup.states(velocity)[-1].numpy(), histtype="step", color="C0", **bins)
        axis.set(yscale="log", ylim=(0.8, PARTICLES / 2), xlabel="x")
        axis.set_title(name, fontsize=8)
    for axis in list(axes):
        axis.set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.mixture", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--no_report", action="store_true", help="print only, write no result and no picture")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the tensors are small
    setup = Setup()
    found = students(setup)
    rows = [{"setting": name} | measure(setup, velocity) for name, velocity in found.items()]
    print("\n".join([table_line(HEADINGS), "|---|" + "---:|" * (len(HEADINGS) - 1), *map(line, rows)]))
    if not args.no_report:
        document = {"format": 1, "environment": results.environment({}), "rows": rows}
        print(f"wrote {results.keep(document, FOLDER, 'mixture')}")
        draw(setup, found, PICTURE)
        print(f"wrote {PICTURE}")


if __name__ == "__main__":
    main()
