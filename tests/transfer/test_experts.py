"""Wan 2.2: one expert is trained, only on states in its range of noise levels."""

import json
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanTransformer3DModel
from safetensors.torch import load_file
from tiny import generate, sampled_states, tiny_pipeline, tiny_transformer
from tiny_run import ENVIRONMENT, HELPERS, PROMPTS, run, tiny_config, tiny_experts, tiny_teacher, watched
from toy import AffineFlow, toy_prompts, toy_store

from linvideo.models import convert, describe, load_pipeline
from linvideo.run import read_metrics, validation
from linvideo.trajectories.collect import TrajectoryConfig, collect, open_store
from linvideo.trajectories.experts import Expert, choose_expert
from linvideo.trajectories.flow import predict_velocity, sampler_grid
from linvideo.trajectories.prompts import encode_prompts
from linvideo.trajectories.seeding import draw_noise
from linvideo.transfer import objectives, train
from linvideo.transfer.objectives import ObjectiveConfig
from linvideo.transfer.rollouts import StudentRollouts

BOUNDARY = 700.0  # the boundary of tiny_experts
SHAPE = (16, 2, 4, 4)
SIGMAS = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0])
EXPERTS = ("high_noise", "low_noise")


def collect_store(path, pipeline, name, **settings):
    """Return the store and the prompts of 4 trajectories."""
    prompts = encode_prompts(pipeline, PROMPTS, tiny_config("unused").prompts)
    size = {"height": 32, "width": 32, "num_frames": 5, "num_trajectories": 4, "dtype": "float32", "batch_size": 2}
    config = TrajectoryConfig(**{**size, "num_inference_steps": 6, **settings})
    expert = choose_expert(pipeline, name, config.guidance_scale_2)
    store = open_store(path, pipeline, prompts, config, 0, expert)
    return collect(store, pipeline, prompts, progress=False), prompts


@pytest.mark.parametrize("guidance", [(3.0, None), (3.0, 1.5), (3.0, 0.5), (1.0, 4.0)])
@pytest.mark.parametrize("multistep", [False, True])
def test_states_are_those_of_the_pipeline_with_two_experts(tmp_path, guidance, multistep):
    pipeline = tiny_experts()
    pipeline.set_progress_bar_config(disable=True)
    if multistep:
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
        pipeline.scheduler = UniPCMultistepScheduler(**flow)
    scales = dict(zip(("guidance_scale", "guidance_scale_2"), guidance, strict=True))
    stores = {name: collect_store(tmp_path / name, pipeline, name, **scales) for name in EXPERTS}
    batches = {name: store.batch(list(range(len(store))), prompts) for name, (store, prompts) in stores.items()}
    prompts = stores["low_noise"][1]
    for i in range(4):
        seen = sampled_states(
            pipeline,
            draw_noise(SHAPE, 0, "noise", i),
            prompt_embeds=prompts.take(batches["low_noise"].prompt.view(4, -1)[i, :1]),
            negative_prompt_embeds=prompts.take(torch.tensor([0]), torch.tensor([True])),
            num_inference_steps=6,
            height=32,
            width=32,
            num_frames=5,
            **scales,
        )
        ours = torch.cat([batches[name].x.unflatten(0, (4, -1))[i] for name in EXPERTS])
        assert torch.allclose(ours, seen[:-1], atol=1e-5)
    high, low = (batches[name].timestep.view(4, -1) for name in EXPERTS)
    assert high.min() >= BOUNDARY > low.max() and high.shape[1] + low.shape[1] == 6
    for name, model in zip(EXPERTS, (pipeline.transformer, pipeline.transformer_2), strict=True):
        batch = batches[name]
        with torch.no_grad():
            assert torch.allclose(
                batch.u, predict_velocity(model, batch.x, batch.timestep, batch.conditions), atol=1e-5
            )


def test_the_request_names_the_expert_and_the_models_its_states_depend_on(tmp_path):
    pipeline = tiny_experts()
    high, low = (collect_store(tmp_path / name, pipeline, name)[0].request for name in EXPERTS)
    assert (high["expert"], high["boundary_timestep"], high["states_per_trajectory"]) == ("high_noise", BOUNDARY, 3)
    assert (low["expert"], low["guidance_scale_2"], low["states_per_trajectory"]) == ("low_noise", 5.0, 3)
    assert low["model_high_noise"] == high["model"] != low["model"] and "model_high_noise" not in high
    pipeline.transformer = convert(pipeline.transformer, layers=[0], mode="linear")
    with pytest.raises(ValueError, match="with model_high_noise "):
        collect_store(tmp_path / "low_noise", pipeline, "low_noise")
    assert "expert" not in collect_store(tmp_path / "one", tiny_teacher(), None)[0].request


@pytest.mark.parametrize("name", EXPERTS)
def test_a_stride_counts_steps_in_the_range(tmp_path, name):
    settings = {"num_inference_steps": 9, "num_trajectories": 12, "stride": 2}  # 5 steps and 4
    store, _ = collect_store(tmp_path / "s", tiny_experts(), name, **settings)
    timesteps = store.timesteps()
    assert timesteps.shape == (12, 2)
    assert bool(((timesteps >= BOUNDARY) == (name == "high_noise")).all())
    assert len(timesteps[:, 0].unique()) == {"high_noise": 3, "low_noise": 2}[name]  # offsets
    with pytest.raises(ValueError, match=f"needs at least as many sampling steps in the range of the expert {name}"):
        collect_store(tmp_path / "t", tiny_experts(), name, **{**settings, "stride": 6})


def rollouts_of(tmp_path, name, count=6, **request):
    """Rollouts on SIGMAS; the boundary is 0.5, which belongs to the high-noise expert."""
    timesteps = 1000 * SIGMAS[:-1]
    steps = Expert(name, 500.0).steps(timesteps)
    request = {"expert": name, "boundary_timestep": 500.0, "guidance_scale_2": 1.0, **request}
    store = toy_store(tmp_path / name, timesteps[steps.start : steps.stop], **request)
    return StudentRollouts(range(count), store, toy_prompts(), timesteps, SIGMAS, seed=3, device="cpu"), store


@pytest.mark.parametrize("name", EXPERTS)
def test_rollouts_never_leave_the_range(tmp_path, name):
    rollouts, store = rollouts_of(tmp_path, name)
    student, seen = AffineFlow(0.4, 0.2), set()
    for _ in range(9):
        before = rollouts.restarts.clone()
        rollouts.advance(student, predict_velocity(student, rollouts.x, rollouts.timestep, rollouts.conditions()))
        seen |= set(rollouts.step.tolist())
        for index in (rollouts.restarts > before).nonzero().flatten().tolist():
            if name == "high_noise":
                noise = draw_noise(
                    tuple(rollouts.x.shape[1:]), 3, "lane", index, int(rollouts.restarts[index]), "noise"
                )
                assert torch.equal(rollouts.x[index], noise)
            else:  # a stored state of the first step, with the prompt that led the teacher there
                states = store.batch(list(range(len(store))), toy_prompts())
                (state,) = [i for i, x in enumerate(states.x) if torch.equal(x, rollouts.x[index])]
                assert states.timestep[state] == 200.0 and states.prompt[state] == rollouts.prompt[index]
    assert seen == {"high_noise": {0, 1, 2}, "low_noise": {3}}[name] and rollouts.restarts.min() > 1


def test_low_noise_rollouts_restart_at_the_first_step_in_range_also_with_a_stride(tmp_path):
    pipeline, settings = tiny_experts(), {"num_inference_steps": 9, "stride": 2, "guidance_scale": 1.0}
    store, prompts = collect_store(tmp_path / "s", pipeline, "low_noise", **settings)
    timesteps, sigmas = sampler_grid(pipeline.scheduler, 9)
    assert set(store.timesteps()[:, 0].tolist()) == {float(timesteps[5]), float(timesteps[6])}
    rollouts = StudentRollouts(range(8), store, prompts, timesteps, sigmas, seed=3, device="cpu")
    rollouts.step[:] = 8
    rollouts.advance(AffineFlow(0.1), rollouts.x)
    assert rollouts.step.tolist() == [5] * 8 and rollouts.restarts.tolist() == [1] * 8


@pytest.mark.parametrize("name, first, scale", [("high_noise", 3.0, 3.0), ("low_noise", 3.0, 2.0), ("low_noise", 1, 1)])
def test_rollouts_move_with_their_experts_guidance(tmp_path, name, first, scale):
    scales = {"guidance_scale": first, "guidance_scale_2": 2.0, "boundary_timestep": 700.0}
    timesteps = 1000 * SIGMAS[:-1]
    steps = Expert(name, 700.0).steps(timesteps)
    store = toy_store(tmp_path / "s", timesteps[steps.start : steps.stop], expert=name, **scales)
    rollouts = StudentRollouts(range(4), store, toy_prompts(), timesteps, SIGMAS, seed=3, device="cpu")
    rollouts.step[:] = steps.start
    student, x, t, change = AffineFlow(0.0), rollouts.x.clone(), rollouts.sigma, rollouts.sigma_next - rollouts.sigma
    rollouts.advance(student, predict_velocity(student, x, 1000 * t, rollouts.conditions()))
    guided = -1 + scale * (rollouts.prompt + 1.0 - -1)  # the toy's u is its condition
    if first == 1:  # then WanPipeline guides neither expert
        guided = torch.where(rollouts.negative, -1.0, rollouts.prompt + 1.0)
    assert torch.allclose(rollouts.x, x + (change * guided).view(-1, 1, 1, 1, 1))


def test_steps_stop_inside_the_high_noise_range(tmp_path):
    class Recorder(AffineFlow):
        def forward(self, hidden_states, timestep, **arguments):
            calls.append(timestep)
            return super().forward(hidden_states, timestep, **arguments)

    student, teacher, calls = Recorder(0.5, 0.3), Recorder(0.2, -0.1), []
    for objective in ("adm_step", "adm"):
        rollouts, _ = rollouts_of(tmp_path, "high_noise", count=12)
        assert set(rollouts.step.tolist()) == {0, 1, 2}  # t of the last is the boundary itself, so its margin is 0
        calls.clear()
        if objective == "adm_step":
            loss = objectives.adm_sampler_step(student, teacher, rollouts, ObjectiveConfig())
        else:
            loss = objectives.adm_small_step(student, teacher, rollouts, rollouts.margin / 2, ObjectiveConfig())
        loss.backward()
        assert loss.isfinite() and student.scale.grad.isfinite() and len(calls) == 3
        assert min(float(timestep.min()) for timestep in calls) >= 500.0
    rollouts, _ = rollouts_of(tmp_path, "low_noise")
    assert torch.equal(rollouts.margin, rollouts.sigma)


@pytest.mark.parametrize("objective", ["adm", "adm_step", "own_mse"])
@pytest.mark.parametrize("name", EXPERTS)
def test_every_model_call_of_a_run_is_in_range(tmp_path, monkeypatch, name, objective):
    calls, forward = defaultdict(list), WanTransformer3DModel.forward

    def record(self, hidden_states, timestep, *arguments, **keywords):
        calls[id(self)].append(timestep.clone())
        return forward(self, hidden_states, timestep, *arguments, **keywords)

    monkeypatch.setattr(WanTransformer3DModel, "forward", record)
    teacher = tiny_experts()
    settings = {"expert": name, "objective": {"name": objective, "max_dt": 0.5}, "max_train_steps": 4}
    with watched() as seen:
        train(tiny_config(tmp_path / "run", **settings), teacher, PROMPTS)
    own = torch.cat(calls[id(seen.teacher)] + calls[id(seen.student)])
    assert calls[id(seen.student)] and len(calls) == (2 if name == "high_noise" else 3)
    assert own.min() >= BOUNDARY if name == "high_noise" else own.max() < BOUNDARY
    if name == "low_noise":  # the other expert is used only to collect trajectories
        assert torch.cat(calls[id(teacher.transformer)]).min() >= BOUNDARY


@pytest.mark.parametrize("name, other", [("high_noise", "transformer_2"), ("low_noise", "transformer")])
def test_the_other_expert_samples_validations_and_is_moved_away_before_decoding(tmp_path, monkeypatch, name, other):
    events, teacher = [], tiny_experts()
    idle = getattr(teacher, other)
    move, sample, decode = idle.to, validation.sample, validation.decode
    idle.to = lambda device: (events.append("move"), move(device))[1]
    monkeypatch.setattr(validation, "sample", lambda *a: (events.append("sample"), sample(*a))[1])
    monkeypatch.setattr(validation, "decode", lambda *a: (events.append("decode"), decode(*a))[1])
    settings = {"expert": name, "max_train_steps": 1, "selection": {"method": "layers", "layers": [0]}}
    often = {"steps": 100, "num_videos": 2, "num_inference_steps": 4}
    train(tiny_config(tmp_path / "run", **settings, validation=often), teacher, PROMPTS)
    once = ["move", "sample", "sample", "move", "decode", "decode"]
    assert events == ["move", "move", *once, *once, "move"]  # trajectories, teacher, student, and at the end


def test_two_runs_convert_both_experts(tmp_path):
    teacher = tiny_experts()
    stock = {name: value.clone() for name, value in teacher.transformer_2.state_dict().items()}
    first = train(tiny_config(tmp_path / "high", expert="high_noise", max_train_steps=2), teacher, PROMPTS)
    loaded = load_pipeline(first.pipeline_path)
    assert describe(loaded.transformer).layers_linear == first.layers_linear
    assert type(loaded.transformer_2) is WanTransformer3DModel
    assert all(torch.equal(stock[name], value) for name, value in loaded.transformer_2.state_dict().items())

    settings = {"expert": "low_noise", "max_train_steps": 2, "pretrained_model_name_or_path": str(first.pipeline_path)}
    second = train(tiny_config(tmp_path / "low", **settings), None, PROMPTS)
    both = load_pipeline(second.pipeline_path)
    assert describe(both.transformer).layers_linear == first.layers_linear
    assert describe(both.transformer_2).layers_linear == second.layers_linear
    state = first.pipeline.transformer.state_dict()
    assert all(torch.equal(state[name], value) for name, value in both.transformer.state_dict().items())
    assert generate(both, num_inference_steps=4).shape == (5, 32, 32, 3)
    with pytest.raises(ValueError, match="expected a stock WanTransformer3DModel"):
        train(tiny_config(tmp_path / "again", **settings), both, PROMPTS)


@pytest.mark.parametrize("name, stage, step", [("low_noise", "finetune", 5), ("high_noise", "trajectories", 1)])
def test_killed_and_resumed_with_an_expert(tmp_path, name, stage, step):
    settings = {"expert": name, "objective": {"name": "adm"}}
    command = [
        sys.executable,
        str(HELPERS / "tiny_run.py"),
        str(tmp_path / "a"),
        json.dumps(settings),
    ]
    killed = subprocess.run([*command, stage, str(step)], env=ENVIRONMENT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run(tmp_path / "a", resume_from_checkpoint="latest", **settings)
    run(tmp_path / "b", **settings)
    component = {"high_noise": "transformer", "low_noise": "transformer_2"}[name]
    file = Path("pipeline", component, "diffusion_pytorch_model.safetensors")
    ours, theirs = (load_file(tmp_path / folder / file) for folder in ("a", "b"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    metrics = [read_metrics(tmp_path / folder / "metrics.jsonl") for folder in ("a", "b")]
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize(
    "pipeline, settings, message",
    [
        (tiny_experts, {}, "expert must be high_noise or low_noise for a pipeline with two experts, got None"),
        (tiny_teacher, {"expert": "low_noise"}, "expert must be None for a pipeline with one transformer, got 'low_"),
        (tiny_teacher, {"trajectories": {"guidance_scale_2": 2.0}}, "guidance_scale_2 must be None for a pipeline"),
        (
            lambda: tiny_pipeline(transformer_2=tiny_transformer()),
            {"expert": "high_noise"},
            "expected a pipeline with two experts to have a boundary_ratio, got None",
        ),
        (
            tiny_experts,
            {"expert": "low_noise", "trajectories": {"num_inference_steps": 1}},
            "stride 1 needs at least as many sampling steps in the range of the expert low_noise, got 0 of 1",
        ),
    ],
)
def test_wrong_combinations_are_refused_before_anything_is_written(tmp_path, pipeline, settings, message):
    size = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 4}
    settings = {**settings, "trajectories": {**size, **settings.get("trajectories", {})}}
    with pytest.raises(ValueError, match=message) as error:
        train(tiny_config(tmp_path / "run", **settings), pipeline(), PROMPTS)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_config_refuses_unknown_experts():
    with pytest.raises(ValueError, match="expert must be one of None, high_noise, low_noise, got 'both'"):
        tiny_config("unused", expert="both")
    with pytest.raises(ValueError, match="guidance_scale_2 must be finite and not negative, got -1.0"):
        TrajectoryConfig(guidance_scale_2=-1.0)
