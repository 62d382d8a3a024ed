import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from toy import SHAPE, AffineFlow, toy_prompts, toy_store

from linvideo.trajectories.flow import predict_velocity, sample_steps, sampler_grid
from linvideo.trajectories.seeding import draw_noise
from linvideo.transfer.rollouts import StudentRollouts

SCHEDULER = FlowMatchEulerDiscreteScheduler(shift=3.0)
STEPS = 5


def make_rollouts(tmp_path, count=4, **request):
    timesteps, sigmas = sampler_grid(SCHEDULER, STEPS)
    store = toy_store(tmp_path / "store", timesteps, **request)
    return StudentRollouts(range(count), store, toy_prompts(), timesteps, sigmas, seed=5, device="cpu")


def advance(rollouts, student):
    rollouts.advance(student, predict_velocity(student, rollouts.x, rollouts.timestep, rollouts.conditions()))


def test_rollouts_start_on_stored_states_at_various_t(tmp_path):
    rollouts = make_rollouts(tmp_path, count=16)
    assert len(set(rollouts.step.tolist())) > 2
    assert torch.equal(rollouts.sigma, rollouts.timestep / 1000)
    assert rollouts.restarts.sum() == 0


def test_a_guided_rollout_follows_the_guided_sampler(tmp_path):
    student = AffineFlow(0.4, 0.2)
    rollouts = make_rollouts(tmp_path, guidance_scale=3.0, negative_probability=0.5)
    rollouts.step[:] = STEPS - 1
    advance(rollouts, student)  # every rollout restarts
    assert rollouts.restarts.tolist() == [1] * 4 and rollouts.step.tolist() == [0] * 4
    noise = torch.stack([draw_noise(SHAPE, 5, "lane", index, 1, "noise") for index in range(4)])
    assert torch.equal(rollouts.x, noise)
    assert 0 < int(rollouts.negative.sum()) < 4  # both conditions occur, and both follow the same sampler

    prompts, prompt = toy_prompts(), rollouts.prompt.clone()
    negative = prompts.conditions(prompt, torch.ones(4, dtype=torch.bool))
    for step in sample_steps(student, SCHEDULER, STEPS, noise, prompts.conditions(prompt), negative, 3.0):
        assert torch.allclose(rollouts.x, step.x, atol=1e-5)
        advance(rollouts, student)
    assert rollouts.restarts.tolist() == [2] * 4


def test_an_unguided_rollout_is_moved_by_the_velocity_it_was_given(tmp_path):
    student, rollouts = AffineFlow(0.4, 0.2), make_rollouts(tmp_path)
    rollouts.step[:] = 1
    x, change = rollouts.x.clone(), rollouts.sigma_next - rollouts.sigma
    u = torch.randn_like(x)
    rollouts.advance(student, u)
    assert torch.allclose(rollouts.x, x + change.view(-1, 1, 1, 1, 1) * u)


def test_a_rollout_that_is_not_finite_restarts_alone(tmp_path):
    student, rollouts = AffineFlow(0.4), make_rollouts(tmp_path)
    rollouts.step[:] = 1
    rollouts.x[2, 0, 0, 0, 0] = float("nan")
    advance(rollouts, student)
    assert rollouts.restarts.tolist() == [0, 0, 1, 0]
    assert rollouts.x.isfinite().all()


def test_state_dict_continues_the_same_rollouts(tmp_path):
    student = AffineFlow(0.4, 0.2)
    first, second = make_rollouts(tmp_path), make_rollouts(tmp_path)
    for _ in range(3):
        advance(first, student)
    second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    for _ in range(6):  # through restarts
        advance(first, student)
        advance(second, student)
    assert torch.equal(first.x, second.x) and torch.equal(first.prompt, second.prompt)
    assert torch.equal(first.restarts, second.restarts) and first.restarts.min() > 0
