"""Regression on trajectories: its pairs, conditions and target velocities, and what a student learns from it."""

import pytest
import torch
from safetensors.torch import load_file
from toy import SHAPE, AffineFlow, toy_prompts, toy_store

from linvideo.distillation.regression import TrajectoryJumps
from linvideo.trajectories.store import TrajectoryStore

STORED = torch.tensor([1000.0, 800.0, 510.0, 200.0])
PROMPTS = toy_prompts()


def column(values):
    return values.view(-1, 1, 1, 1, 1)


class Recorded(AffineFlow):
    """A model that records (x, timestep, condition) of its calls."""

    def __init__(self, *coefficients):
        super().__init__(*coefficients)
        self.calls = []

    def forward(self, hidden_states, timestep, encoder_hidden_states, return_dict=False):
        self.calls.append((hidden_states, timestep, encoder_hidden_states.mean(dim=(1, 2))))
        return super().forward(hidden_states, timestep, encoder_hidden_states)


def read(store: TrajectoryStore) -> dict[str, torch.Tensor]:
    """Return the store's tensors over all shards, read from the files."""
    shards = [load_file(path) for path in sorted(store.path.glob("*.safetensors"))]
    return {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}


def with_offsets(path) -> TrajectoryStore:
    """Return a store of 4 trajectories whose states are at different timesteps, as with a stride."""
    store = TrajectoryStore(
        path, {"num_trajectories": 4, "shard_size": 3, "states_per_trajectory": 2, "guidance_scale": 1.0}
    )
    timesteps = torch.tensor([[900.0, 400.0], [1000.0, 600.0], [700.0, 100.0], [760.0, 740.0]])
    generator = torch.Generator().manual_seed(0)
    for number in range(2):
        rows = list(store.shard_trajectories(number))
        x, u = torch.randn(2, len(rows), 2, *SHAPE, generator=generator)
        states = {"x": x, "u": u, "timestep": timesteps[rows], "negative": torch.ones(len(rows), 2, dtype=torch.bool)}
        sample = torch.randn(len(rows), *SHAPE, generator=generator)
        store.write_shard(number, states | {"prompt": torch.tensor(rows) % 3, "sample": sample})
    return store


def test_each_timestep_uses_the_nearest_state_of_a_trajectory(tmp_path):
    jumps = TrajectoryJumps(toy_store(tmp_path / "a", STORED), PROMPTS, [1000.0, 750.0, 500.0, 250.0])
    assert jumps.nearest.tolist() == [[0, 1, 2, 3]] * 4
    jumps = TrajectoryJumps(toy_store(tmp_path / "a", STORED), PROMPTS, [1000.0, 540.0])
    assert jumps.nearest.tolist() == [[0, 2]] * 4
    jumps = TrajectoryJumps(with_offsets(tmp_path / "b"), PROMPTS, [1000.0, 750.0, 251.0])
    assert jumps.nearest.tolist() == [[0, 0, 1], [0, 1, 1], [0, 0, 1], [0, 0, 1]]
    # 1000: 900, 1000, 700, 760. 750: 900 (150 away, 400 is 350), 600, 700, 760 (a tie, the first). 251: the last


@pytest.mark.parametrize("make", [lambda path: toy_store(path, STORED), with_offsets], ids=["stock", "offsets"])
def test_the_loss_by_hand(make, tmp_path):
    store, timesteps = make(tmp_path / "store"), [1000.0, 540.0]
    stored, student = read(store), Recorded(0.5, 0.3)
    batch = 60
    loss = TrajectoryJumps(store, PROMPTS, timesteps).loss(student, range(batch), 3, "regression", 7)
    ((x, given, condition),) = student.calls

    def state_at(trajectory, timestep):
        return min(range(stored["timestep"].shape[1]), key=lambda i: abs(stored["timestep"][trajectory, i] - timestep))

    allowed = {(i, state_at(i, timestep)) for i in range(4) for timestep in timesteps}
    places, errors = [], []
    for row in range(batch):
        ((trajectory, state),) = (stored["x"] == x[row]).flatten(2).all(2).nonzero().tolist()
        places.append((trajectory, state))
        t = float(stored["timestep"][trajectory, state]) / 1000
        c = float(stored["prompt"][trajectory]) + 1  # the prompt's, even if the state was stored with the negative one
        assert given[row] == stored["timestep"][trajectory, state] and condition[row] == c
        target = (x[row] - stored["sample"][trajectory]) / t
        errors.append((0.5 * x[row] + 0.3 * t + c - target).square().mean())
    assert set(places) == allowed  # 60 fair draws from 8 would miss one once in 400 times; the seed is fixed
    assert any(stored["negative"][place] for place in places)
    assert float(loss.detach()) == pytest.approx(float(sum(errors)) / batch, rel=1e-5)
    loss.backward()
    assert student.scale.grad is not None


def test_draws_belong_to_positions_and_names(tmp_path):
    jumps, student = TrajectoryJumps(toy_store(tmp_path / "store", STORED), PROMPTS, [1000.0, 500.0]), Recorded(0.5)
    for positions, name in ((range(12), 0), (range(6), 0), (range(6, 12), 0), (range(12), 1)):
        jumps.loss(student, positions, "seed", name)
    whole, first, second, other = (call[0] for call in student.calls)
    assert torch.equal(whole, torch.cat([first, second])) and not torch.equal(whole, other)


def test_a_student_that_can_learn_the_jumps_does(tmp_path):
    """From these states a known affine velocity leads exactly to the sample, and fitting recovers it."""
    scale, shift = 0.4, 0.2
    request = {"num_trajectories": 6, "shard_size": 6, "states_per_trajectory": 4, "guidance_scale": 1.0}
    store = TrajectoryStore(tmp_path / "store", request)
    sample, prompt = torch.randn(6, 1, *SHAPE), torch.arange(6) % 3
    t = (STORED / 1000).view(1, 4, 1, 1, 1, 1)
    # (x - sample) / t = scale x + shift t + c
    x = (sample + t * (shift * t + (prompt + 1.0).view(6, 1, 1, 1, 1, 1))) / (1 - scale * t)
    states = {"x": x, "u": torch.zeros_like(x), "timestep": STORED.expand(6, 4).clone()}
    states |= {"negative": torch.rand(6, 4) < 0.5, "prompt": prompt, "sample": sample[:, 0]}
    store.write_shard(0, states)

    student = AffineFlow(0.0, 0.0)
    jumps = TrajectoryJumps(store, PROMPTS, [1000.0, 500.0, 250.0])
    optimizer = torch.optim.LBFGS(student.parameters(), max_iter=50)

    def closure():
        optimizer.zero_grad()
        loss = jumps.loss(student, range(32), "fit")
        loss.backward()
        return loss

    optimizer.step(closure)
    assert float(student.scale.detach()) == pytest.approx(scale, abs=1e-4)
    assert float(student.shift.detach()) == pytest.approx(shift, abs=1e-4)
