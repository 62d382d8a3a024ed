import json

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from safetensors.torch import load_file
from tiny import sampled_states, tiny_pipeline
from tiny_run import PROMPTS, tiny_config, tiny_teacher
from toy import toy_prompts, toy_store

from linvideo.run.checkpoint import save_checkpoint
from linvideo.trajectories import store
from linvideo.trajectories.collect import TrajectoryConfig, collect, latent_shape, open_store, with_flow_shift
from linvideo.trajectories.flow import predict_velocity, sampler_grid
from linvideo.trajectories.prompts import encode_prompts
from linvideo.trajectories.seeding import draw_noise, generator, stable_hash
from linvideo.trajectories.store import TrajectoryStore

SMALL = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 4, "dtype": "float32"}
SHAPE = (16, 2, 4, 4)


@pytest.fixture(scope="module")
def pipeline():
    pipeline = tiny_teacher()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def prompts(pipeline):
    return encode_prompts(pipeline, PROMPTS, tiny_config("unused").prompts)


def make(path, pipeline, prompts, seed=0, **settings):
    config = TrajectoryConfig(**{**SMALL, "num_trajectories": 3, "shard_size": 2, **settings})
    return collect(open_store(path, pipeline, prompts, config, seed), pipeline, prompts, progress=False)


def states(store, prompts):
    return store.batch(list(range(len(store))), prompts)


@pytest.mark.parametrize("scheduler", [None, UniPCMultistepScheduler])
def test_states_equal_those_of_the_guided_pipeline(tmp_path, pipeline, prompts, scheduler):
    if scheduler is not None:  # multistep: it remembers earlier steps, and truncates its timesteps to integers
        pipeline = tiny_teacher()
        pipeline.set_progress_bar_config(disable=True)
        pipeline.scheduler = scheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    store = make(tmp_path / "s", pipeline, prompts, guidance_scale=3.0, batch_size=2)
    batch = states(store, prompts)
    first_prompt = stable_hash(0, "prompt")
    for i in range(3):
        prompt = (first_prompt + i) % 3
        seen = sampled_states(
            pipeline,
            draw_noise(SHAPE, 0, "noise", i),
            prompt_embeds=prompts.take(torch.tensor([prompt])),
            negative_prompt_embeds=prompts.take(torch.tensor([0]), torch.tensor([True])),
            guidance_scale=3.0,
            num_inference_steps=4,
            height=32,
            width=32,
            num_frames=5,
        )
        assert torch.allclose(batch.x[4 * i : 4 * i + 4], seen[:-1], atol=1e-5)
        assert batch.prompt[4 * i : 4 * i + 4].tolist() == [prompt] * 4


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_u_is_the_teachers_velocity_under_the_states_own_condition(tmp_path, pipeline, prompts, guidance_scale):
    settings = {"guidance_scale": guidance_scale, "negative_probability": 0.5, "batch_size": 3}
    batch = states(make(tmp_path / "s", pipeline, prompts, **settings), prompts)
    share = 0.0 if guidance_scale == 1 else 0.5  # an unguided teacher has no negative prompt
    assert (0 < int(batch.negative.sum()) < len(batch.x)) == (share > 0)
    with torch.no_grad():
        u = predict_velocity(pipeline.transformer, batch.x, batch.timestep, batch.conditions)
    assert torch.allclose(batch.u, u, atol=1e-5)
    expected = torch.cat([torch.rand(4, generator=generator(0, "negative", i)) < share for i in range(3)])
    assert torch.equal(batch.negative, expected)


def test_a_trajectory_does_not_depend_on_batches_or_shards(tmp_path, pipeline, prompts):
    one = states(make(tmp_path / "a", pipeline, prompts, batch_size=1, shard_size=1), prompts)
    other = states(make(tmp_path / "b", pipeline, prompts, batch_size=3, shard_size=5), prompts)
    assert torch.allclose(one.x, other.x, atol=1e-5) and torch.allclose(one.u, other.u, atol=1e-5)
    assert torch.equal(one.prompt, other.prompt) and torch.equal(one.negative, other.negative)
    another_seed = states(make(tmp_path / "c", pipeline, prompts, seed=1), prompts)
    assert not torch.allclose(one.x, another_seed.x, atol=0.1)


def test_the_last_shard_holds_what_is_left(tmp_path, pipeline, prompts):
    store = make(tmp_path / "s", pipeline, prompts, num_trajectories=5, num_inference_steps=2, shard_size=3)
    assert [list(store.shard_trajectories(number)) for number in range(store.num_shards)] == [[0, 1, 2], [3, 4]]
    assert store.timesteps().shape == (5, 2) and store.complete
    samples, _ = store.samples(range(5), prompts)
    assert len(samples.flatten(1).unique(dim=0)) == 5


def test_files_have_the_permissions_that_the_umask_allows(tmp_path, umask):
    toy_store(tmp_path / "store", torch.tensor([900.0, 500.0]))
    save_checkpoint(tmp_path, 1, {"weight": torch.ones(2)}, {"step": 1})
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(path.suffix == ".safetensors" for path in files) >= 3
    assert {path.name: path.stat().st_mode & 0o777 for path in files} == {path.name: 0o666 & ~umask for path in files}


def test_stride_keeps_steps_from_a_drawn_offset(tmp_path, pipeline, prompts):
    timesteps, _ = sampler_grid(pipeline.scheduler, 5)
    settings = {"num_trajectories": 8, "num_inference_steps": 5, "stride": 2, "batch_size": 8}
    store = make(tmp_path / "s", pipeline, prompts, **settings)
    batch = states(store, prompts)
    assert len(store) == 16
    steps = (batch.timestep[:, None] - timesteps).abs().argmin(dim=1).view(8, 2)
    assert torch.equal(steps[:, 1] - steps[:, 0], torch.full((8,), 2))
    assert set(steps[:, 0].tolist()) == {0, 1, 2}  # 5 steps allow three offsets


def test_draws_depend_on_their_name_only(tmp_path):
    store, prompts = toy_store(tmp_path / "s", torch.tensor([900.0, 500.0])), toy_prompts()
    first = store.draw(range(4), 0, "finetune", 3, prompts=prompts)
    again = TrajectoryStore(tmp_path / "s").draw(range(4), 0, "finetune", 3, prompts=prompts)
    assert torch.equal(first.x, again.x) and torch.equal(first.conditions.prompt_embeds, again.conditions.prompt_embeds)
    others = [store.draw(range(4), 0, "finetune", step, prompts=prompts).x for step in range(4, 10)]
    assert any(not torch.equal(first.x, other) for other in others)
    drawn = torch.cat([store.draw(range(8), 0, step, prompts=prompts).x for step in range(30)])
    assert len(drawn.flatten(1).unique(dim=0)) == len(store)  # every state is drawn


@pytest.mark.parametrize(
    "change, named",
    [
        ({"num_inference_steps": 5}, "num_inference_steps 4"),
        ({"guidance_scale": 4.0}, "guidance_scale 2.0"),
        ({"dtype": "float16"}, "dtype 'float32'"),
        ({"seed": 7}, "seed 0"),
    ],
)
def test_a_store_of_another_request_is_refused_and_untouched(tmp_path, pipeline, prompts, change, named):
    make(tmp_path / "s", pipeline, prompts, guidance_scale=2.0)
    before = (tmp_path / "s" / "manifest.json").read_text()
    with pytest.raises(ValueError, match=named):
        make(tmp_path / "s", pipeline, prompts, **{"guidance_scale": 2.0, **change})
    assert (tmp_path / "s" / "manifest.json").read_text() == before


def test_a_store_of_another_model_is_refused(tmp_path, pipeline, prompts):
    make(tmp_path / "s", pipeline, prompts)
    other = tiny_teacher()
    with torch.no_grad():
        other.transformer.blocks[1].ffn.net[2].weight.add_(1e-3)
    with pytest.raises(ValueError, match="with model "):
        make(tmp_path / "s", other, prompts)


def test_damage_is_found(tmp_path):
    store = toy_store(tmp_path / "s", torch.tensor([900.0, 500.0]))
    store.verify()
    manifest = tmp_path / "s" / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"shard_size": 2', '"shard_size": 3'))
    with pytest.raises(ValueError, match="manifest.json is damaged: its checksum has changed"):
        TrajectoryStore(tmp_path / "s")
    manifest.write_text(text)
    shard = tmp_path / "s" / "shard-000001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="shard-000001.safetensors is damaged"):
        TrajectoryStore(tmp_path / "s").verify()
    shard.write_bytes(bytes(content)[:-8])
    with pytest.raises(ValueError, match="shard-000001.safetensors is damaged"):
        TrajectoryStore(tmp_path / "s")
    shard.unlink()  # as the message advises
    assert TrajectoryStore(tmp_path / "s").missing_shards() == [1]


def test_of_two_stores_begun_at_once_the_first_stays(tmp_path, monkeypatch):
    path, write = tmp_path / "s", store.write_json
    request = {"num_trajectories": 1, "shard_size": 1, "states_per_trajectory": 1}

    def late(*arguments, **options):
        monkeypatch.setattr(store, "write_json", write)
        TrajectoryStore(path, request | {"seed": 1})
        write(*arguments, **options)

    monkeypatch.setattr(store, "write_json", late)
    with pytest.raises(ValueError, match=r"were made with seed 1 \(now 2\)"):
        TrajectoryStore(path, request | {"seed": 2})
    monkeypatch.setattr(store, "write_json", late)
    assert TrajectoryStore(path, request | {"seed": 1}).missing_shards() == [0]


def test_of_two_workers_with_one_shard_the_first_wins(tmp_path):
    filled = toy_store(tmp_path / "s", torch.tensor([900.0, 100.0]))
    tensors = load_file(tmp_path / "s" / "shard-000000.safetensors")
    filled.write_shard(0, tensors | {"x": tensors["x"] + 1})
    assert torch.equal(load_file(tmp_path / "s" / "shard-000000.safetensors")["x"], tensors["x"])
    (tmp_path / "s" / "shard-000000.safetensors").unlink()  # its entry is still there
    filled.write_shard(0, tensors | {"x": tensors["x"] + 1})
    filled.verify()


def test_a_folder_that_is_not_a_store_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no manifest.json"):
        TrajectoryStore(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="neither empty nor a trajectory store"):
        toy_store(tmp_path, torch.tensor([900.0]))
    for content in ("not json", "[]", '{"format": 1}', json.dumps({"format": 9, "request": {}, "shards": {}})):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(ValueError, match="manifest.json"):
            TrajectoryStore(tmp_path)


def test_latent_shape_refuses_sizes_that_the_model_cannot_represent(pipeline):
    assert latent_shape(pipeline, TrajectoryConfig(**SMALL)) == SHAPE
    for change, message in (
        ({"height": 40}, "height must be a multiple of 16, got 40"),
        ({"width": 24}, "width must be a multiple of 16, got 24"),
        ({"num_frames": 6}, "num_frames must be 1 more than a multiple of 4, got 6"),
    ):
        with pytest.raises(ValueError, match=message):
            latent_shape(pipeline, TrajectoryConfig(**{**SMALL, **change}))


def test_a_scheduler_without_flow_matching_is_refused():
    with pytest.raises(ValueError, match="scheduler"):
        sampler_grid(DDIMScheduler(), 4)


@pytest.mark.parametrize(
    "scheduler, name", [(FlowMatchEulerDiscreteScheduler, "shift"), (UniPCMultistepScheduler, None)]
)
def test_flow_shift_replaces_the_shift_of_the_scheduler(pipeline, scheduler, name):
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 2.0}
    settings = {name: 2.0} if name else flow
    other = tiny_pipeline(pipeline.transformer)
    other.scheduler = scheduler(**settings)
    assert with_flow_shift(other, None) is other
    shifted = with_flow_shift(other, 5.0)
    sigmas, before = sampler_grid(shifted.scheduler, 4)[1], sampler_grid(other.scheduler, 4)[1]
    assert torch.equal(sigmas, sampler_grid(scheduler(**settings | {name or "flow_shift": 5.0}), 4)[1])
    assert not torch.equal(sigmas, before) and shifted.transformer is other.transformer
    other.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match="flow_shift needs a scheduler with a shift, got DDIMScheduler"):
        with_flow_shift(other, 5.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_teacher_that_is_not_finite_is_found_at_once(tmp_path, prompts, value):
    pipeline = tiny_teacher()
    with torch.no_grad():
        pipeline.transformer.proj_out.bias[0] = value
    with pytest.raises(ValueError, match=r"not finite at sampling step 1 of 4, prompt number [123], [123]:"):
        make(tmp_path / "s", pipeline, prompts, batch_size=2)
    assert not list((tmp_path / "s").glob("*.safetensors"))


def test_states_that_overflow_fp16_are_stored_in_fp32(tmp_path, prompts):
    pipeline = tiny_teacher()
    small = make(tmp_path / "small", pipeline, prompts, dtype="float16")
    assert small._open(0).get_tensor("u").dtype == torch.float16
    with torch.no_grad():
        pipeline.transformer.proj_out.bias += 1e5
    store = make(tmp_path / "large", pipeline, prompts, dtype="float16")
    batch = states(store, prompts)
    assert store._open(0).get_tensor("u").dtype == torch.float32
    assert batch.u.isfinite().all() and batch.x.isfinite().all() and batch.u.abs().max() > 65504
    assert store.samples([0], prompts)[0].isfinite().all()
