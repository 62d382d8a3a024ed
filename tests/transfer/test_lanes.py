import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from toy import SHAPE, AffineFlow, toy_prompts, toy_store

from linvideo.trajectories.flow import predict_velocity, sample_steps, sampler_grid
from linvideo.trajectories.seeding import draw_noise
from linvideo.transfer.lanes import StudentLanes

SCHEDULER = FlowMatchEulerDiscreteScheduler(shift=3.0)
STEPS = 5


def make_lanes(tmp_path, count=4, **request):
    timesteps, sigmas = sampler_grid(SCHEDULER, STEPS)
    store = toy_store(tmp_path / "store", timesteps, **request)
    return StudentLanes(range(count), store, toy_prompts(), timesteps, sigmas, seed=5, device="cpu")


def advance(lanes, student):
    lanes.advance(student, predict_velocity(student, lanes.x, lanes.timestep, lanes.conditions()))


def test_lanes_start_on_stored_states_at_various_t(tmp_path):
    lanes = make_lanes(tmp_path, count=16)
    assert len(set(lanes.step.tolist())) > 2
    assert torch.equal(lanes.sigma, lanes.timestep / 1000)
    assert lanes.restarts.sum() == 0


def test_a_guided_lane_follows_the_guided_sampler(tmp_path):
    student = AffineFlow(0.4, 0.2)
    lanes = make_lanes(tmp_path, guidance_scale=3.0, negative_probability=0.5)
    lanes.step[:] = STEPS - 1
    advance(lanes, student)  # every lane restarts
    assert lanes.restarts.tolist() == [1] * 4 and lanes.step.tolist() == [0] * 4
    noise = torch.stack([draw_noise(SHAPE, 5, "lane", lane, 1, "noise") for lane in range(4)])
    assert torch.equal(lanes.x, noise)
    assert 0 < int(lanes.negative.sum()) < 4  # both conditions occur, and both follow the same sampler

    prompts, prompt = toy_prompts(), lanes.prompt.clone()
    negative = prompts.conditions(prompt, torch.ones(4, dtype=torch.bool))
    for step in sample_steps(student, SCHEDULER, STEPS, noise, prompts.conditions(prompt), negative, 3.0):
        assert torch.allclose(lanes.x, step.x, atol=1e-5)
        advance(lanes, student)
    assert lanes.restarts.tolist() == [2] * 4


def test_an_unguided_lane_is_moved_by_the_velocity_it_was_given(tmp_path):
    student, lanes = AffineFlow(0.4, 0.2), make_lanes(tmp_path)
    lanes.step[:] = 1
    x, change = lanes.x.clone(), lanes.sigma_next - lanes.sigma
    u = torch.randn_like(x)
    lanes.advance(student, u)
    assert torch.allclose(lanes.x, x + change.view(-1, 1, 1, 1, 1) * u)


def test_a_lane_that_is_not_finite_restarts_alone(tmp_path):
    student, lanes = AffineFlow(0.4), make_lanes(tmp_path)
    lanes.step[:] = 1
    lanes.x[2, 0, 0, 0, 0] = float("nan")
    advance(lanes, student)
    assert lanes.restarts.tolist() == [0, 0, 1, 0]
    assert lanes.x.isfinite().all()


def test_state_dict_continues_the_same_lanes(tmp_path):
    student = AffineFlow(0.4, 0.2)
    first, second = make_lanes(tmp_path), make_lanes(tmp_path)
    for _ in range(3):
        advance(first, student)
    second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    for _ in range(6):  # through restarts
        advance(first, student)
        advance(second, student)
    assert torch.equal(first.x, second.x) and torch.equal(first.prompt, second.prompt)
    assert torch.equal(first.restarts, second.restarts) and first.restarts.min() > 0
