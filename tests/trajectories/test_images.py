"""Image-to-video: states, conditions and whole runs of WanImageToVideoPipeline."""

import itertools
import json
import os
from collections import defaultdict

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.utils import load_image
from PIL import Image
from tiny import (
    sampled_states,
    tiny_image,
    tiny_image_pipeline,
    tiny_image_transformer,
    tiny_pipeline,
    tiny_transformer,
)
from tiny_run import PROMPTS, tiny_config, tiny_teacher, watched
from transformers import UMT5EncoderModel

from linvideo.evaluation import sampling
from linvideo.models import describe, load_pipeline
from linvideo.run import read_metrics
from linvideo.trajectories import read_prompts
from linvideo.trajectories.collect import TrajectoryConfig, collect, latent_shape, open_store
from linvideo.trajectories.conditions import Conditions
from linvideo.trajectories.experts import choose_expert
from linvideo.trajectories.flow import predict_velocity
from linvideo.trajectories.images import digest, encode_images, read_image
from linvideo.trajectories.prompts import Prompt, choose_prompts, encode_prompts
from linvideo.trajectories.seeding import draw_noise, stable_hash
from linvideo.transfer import train, trainer

SIZE = {"height": 32, "width": 32, "num_frames": 5}
VIDEO = TrajectoryConfig(**SIZE, num_trajectories=3, num_inference_steps=4, guidance_scale=3.0, dtype="float32")
IMAGES = [tiny_image(seed) for seed in range(3)]
SHAPE = (16, 2, 4, 4)


def wan21():
    """A pipeline with CLIP, whose cross-attention needs 512 text tokens."""
    return tiny_image_pipeline()


def wan22():
    """A pipeline with two experts and without an image encoder."""
    first, second = (tiny_image_transformer(clip=False, seed=seed) for seed in (0, 1))
    return tiny_image_pipeline(first, transformer_2=second, boundary_ratio=0.7)


def encode(pipeline, images=IMAGES):
    prompts = encode_prompts(pipeline, PROMPTS)
    prompts.latents, prompts.image_embeds = encode_images(pipeline, images, VIDEO)
    return prompts


def write_prompts(path, lines):
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return str(path)


@pytest.mark.parametrize("make", [wan21, wan22])
def test_states_equal_those_of_the_image_pipeline(tmp_path, make):
    pipeline = make()
    pipeline.set_progress_bar_config(disable=True)
    expert = choose_expert(pipeline, "high_noise" if make is wan22 else None)
    prompts = encode(pipeline)
    assert latent_shape(pipeline, VIDEO) == SHAPE
    store = open_store(tmp_path / "s", pipeline, prompts, VIDEO, 0, expert)
    collect(store, pipeline, prompts, progress=False)
    batch = store.batch(list(range(len(store))), prompts)
    kept = store.request["states_per_trajectory"]
    assert kept == (2 if make is wan22 else 4)
    for i in range(3):
        number = (stable_hash(0, "prompt") + i) % 3
        seen = sampled_states(
            pipeline,
            draw_noise(SHAPE, 0, "noise", i),
            image=IMAGES[number],
            prompt=PROMPTS[number],
            negative_prompt="",
            num_inference_steps=4,
            guidance_scale=3.0,
            **SIZE,
        )
        assert torch.allclose(batch.x[kept * i : kept * (i + 1)], seen[:kept], atol=1e-5)
    with torch.no_grad():
        u = predict_velocity(pipeline.transformer, batch.x, batch.timestep, batch.conditions)
        other_image = Conditions(
            batch.conditions.prompt_embeds, batch.conditions.latents.flip(0), batch.conditions.image_embeds
        )
        elsewhere = predict_velocity(pipeline.transformer, batch.x, batch.timestep, other_image)
    assert torch.allclose(batch.u, u, atol=1e-5) and not torch.allclose(u, elsewhere, atol=1e-3)


def test_a_prompts_image_goes_with_it_and_with_its_negative():
    prompts = encode(wan21())
    assert prompts.latents.shape == (3, 20, 2, 4, 4) and prompts.image_embeds.shape == (3, 5, 20)
    mask = prompts.latents[:, :4]
    assert bool((mask[:, :, 0] == 1).all()) and bool((mask[:, :, 1] == 0).all())
    taken = prompts.conditions(torch.tensor([2, 1]), torch.tensor([False, True]))
    assert torch.equal(taken.latents, prompts.latents[[2, 1]])
    assert torch.equal(taken.image_embeds, prompts.image_embeds[[2, 1]])
    assert torch.equal(taken.prompt_embeds, prompts.take(torch.tensor([2, 1]), torch.tensor([False, True])))
    second = taken[torch.tensor([1])]
    assert len(second) == 1 and torch.equal(second.latents[0], prompts.latents[1])
    with_other_images = encode(wan21(), IMAGES[::-1])
    assert with_other_images.digest() != prompts.digest() == encode(wan21()).digest()


def test_image_conditions_are_cached_for_the_same_request_only(tmp_path, monkeypatch):
    pipeline, calls = wan21(), []
    original = pipeline.prepare_latents
    monkeypatch.setattr(pipeline, "prepare_latents", lambda *a, **k: calls.append(0) or original(*a, **k))
    cache, state = tmp_path / "images.safetensors", torch.get_rng_state()
    first = encode_images(pipeline, IMAGES, VIDEO, cache)
    assert len(calls) == 3 and torch.equal(torch.get_rng_state(), state)
    IMAGES[1].save(tmp_path / "1.png")
    again = encode_images(pipeline, [IMAGES[0], tmp_path / "1.png", IMAGES[2]], VIDEO, cache)
    assert len(calls) == 3 and all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    encode_images(pipeline, IMAGES[::-1], VIDEO, cache)
    assert len(calls) == 6
    encode_images(pipeline, IMAGES[::-1], TrajectoryConfig(**{**SIZE, "num_frames": 9}), cache)
    assert len(calls) == 9
    cache.write_bytes(b"damaged")
    encode_images(pipeline, IMAGES[:1], VIDEO, cache)
    assert len(calls) == 10
    (tmp_path / "no.png").write_text("text")
    with pytest.raises(ValueError, match="cannot read the image .*no.png"):
        encode_images(pipeline, [tmp_path / "no.png"], VIDEO)


@pytest.mark.parametrize("make, expert", [(wan21, None), (wan22, "low_noise")])
def test_a_run_from_a_prompts_file_to_the_pipeline(tmp_path, monkeypatch, make, expert):
    calls, forward = defaultdict(list), WanTransformer3DModel.forward

    def record(self, hidden_states, timestep, encoder_hidden_states, encoder_hidden_states_image=None, **keywords):
        calls[id(self)].append((hidden_states[:, 16:].detach().clone(), encoder_hidden_states_image))
        return forward(self, hidden_states, timestep, encoder_hidden_states, encoder_hidden_states_image, **keywords)

    monkeypatch.setattr(WanTransformer3DModel, "forward", record)
    (tmp_path / "images").mkdir()
    lines = [{"caption": caption, "image": f"images/{i}.png"} for i, caption in enumerate(PROMPTS)]
    for i, image in enumerate(IMAGES):
        image.save(tmp_path / "images" / f"{i}.png")
    file = write_prompts(tmp_path / "prompts.jsonl", lines)
    pipeline = make()
    settings = {"expert": expert, "max_train_steps": 4, "prompts": {"prompts_file": file}}
    with watched() as seen:
        result = train(tiny_config(tmp_path / "run", **settings), pipeline)
    component = seen.source.expert.component
    loaded = load_pipeline(result.pipeline_path)
    assert type(loaded).__name__ == "WanImageToVideoPipeline"
    assert describe(getattr(loaded, component)).layers_linear == result.layers_linear
    assert all(value.isfinite().all() for value in getattr(loaded, component).state_dict().values())
    losses = {key for row in read_metrics(tmp_path / "run" / "metrics.jsonl") for key in row if key.startswith("loss_")}
    assert {"loss_mse", "loss_adm"} <= losses
    for model in (seen.student, seen.teacher):  # every sample of every call has the image of a prompt
        for latents, image_embeds in calls[id(model)]:
            assert all(any(torch.equal(sample, known) for known in seen.data.prompts.latents) for sample in latents)
            assert (image_embeds is None) == (make is wan22)
    video = loaded(
        image=IMAGES[0], prompt="a fox", num_inference_steps=2, **SIZE, output_type="np", generator=torch.manual_seed(0)
    )
    assert video.frames[0].shape == (5, 32, 32, 3)


def test_a_run_continues_with_the_cached_conditions(tmp_path, monkeypatch):
    settings = {"expert": "high_noise", "max_train_steps": 2}

    def run(folder, **more):
        return train(tiny_config(tmp_path / folder, **settings, **more), wan22(), PROMPTS, IMAGES)

    whole = run("a").pipeline.transformer.state_dict()
    with monkeypatch.context() as patch:
        patch.setitem(trainer.STAGES, "finetune", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run("b")
    with monkeypatch.context() as patch:
        patch.setattr("linvideo.trajectories.images._encode", lambda *_: 1 / 0)
        resumed = run("b", resume_from_checkpoint="latest").pipeline.transformer.state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_encoders_work_before_the_transformers_move_to_the_device(tmp_path, monkeypatch):
    wan22().save_pretrained(tmp_path / "teacher")
    works, events = {UMT5EncoderModel: "forward", AutoencoderKLWan: "encode", WanTransformer3DModel: "forward"}, []

    def record(kind, name):
        original = getattr(kind, name)

        def call(self, *arguments, **keywords):
            given = (*arguments, *keywords.values())
            if type(self) in works and (name != "to" or any(isinstance(x, str | torch.device) for x in given)):
                events.append((type(self), name))
            return original(self, *arguments, **keywords)

        monkeypatch.setattr(kind, name, call)

    for kind, name in ((torch.nn.Module, "to"), *works.items()):
        record(kind, name)
    monkeypatch.setattr(trainer, "make_models", lambda *_: 1 / 0)
    settings = {"expert": "high_noise", "pretrained_model_name_or_path": str(tmp_path / "teacher"), "device": "cpu"}
    with pytest.raises(ZeroDivisionError):
        train(tiny_config(tmp_path / "run", **settings), None, PROMPTS, IMAGES)
    text, vae, experts = works
    expected = [(kind, name) for kind in (text, vae) for name in ("to", works[kind], "to")]  # arrives, works, leaves
    expected += [(kind, "to") for kind in works]  # the encoders of a pipeline in memory leave now
    expected += [(experts, "forward"), (experts, "to")]
    assert [event for event, _ in itertools.groupby(events)] == expected


def rotated_file(folder):
    """Save an image whose EXIF orientation asks for a rotation: 50 x 40 pixels become 40 x 50."""
    path, exif = folder / "rotated.png", Image.Exif()
    exif[0x0112] = 6
    tiny_image().save(path, exif=exif)
    return path


def test_files_are_read_upright(tmp_path, monkeypatch):
    path, pipeline = rotated_file(tmp_path), wan21()
    assert read_image(path).size == (40, 50)
    assert np.array_equal(read_image(path), load_image(str(path))) and digest(path) == digest(load_image(str(path)))
    latents, embeds = encode_images(pipeline, [path], VIDEO)
    upright = encode_images(pipeline, [load_image(str(path))], VIDEO)
    assert torch.equal(latents, upright[0]) and torch.equal(embeds, upright[1])

    pipeline.set_progress_bar_config(disable=True)
    seen = []
    monkeypatch.setattr(
        sampling, "generate_video", lambda *_, image, **more: seen.append(image) or np.zeros((1, 16, 16, 3))
    )
    list(sampling.make_videos(pipeline, [sampling.Job(Prompt("a fox", path), 0, tmp_path / "v.mp4")], {}))
    assert np.array_equal(seen[0], load_image(str(path)))


def test_large_and_damaged_files_are_one_line(tmp_path, monkeypatch, recwarn):
    for name in ("i.png", "i.jpg", "i.webp"):
        tiny_image().save(tmp_path / name)
        content = (tmp_path / name).read_bytes()
        for end in (len(content) - 40, 60, 12, 0):
            (tmp_path / name).write_bytes(content[:end])
            with pytest.raises(ValueError, match=f"cannot read the image .*{name}") as error:
                read_image(tmp_path / name)
            assert "\n" not in str(error.value)
    tiny_image().save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)
    assert read_image(tmp_path / "large.png").size == (50, 40)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(ValueError, match="cannot read the image .*decompression bomb"):
        read_image(tmp_path / "large.png")
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", tmp_path):
        with pytest.raises(ValueError, match="cannot read the image .*no such file"):
            read_image(path)
    assert not recwarn.list


def test_prompts_files_with_images(tmp_path):
    IMAGES[0].save(tmp_path / "fox.png")
    file = write_prompts(tmp_path / "a.jsonl", [{"caption": " a fox ", "image": "fox.png"}, {"caption": "# a boat"}])
    assert choose_prompts(file) == (["a fox", "# a boat"], [tmp_path / "fox.png", None])
    assert read_prompts(file) == ["a fox", "# a boat"]
    assert choose_prompts(file, ["mine"]) == (["mine"], [None])
    for line, message in (
        ({"caption": "a fox", "image": "wolf.png"}, "line 1: there is no image .*wolf.png"),
        ({"image": "fox.png"}, "line 1: expected .*caption.*, got"),
        ({"caption": "a fox", "picture": "fox.png"}, "line 1: expected"),
        ({"caption": 3}, "line 1: expected"),
        ({"caption": "a fox", "image": 3}, "line 1: expected"),
        (["a fox"], "line 1: expected"),
        ({"caption": " "}, "line 1: expected a caption, got an empty text"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            choose_prompts(write_prompts(tmp_path / "b.jsonl", [line]))
        assert "\n" not in str(error.value)
    (tmp_path / "c.jsonl").write_text("a fox\n")
    with pytest.raises(ValueError, match="line 1: expected"):
        choose_prompts(tmp_path / "c.jsonl")
    with pytest.raises(ValueError, match="got 3 images without"):
        choose_prompts(None, images=IMAGES)
    with pytest.raises(ValueError, match="an image for each of 2 prompts, got 1"):
        choose_prompts(None, ["a fox", "a boat"], IMAGES[:1])


@pytest.mark.parametrize(
    "pipeline, images, message",
    [
        (wan21, None, "every prompt of an image-to-video model needs an image, but 3 of 3 have none"),
        (wan21, [*IMAGES[:2], None], "every prompt of an image-to-video model needs an image, but 1 of 3 have none"),
        (tiny_teacher, IMAGES, "prompts of a text-to-video model must not have images, but 3 of 3 have one"),
        (lambda: tiny_pipeline(tiny_image_transformer()), None, "expected a text-to-video model or a WanImageToVideoP"),
        (
            lambda: tiny_image_pipeline(tiny_transformer(in_channels=33)),
            IMAGES,
            r"expected an image-to-video model with 36 channels \(latents, mask and image\), got one with 33",
        ),
        (
            lambda: tiny_image_pipeline(tiny_image_transformer(clip=False), expand_timesteps=True),
            IMAGES,
            "expand_timesteps",
        ),
        (
            lambda: tiny_image_pipeline(tiny_image_transformer(pos_embed_seq_len=10)),
            IMAGES,
            "for a first frame, got one for a first and a last frame",
        ),
        (wan21, IMAGES, "max_sequence_length must be 512 for a model with image embeddings, got 20"),
    ],
)
def test_images_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, pipeline, images, message):
    with pytest.raises(ValueError, match=message) as error:
        train(tiny_config(tmp_path / "run"), pipeline(), PROMPTS, images)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
