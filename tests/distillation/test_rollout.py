"""The rollout in training matches the sampler at inference."""

import pytest
import torch
from toy import SHAPE, AffineFlow, toy_prompts

from linvideo.distillation.rollout import jump, noised, states_at
from linvideo.models import FewStepScheduler
from linvideo.trajectories.flow import predict_velocity

TIMESTEPS = [[1000.0], [1000.0, 500.0], [1000.0, 750.0, 500.0, 250.0], [980.0, 930.0, 410.0]]


class Counted(AffineFlow):
    calls = 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return super().forward(*args, **kwargs)


def setting(timesteps, batch):
    conditions = toy_prompts().conditions(torch.arange(batch) % 3)
    # includes noise for the sampler's last step, which multiplies it by 0
    noise = torch.randn(len(timesteps) + 1, batch, *SHAPE, generator=torch.Generator().manual_seed(1))
    return Counted(0.5, 0.3), torch.tensor(timesteps) / 1000, noise, conditions


def sampled(student, timesteps, noise, conditions, monkeypatch):
    """Return the states [K + 1, B, ...] of the sampler with the given noise; the last one is the end."""
    drawn = iter(noise[1:])
    monkeypatch.setattr("linvideo.models.few_step.randn_tensor", lambda *_: next(drawn))
    scheduler = FewStepScheduler(timesteps)
    scheduler.set_timesteps()
    states = [noise[0]]
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            u = predict_velocity(student, states[-1], timestep, conditions)
            states.append(scheduler.step(u, timestep, states[-1], return_dict=False)[0])
    assert len(states) == len(timesteps) + 1
    return torch.stack(states)


@pytest.mark.parametrize("timesteps", TIMESTEPS, ids=str)
def test_the_states_are_the_samplers(timesteps, monkeypatch):
    student, sigmas, noise, conditions = setting(timesteps, batch=5)
    states = sampled(student, timesteps, noise, conditions, monkeypatch)
    for index in range(len(timesteps)):
        chosen = torch.full((5,), index)
        x = states_at(student, sigmas, chosen, noise.__getitem__, conditions)
        # a few fp32 operations per step on numbers of order 10, in another order
        assert torch.allclose(x, states[index], rtol=1e-5, atol=1e-5)
    last = jump(student, x, sigmas[chosen], conditions)
    assert torch.allclose(last, states[-1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(states[0], states[-1], atol=0.1)


def test_every_sample_has_its_own_step(monkeypatch):
    timesteps, index = TIMESTEPS[2], torch.tensor([2, 0, 3, 1, 2, 3])
    student, sigmas, noise, conditions = setting(timesteps, batch=6)
    states = sampled(student, timesteps, noise, conditions, monkeypatch)
    x = states_at(student, sigmas, index, noise.__getitem__, conditions)
    expected = torch.stack([states[k, sample] for sample, k in enumerate(index.tolist())])
    assert torch.allclose(x, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(x[1], noise[0, 1])


@pytest.mark.parametrize("index", [[0, 0, 0], [3, 3, 3], [0, 3, 1]])
def test_the_number_of_forwards_does_not_depend_on_the_steps(index):
    student, sigmas, noise, conditions = setting(TIMESTEPS[2], batch=3)
    asked = []
    states_at(student, sigmas, torch.tensor(index), lambda k: (asked.append(k), noise[k])[1], conditions)
    assert student.calls == 3 and asked == [0, 1, 2, 3]


def test_noise_is_not_changed_and_states_are_not_views():
    student, sigmas, noise, conditions = setting(TIMESTEPS[2], batch=3)
    before = noise.clone()
    x = states_at(student, sigmas, torch.tensor([0, 1, 2]), noise.__getitem__, conditions)
    x.zero_()
    assert torch.equal(noise, before)


def test_only_the_jump_has_a_gradient():
    student, sigmas, noise, conditions = setting(TIMESTEPS[2], batch=4)
    index = torch.tensor([3, 2, 1, 3])
    x = states_at(student, sigmas, index, noise.__getitem__, conditions)
    assert not x.requires_grad and torch.is_grad_enabled()
    t = sigmas[index]
    jump(student, x, t, conditions).sum().backward()
    # d (x - t (scale x + shift t + c)) with x fixed
    assert torch.allclose(student.scale.grad, -(t.view(-1, 1, 1, 1, 1) * x).sum(), rtol=1e-5)
    assert torch.allclose(student.shift.grad, -(t.square() * x[0].numel()).sum(), rtol=1e-5)


def test_noised_mixes_sample_and_noise():
    clean, noise = torch.randn(2, 3, *SHAPE)
    x = noised(clean, torch.tensor([0.0, 0.25, 1.0]), noise)
    assert torch.equal(x[0], clean[0]) and torch.equal(x[2], noise[2])
    assert torch.allclose(x[1], 0.75 * clean[1] + 0.25 * noise[1])
