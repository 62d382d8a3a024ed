"""Objectives where everything is known: `python -m benchmarks.mixture`, two minutes on a CPU core.

Does anytime distribution matching (ADM) move a student towards its teacher's distribution, or towards its modes? Here
the teacher samples from a mixture of three Gaussians on a line, two narrow ones, the "good" samples, and a wide one
between them. Its velocity and its score are known in closed form. The student has too little capacity: at each of the
sampler's steps its velocity is piecewise linear in x. Expectations are sums over the quantiles of the noise, so nothing
is random, and the fixed points of MSE are least-squares fits.

It prints a table, and writes the rows to benchmarks/results/mixture and a picture to docs/results/mixture.png.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import results
from benchmarks.tables import table_line
from linvideo.run.gradient import descend
from linvideo.transfer.objectives import adm_gradient, score_weight

WEIGHTS, MEANS, DEVIATIONS = (0.60, 0.25, 0.15), (-1.5, 1.5, 0.0), (0.15, 0.15, 1.2)
GOOD = 3.0  # standard deviations from the mean of a narrow Gaussian, within which a sample is good
STEPS, SHIFT = 24, 4.0  # of the sampler
PARTICLES = 1001
KNOTS, REACH = 10, 3.0  # of the student's velocity: equally spaced in [-REACH, REACH]
LEARNING_RATE = 3e-2
HEADINGS = ("", "good, %", "of these in the smaller mode, %", "deviation in the modes", "W1 to the teacher")
FOLDER, PICTURE = results.FOLDER / "mixture", Path(__file__).parents[1] / "docs" / "results" / "mixture.png"


class Mixture:
    """A mixture of Gaussians on a line, seen through rectified flow: x_t = (1 - t) x_0 + t eps.

    Args:
        weights, means, deviations: Those of the components.
    """

    def __init__(self, weights: tuple[float, ...], means: tuple[float, ...], deviations: tuple[float, ...]):
        self.weights, self.means, self.deviations = (torch.tensor(x).double() for x in (weights, means, deviations))

    def log_density(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Return log p_t(x) [n] of x [n]."""
        return self._joint(x, t).logsumexp(1)

    def velocity(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Return u(x, t) = E[eps - x_0 | x_t = x] [n] of x [n]."""
        variance, offset = self._variance(t), x[:, None] - (1 - t) * self.means
        clean = self.means + (1 - t) * self.deviations.square() / variance * offset
        return (self._joint(x, t).softmax(1) * (t / variance * offset - clean)).sum(1)

    def _variance(self, t: torch.Tensor) -> torch.Tensor:
        return ((1 - t) * self.deviations).square() + t**2

    def _joint(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Return log(weight_i p_t(x | i)) [n, components]."""
        variance = self._variance(t)
        square = (x[:, None] - (1 - t) * self.means).square() / variance
        return self.weights.log() - 0.5 * (square + (2 * math.pi * variance).log())


class Flow:
    """A sampler, with the teacher and the basis of the student's velocities.

    A student is a tensor [STEPS, KNOTS + 2]: at step k its velocity is basis(x) @ student[k].
    """

    def __init__(self):
        s = torch.linspace(1, 0, STEPS + 1).double()
        self.t = SHIFT * s / (1 + (SHIFT - 1) * s)
        self.teacher = Mixture(WEIGHTS, MEANS, DEVIATIONS)
        quantiles = (torch.arange(PARTICLES).double() + 0.5) / PARTICLES
        self.noise = torch.distributions.Normal(0.0, 1.0).icdf(quantiles)
        self.knots = torch.linspace(-REACH, REACH, KNOTS).double()

    def basis(self, x: torch.Tensor) -> torch.Tensor:
        """Return the basis functions [n, KNOTS + 2] at x [n]: a hat on each knot, and a slope beyond either end."""
        hats = (1 - (x[:, None] - self.knots).abs() / (self.knots[1] - self.knots[0])).clamp(min=0)
        return torch.cat([hats, (x - REACH).clamp(min=0)[:, None], (x + REACH).clamp(max=0)[:, None]], 1)

    def fitted(self, x: torch.Tensor, k: int) -> torch.Tensor:
        """Return the weights [KNOTS + 2] with the least squared error to the teacher's velocity at x [n] and step k."""
        basis = self.basis(x)
        square = basis.T @ basis / len(x) + 1e-9 * torch.eye(basis.shape[1])
        return torch.linalg.solve(square, basis.T @ self.teacher.velocity(x, self.t[k]) / len(x))

    def rollout(self, velocity: Callable[[torch.Tensor, int], torch.Tensor]) -> list[torch.Tensor]:
        """Return the states [n] before each step and after the last; velocity(x, k) is that at step k."""
        states = [self.noise]
        for k in range(STEPS):
            states.append(states[-1] - (self.t[k] - self.t[k + 1]) * velocity(states[-1], k))
        return states

    def teacher_states(self) -> list[torch.Tensor]:
        return self.rollout(lambda x, k: self.teacher.velocity(x, self.t[k]))

    def states(self, student: torch.Tensor) -> list[torch.Tensor]:
        return self.rollout(lambda x, k: self.basis(x) @ student[k])


def mse(flow: Flow) -> torch.Tensor:
    """Return the student with the least velocity error on the teacher's states."""
    return torch.stack([flow.fitted(x, k) for k, x in enumerate(flow.teacher_states()[:-1])])


def own_mse(flow: Flow) -> torch.Tensor:
    """Return the student with the least velocity error on its own states, which depend on its earlier steps only."""
    weights = []

    def fit_and_move(x: torch.Tensor, k: int) -> torch.Tensor:
        weights.append(flow.fitted(x, k))
        return flow.basis(x) @ weights[k]

    flow.rollout(fit_and_move)
    return torch.stack(weights)


def small_step_loss(flow: Flow, student: torch.Tensor, dt: float = 0.01) -> torch.Tensor:
    """Return the loss of small-step ADM, summed over the sampler's steps: see linvideo.transfer.objectives."""
    total = torch.zeros((), dtype=torch.float64)
    for k, x in enumerate(flow.states(student.detach())[:-1]):
        step = min(dt, (flow.t[k] - flow.t[k + 1]).item() / 2)
        u = flow.basis(x) @ student[k]
        x_hat, t = (x - step * u).detach(), flow.t[k] - step
        gradient = flow.teacher.velocity(x_hat, t) - flow.basis(x_hat) @ student[k].detach()
        total = total + descend(-u, gradient, gradient.square().mean())
    return total


def sampler_step_loss(flow: Flow, student: torch.Tensor, weight_clip: float = 5.0) -> torch.Tensor:
    """Return the loss of ADM after one sampler step with the weight (1 - t) / t, the paper's text as we read it."""
    total, fixed = torch.zeros((), dtype=torch.float64), student.detach()
    for k, x in enumerate(flow.states(fixed)[:-1]):
        last = k == STEPS - 1  # at t = 0 there is no score
        t = flow.t[k] / 2 if last else flow.t[k + 1]
        x_hat = x - (flow.t[k] - t) * (flow.basis(x) @ student[k])
        u_teacher = flow.teacher.velocity(x_hat.detach(), t)
        u_student = flow.basis(x_hat.detach()) @ fixed[k if last else k + 1]
        gradient = adm_gradient(u_teacher, u_student, score_weight(t[None], weight_clip))
        total = total + descend(x_hat, gradient, (u_teacher - u_student).square().mean())
    return total


def reverse_kl(flow: Flow, student: torch.Tensor) -> torch.Tensor:
    """Return KL(student's samples || teacher's data), with the exact density of the samples: that of the noise, divided
    by the slope of the sampler's map."""
    noise = flow.noise.clone().requires_grad_(True)
    x = flow_end(flow, noise, student)
    (slope,) = torch.autograd.grad(x.sum(), noise, create_graph=True)
    log_density = torch.distributions.Normal(0.0, 1.0).log_prob(noise) - slope.abs().clamp(min=1e-6).log()
    return (log_density - flow.teacher.log_density(x, flow.t[-1])).mean()


def flow_end(flow: Flow, noise: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    x = noise
    for k in range(STEPS):
        x = x - (flow.t[k] - flow.t[k + 1]) * (flow.basis(x) @ student[k])
    return x


def train(flow: Flow, student: torch.Tensor, loss: Callable, steps: int) -> torch.Tensor:
    """Return the student after `steps` steps of Adam with a cosine schedule."""
    student = student.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([student], lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(flow, student).backward()
        optimizer.step()
        schedule.step()
    return student.detach()


def measure(flow: Flow, samples: torch.Tensor) -> dict[str, float]:
    """Compare samples [n], one for each quantile of the noise, with the teacher's."""
    inside = [(samples - MEANS[i]).abs() < GOOD * DEVIATIONS[i] for i in (0, 1)]
    good = (inside[0] | inside[1]).sum().item()
    squares = sum((samples[mode] - samples[mode].mean()).square().sum().item() for mode in inside if mode.any())
    teacher = flow.teacher_states()[-1]
    return {
        "good": good / len(samples),
        "smaller_mode": inside[1].sum().item() / max(good, 1),
        "deviation": math.sqrt(squares / max(good, 1)),
        "w1": (samples.sort().values - teacher.sort().values).abs().mean().item(),
    }


def students(flow: Flow) -> dict[str, torch.Tensor]:
    """Return the samples [n] of the teacher and of all students, by name."""
    start = mse(flow)
    trained = {
        "MSE on the teacher's states": start,
        "MSE on the student's own states": own_mse(flow),
        **{f"ADM, small step, {n:,} steps": train(flow, start, small_step_loss, n) for n in (300, 2000)},
        **{f"ADM, one sampler step, {n:,} steps": train(flow, start, sampler_step_loss, n) for n in (300, 1000, 2000)},
        "exact KL(student || teacher), 2,000 steps": train(flow, start, reverse_kl, 2000),
    }
    return {"teacher": flow.teacher_states()[-1]} | {name: flow.states(s)[-1] for name, s in trained.items()}


def line(row: dict) -> str:
    shares = [f"{100 * row[key]:.1f}" for key in ("good", "smaller_mode")]
    return table_line([row["setting"], *shares, *(f"{row[key]:.3f}" for key in ("deviation", "w1"))])


def draw(samples: dict[str, torch.Tensor], path: Path) -> None:
    """Draw a histogram of each one's samples."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    for axis, (name, x) in zip(figure.subplots(2, 4, sharex=True).flat, samples.items(), strict=True):
        axis.hist(samples["teacher"].numpy(), bins=120, range=(-3, 3), color="0.85")
        axis.hist(x.numpy(), bins=120, range=(-3, 3), histtype="step", color="C0")
        axis.set(yscale="log", ylim=(0.8, PARTICLES), xlabel="x", ylabel="samples")
        axis.set_title(name, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.mixture", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--no_report", action="store_true", help="print only, write no result and no picture")
    args = parser.parse_args(arguments)
    flow = Flow()
    samples = students(flow)
    rows = [{"setting": name} | measure(flow, x) for name, x in samples.items()]
    print("\n".join([table_line(HEADINGS), "|---|" + "---:|" * (len(HEADINGS) - 1), *map(line, rows)]))
    if not args.no_report:
        draw(samples, PICTURE)
        document = {"format": 1, "environment": results.environment({}), "rows": rows}
        print(f"wrote {results.keep(document, FOLDER, 'mixture')} and {PICTURE}")


if __name__ == "__main__":
    main()
