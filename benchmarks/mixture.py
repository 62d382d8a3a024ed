"""Objectives where everything is known: `python -m benchmarks.mixture`, a few minutes on a CPU core.

Does anytime distribution matching (ADM) move a student towards its teacher's distribution, or towards its modes? Here
the teacher's data are a mixture of three Gaussians on a line, two narrow ones, the "good" samples, and a wide one
between them. Its velocity and its score are known in closed form. The students are networks of two sizes, both too
small to be equal to the teacher. All students of a size and a seed continue from the same one, which was trained
shortly with MSE, as fine-tuning continues from a conversion. Expectations are means over the quantiles of the noise, so
the sampling error is small.

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
from benchmarks.ablations.ablations_report import spread
from benchmarks.tables import table_head, table_line
from linvideo.run.gradient import descend
from linvideo.transfer.objectives import ObjectiveConfig, adm_gradient, score_weight

WEIGHTS, MEANS, DEVIATIONS = (0.60, 0.25, 0.15), (-1.5, 1.5, 0.0), (0.15, 0.15, 1.2)
GOOD = 3.0  # standard deviations from the mean of a narrow Gaussian, within which a sample is good
STEPS, SHIFT = 12, 4.0  # of the sampler, as in the small world
PARTICLES = 501
WIDTHS = (8, 3)  # of the students' two hidden layers
SEEDS = 3
START_STEPS, START_RATE = 300, 1e-2  # of the training that all students share
TRAIN_STEPS, RATE = 1200, 3e-3
FIGURES = (
    ("good", "good, %", ".1f", 100),
    ("smaller_mode", "of these in the smaller mode, %", ".1f", 100),
    ("w1_samples", "W1 to the teacher's samples", ".3f", 1),
    ("w1_data", "W1 to the teacher's data", ".3f", 1),
    ("own_state_error", "velocity error", ".3f", 1),
)
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

    def quantiles(self, shares: torch.Tensor) -> torch.Tensor:
        """Return the points [n] below which these shares [n] of the data (t = 0) lie, to within 1e-4."""
        x = torch.arange(-8, 8, 1e-4).double()
        below = (torch.distributions.Normal(self.means, self.deviations).cdf(x[:, None]) * self.weights).sum(-1)
        return x[torch.searchsorted(below, shares)]

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
    """A network for the velocity of x [...] at t [...], with two hidden layers of `width` units."""

    def __init__(self, width: int):
        super().__init__()
        hidden = nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()
        self.layers = nn.Sequential(*hidden, nn.Linear(width, 1)).double()

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
        self.data = self.teacher.quantiles(quantiles)  # [n]; what the teacher would sample in infinitely many steps

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


START = "start of all others"
OBJECTIVES = {
    "MSE on the teacher's states": mse,
    "MSE on the student's own states": own_mse,
    "ADM, small step": small_step,
    "ADM, one sampler step": sampler_step,
    "exact KL(student || teacher)": reverse_kl,
}


def fit(setup: Setup, student: Student, loss: Callable, steps: int, rate: float) -> Student:
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


def compare(setup: Setup, x: torch.Tensor) -> dict[str, float]:
    """Compare samples x [n] with the teacher's samples and its data."""
    inside = [(x - MEANS[i]).abs() < GOOD * DEVIATIONS[i] for i in (0, 1)]
    good = (inside[0] | inside[1]).sum().item()
    ordered = x.sort().values
    return {
        "good": good / len(x),
        "smaller_mode": inside[1].sum().item() / max(good, 1),
        "w1_samples": (ordered - setup.teacher_states[-1].sort().values).abs().mean().item(),
        "w1_data": (ordered - setup.data).abs().mean().item(),
    }


@torch.no_grad()
def measure(setup: Setup, student: Student) -> dict[str, float]:
    """Return all figures of a student."""
    states = setup.states(student)
    return compare(setup, states[-1]) | {"own_state_error": setup.error(student, states[:-1]).item()}


def students(setup: Setup, width: int, seed: int) -> dict[str, Student]:
    """Return the student that all start from, and one trained with each objective, by name."""
    torch.manual_seed(seed)
    start = fit(setup, Student(width), mse, START_STEPS, START_RATE)
    return {START: start} | {name: fit(setup, start, loss, TRAIN_STEPS, RATE) for name, loss in OBJECTIVES.items()}


def table(rows: list[dict]) -> list[str]:
    """Return a table of the means over seeds ± their standard deviation."""
    lines = table_head(["", *(heading for _, heading, _, _ in FIGURES)], texts=1)
    for kind in dict.fromkeys((row["setting"], row["width"]) for row in rows):
        chosen = [row for row in rows if (row["setting"], row["width"]) == kind]
        name, width = kind
        cells = [spread([row.get(key) for row in chosen], form, by) for key, _, form, by in FIGURES]
        lines.append(table_line([name if width is None else f"width {width}: {name}", *cells]))
    return lines


def draw(setup: Setup, found: dict[int, dict[str, Student]], path: Path) -> None:
    """Draw a histogram of each student's samples over the teacher's in grey, with a row for each width."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 2.5 * len(found)), layout="constrained")
    axes = figure.subplots(len(found), 1 + len(OBJECTIVES), sharex=True, sharey=True, squeeze=False)
    bins = {"bins": 80, "range": (-3, 3)}
    teacher = setup.teacher_states[-1].numpy()
    for row, (width, of_this_width) in zip(axes, found.items(), strict=True):
        for axis, (name, student) in zip(row, of_this_width.items(), strict=True):
            with torch.no_grad():
                samples = setup.states(student)[-1].numpy()
            axis.hist(teacher, color="0.85", **bins)
            axis.hist(samples, histtype="step", color="C0", **bins)
            axis.set(yscale="log", ylim=(0.8, PARTICLES / 2))
            axis.set_title(f"width {width}: {name}", fontsize=8)
    figure.supxlabel("x", fontsize=8)
    figure.supylabel("samples in a bin", fontsize=8)
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
    rows = [{"setting": "teacher's data", "width": None} | compare(setup, setup.data)]
    rows.append({"setting": "teacher's samples", "width": None} | compare(setup, setup.teacher_states[-1]))
    first = {}
    for width in WIDTHS:
        for seed in range(SEEDS):
            found = students(setup, width, seed)
            first.setdefault(width, found)
            which = {"width": width, "seed": seed}
            rows += [{"setting": name} | which | measure(setup, student) for name, student in found.items()]
    print("\n".join(table(rows)))
    if not args.no_report:
        document = {"format": 1, "environment": results.environment({}), "rows": rows}
        print(f"wrote {results.keep(document, FOLDER, 'mixture')}")
        draw(setup, first, PICTURE)
        print(f"wrote {PICTURE}")


if __name__ == "__main__":
    main()
