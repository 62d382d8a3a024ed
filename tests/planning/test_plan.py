"""What a plan says (layouts, options, hours) and what it refuses."""

import json
import re
import shutil

import pytest
import torch
from tiny import tiny_image_pipeline, tiny_image_transformer, tiny_pipeline, tiny_transformer

from linvideo.commands.main import main
from linvideo.planning import plan
from linvideo.planning.memory import TRAINING, Layout, held
from linvideo.planning.plan_text import text
from linvideo.planning.sizes import read_sizes
from linvideo.run import load_config
from linvideo.run.forward_times import cache_file, remember
from linvideo.trajectories.collect import TrajectoryConfig
from linvideo.transfer import TrainConfig

SMALL, LARGE, IMAGE = (read_sizes(name, TrajectoryConfig()) for name in ("wan2.1-1.3b", "wan2.1-14b", "wan2.1-i2v-14b"))
USUAL = "--mixed_precision bf16 --gradient_checkpointing true --train_batch_size 1 --gradient_accumulation_steps 8"
USUAL += " --warmup.batch_size 1 --sensitivity.batch_size 1"


def make(sizes, options: str = USUAL, **arguments) -> dict:
    return plan.make_plan(sizes, load_config(["--output_dir", "run", *options.split()], TrainConfig), **arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "tiny"
    tiny_pipeline().save_pretrained(path)
    return path


def said(capsys, *argv: object) -> str:
    assert main(["plan", *map(str, argv)]) == 0
    return capsys.readouterr().out


def refused(capsys, *argv: object) -> str:
    try:
        status = main(["plan", *map(str, argv)])
    except SystemExit as stop:  # argparse itself refuses
        status = stop.code
    assert status == 2
    return capsys.readouterr().err


def test_nothing_is_suggested_when_the_run_fits():
    result = make(SMALL)
    assert list(result["layouts"]) == ["as configured"] and result["layouts"]["as configured"]["fits"]
    assert " ".join(result["layouts"]["as configured"]["options"][:4]) in USUAL
    assert result["measured"] == {} and result["collection_hours"] is None
    assert set(result["layouts"]["as configured"]["steps_per_hour"].values()) == {None}


def test_the_defaults_do_not_fit_a_real_model_but_other_options_do():
    """The suggested options parse, keep the global batch, and fit in a plan of their own."""
    column = make(SMALL, "")["layouts"]["suggested"]
    assert column["fits"] and column["options"][0] == "--mixed_precision bf16"
    again = make(SMALL, " ".join(column["options"]))
    assert again["global_batch"] == 8 and again["layouts"]["as configured"]["totals"] == column["totals"]


@pytest.mark.parametrize(
    "gpus, memory, chosen",
    [
        (8, 80, {"shard": 8, "lora": None}),
        (16, 80, {"shard": 8, "lora": None}),
        (2, 80, {"lora": 64}),
        (1, 80, {"lora": 64}),
    ],
)
def test_14b_needs_several_gpus_or_adapters(gpus, memory, chosen):
    options = USUAL.replace("steps 8", f"steps {16 // gpus}") + " --parallel.shard_degree 1"
    result = make(LARGE, options, gpus=gpus, gpu_memory=memory)
    assert not result["layouts"]["as configured"]["fits"]
    column = result["layouts"]["suggested"]
    layout = Layout(**column["layout"])
    assert column["fits"] and max(column["totals"].values()) <= 0.9e9 * memory
    assert chosen.items() <= column["layout"].items()
    assert layout.global_batch == 16
    assert LARGE.tokens % layout.context_parallel == LARGE.config.num_attention_heads % layout.context_parallel == 0
    again = make(LARGE, " ".join(column["options"]), gpus=gpus, gpu_memory=memory)["layouts"]["as configured"]
    assert again["totals"] == column["totals"]


def test_two_experts(tmp_path, folder):
    """Both are in memory while trajectories are sampled, and only one of them afterwards."""
    tiny_pipeline(transformer_2=tiny_transformer(), boundary_ratio=0.9).save_pretrained(tmp_path / "two")
    video = TrajectoryConfig(height=32, width=32, num_frames=5)
    for one, two in (("wan2.1-14b", "wan2.2-a14b"), (str(folder), str(tmp_path / "two"))):
        sizes = [read_sizes(name, video) for name in (one, two)]
        sampled = [held(each, TrainConfig("run"), Layout(), "trajectories")[0]["frozen teacher"] for each in sizes]
        assert sampled[1] == 2 * sampled[0]
        one, two = (make(each, USUAL)["layouts"]["as configured"]["stages"] for each in sizes)
        assert two["fine-tuning"] == one["fine-tuning"]


def test_image_to_video(tmp_path):
    """A folder is planned by its own configs; only an image-to-video model needs memory and disk space for images."""
    options = f"{USUAL} --parallel.shard_degree 8 --gradient_accumulation_steps 1"
    text_to_video, image = (make(sizes, options, gpus=8) for sizes in (LARGE, IMAGE))
    stages = [plan["layouts"]["as configured"]["stages"] for plan in (text_to_video, image)]
    more = IMAGE.parameters - LARGE.parameters
    assert stages[1]["fine-tuning"]["AdamW state"] - stages[0]["fine-tuning"]["AdamW state"] == pytest.approx(
        more, 0.01
    )
    assert text_to_video["condition_bytes"] == 0 and "image conditions" not in text(text_to_video)
    assert image["condition_bytes"] == 2 * (20 * 21 * 60 * 104 + 257 * 1280)
    assert "image conditions: 5.90 MB per prompt" in text(image)
    video = TrajectoryConfig(height=32, width=64, num_frames=9)
    tiny_image_pipeline().save_pretrained(tmp_path / "clip")
    first, second = (tiny_image_transformer(clip=False) for _ in range(2))
    tiny_image_pipeline(first, transformer_2=second, boundary_ratio=0.9).save_pretrained(tmp_path / "two")
    clip, two = (read_sizes(str(tmp_path / name), video) for name in ("clip", "two"))
    assert (clip.image_tokens, clip.config.in_channels, clip.latents, clip.experts) == (5, 36, (16, 3, 4, 8), 1)
    assert (two.image_tokens, two.image_encoder, two.config.in_channels, two.experts) == (0, 0, 36, 2)


def test_nothing_fits():
    layouts = make(LARGE, gpu_memory=30)["layouts"]
    assert layouts["suggested"] is None
    assert "suggested: nothing fits" in text(make(LARGE, gpu_memory=30))


def test_a_critic_is_planned_when_asked_for():
    result = make(SMALL, f"{USUAL} --parallel.shard_degree 1", gpus=2, critic=True, gpu_memory=60)
    column = result["layouts"]["suggested"]
    assert column["stages"]["mixed stage"]["critic, with its training"] == 16 * SMALL.parameters / 2
    assert "with a critic" in text(result)


def test_adapters_and_context_parallelism_as_configured():
    whole, lora = (
        make(SMALL, f"{USUAL}{more}")["layouts"]["as configured"]["stages"]["fine-tuning"]
        for more in ("", " --lora.rank 16")
    )
    assert lora["AdamW state"] < whole["AdamW state"] / 50 and "frozen teacher" not in lora
    assert lora["frozen base, also the teacher"] == whole["frozen teacher"]
    split = make(SMALL, f"{USUAL} --parallel.ulysses_degree 4", gpus=4)["layouts"]["as configured"]
    assert split["stages"]["fine-tuning"]["saved for the backward"] < whole["saved for the backward"] / 3
    assert split["stages"]["fine-tuning"]["AdamW state"] == pytest.approx(whole["AdamW state"] / 4, rel=0.01)
    offloaded = make(SMALL, f"{USUAL} --offload_teacher true")["layouts"]["as configured"]
    assert "frozen teacher" not in offloaded["stages"]["fine-tuning"]


def test_stages_that_the_run_does_not_have_are_not_planned():
    options = f"{USUAL} --selection.method layers --selection.layers [1,2] --sensitivity.num_states 0"
    column = make(SMALL, options)["layouts"]["as configured"]
    assert list(column["totals"]) == ["trajectories", "warm-up", "fine-tuning"]


def test_pace_from_a_given_forward():
    result = make(SMALL, f"{USUAL} --objective.name hybrid --trajectories.stride 5", forward_seconds=0.5)
    assert result["collection_hours"] == pytest.approx(192 * 50 * 2 * 0.5 / 3600)
    rates = result["layouts"]["as configured"]["steps_per_hour"]
    # 8 videos: forward, recomputation and a backward that counts as two; ADM adds the teacher, the student again, and
    # the other condition
    assert rates == pytest.approx({"mixed stage": 3600 / (8 * 4 * 0.5), "fine-tuning": 3600 / (8 * 5.5 * 0.5)})
    assert "steps per hour are estimated" in text(result)
    assert make(SMALL, USUAL, gpus=8, forward_seconds=1.0)["collection_hours"] == pytest.approx(192 * 100 / 6 / 3600)
    unguided = make(SMALL, f"{USUAL} --trajectories.guidance_scale 1", forward_seconds=0.5)
    assert unguided["collection_hours"] == pytest.approx(192 * 50 * 0.5 / 3600)


def test_hours_from_what_this_machine_has_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = make(SMALL, USUAL, forward_seconds=0.5)
    sizes, cpu = SMALL, torch.device("cpu")
    for tokens, seconds in ((9, 7.0), (sizes.tokens, 9.0), (sizes.tokens, 0.5)):  # the nearest, and the newest of equal
        remember(sizes.config, tokens, torch.bfloat16, cpu, seconds, "linvideo check")
    remember(sizes.config, sizes.tokens, torch.float32, cpu, 3.0, "linvideo check")
    here = make(SMALL, USUAL)
    assert here["layouts"] == given["layouts"] and here["collection_hours"] == given["collection_hours"]
    assert "by linvideo check" in here["measured"]["forward"]["source"] and "scaled" not in text(here)
    hours = here["layouts"]["as configured"]["hours"]
    config, rates = TrainConfig("x"), here["layouts"]["as configured"]["steps_per_hour"]
    assert hours == pytest.approx(
        {
            "trajectories": 192 * 100 * 0.5 / 3600,
            "warm-up": 80 * 2 * 0.5 / 3600,
            "sensitivity": config.sensitivity.num_states * 31 * 0.5 / 3600,
            "mixed stage": config.selection.max_train_steps / rates["mixed stage"],
            "fine-tuning": config.max_train_steps / rates["fine-tuning"],
        }
    )
    assert re.search(rf"hours in total +{sum(hours.values()):.3g}$", text(here), re.MULTILINE)
    shorter = read_sizes("wan2.1-1.3b", TrajectoryConfig(num_frames=41))  # 11 of 21 latent frames
    half = make(shorter)["measured"]["forward"]
    assert 0.5 * (11 / 21) ** 2 < half["seconds"] < 0.5 * 11 / 21
    assert f"scaled from {sizes.tokens:,} tokens" in half["source"]
    for content in ("", "[", '{"a": 1}', '[1, {"tokens": "x"}]'):
        cache_file().write_text(content)
        assert make(SMALL, USUAL)["measured"] == {}


def test_the_command(folder, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(f"pretrained_model_name_or_path: {folder}\nmixed_precision: bf16\nuse_ema: true\ndevice: cuda\n")
    video = ["--height", 32, "--width", 64, "--num_frames", 9]
    out = said(capsys, "--config", config, *video, "--train_batch_size", 2, "--gpus", 2)
    assert "48 tokens" not in out and "24 tokens" in out and "EMA" in out
    assert "time to collect them: unmeasured (run linvideo check" in out and "or give --forward_seconds" in out
    assert "--mixed_precision bf16" in out and "--train_batch_size 2" in out and "--parallel.shard_degree 2" in out
    result = json.loads(said(capsys, folder, *video, "--forward_seconds", 0.1, "--json"))
    assert result["tokens"] == 24 and set(result["saved_for_backward"]) == set(TRAINING)
    assert "hours on 1 GPU" in said(capsys, folder, *video, "--forward_seconds", 1)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--gpus 0", "gpus: must be at least 1, got 0"),
        ("--gpu_memory 0", "gpu_memory must be a positive number, got 0.0"),
        ("--lora.rank 0", "lora.rank must be at least 1, got 0"),
        ("--gpus 3 --parallel.ulysses_degree 2", "must divide the number of processes, got 2 with 3"),
        ("--gpus 8 --parallel.ulysses_degree 8", "must divide the 12 heads, got 8"),
        (
            "--gpus 8 --parallel.ulysses_degree 4 --parallel.ring_degree 2 --attention_backend flash"
            " --selection.method layers --selection.num_linear_layers 0 --selection.window_layers [2]",
            "ulysses_degree * ring_degree must divide the 12 heads of window layers, got 8",
        ),
        ("--forward_seconds nan", "forward_seconds: must be finite and not negative, got nan"),
        ("--height 100", "trajectories.height must be a multiple of 16, got 100"),
        ("--num_frames 80", "trajectories.num_frames must be 1 more than a multiple of 4, got 80"),
        ("--selection.num_linear_layers 31", "at most the model's 30 layers, got 31"),
        ("--nonsense 1", "nonsense"),
        (
            "wan3",
            "model must be one of wan2.1-1.3b, wan2.1-14b, wan2.2-a14b, wan2.1-i2v-14b, wan2.2-i2v-a14b, a pipeline"
            " folder or a Hub id, got 'wan3'",
        ),
        ("--config missing.yaml", "missing.yaml"),
        (
            "wan2.1-i2v-14b --prompts.max_sequence_length 256",
            "max_sequence_length must be 512 for a model with image embeddings, got 256",
        ),
    ],
)
def test_bad_input_is_named(capsys, flags, words):
    model = ["wan2.1-1.3b"] if flags.startswith("--") else []
    assert words in refused(capsys, *model, *flags.split())


@pytest.mark.parametrize(
    "pipeline, words",
    [
        (
            lambda: tiny_pipeline(tiny_transformer(in_channels=36)),
            "got a WanPipeline with 36 channels for latents of 16",
        ),
        (
            lambda: tiny_image_pipeline(tiny_transformer()),
            "with 36 channels (latents, mask and image), got one with 16",
        ),
        (lambda: tiny_image_pipeline(tiny_image_transformer(clip=False), expand_timesteps=True), "expand_timesteps"),
        (lambda: tiny_image_pipeline(tiny_image_transformer(pos_embed_seq_len=10)), "for a first and a last frame"),
    ],
)
def test_image_conditions_that_train_does_not_take(tmp_path, capsys, pipeline, words):
    pipeline().save_pretrained(tmp_path / "image")
    assert words in refused(capsys, tmp_path / "image")


def test_models_that_train_does_not_take(tmp_path, capsys):
    assert "plan needs MODEL" in refused(capsys)
    (tmp_path / "empty").mkdir()
    assert "cannot build from the configs of" in refused(capsys, tmp_path / "empty")
    two = tiny_pipeline(transformer_2=tiny_transformer(), boundary_ratio=0.9)
    two.save_pretrained(tmp_path / "two")
    main(["convert", str(tmp_path / "two"), "--output_dir", str(tmp_path / "made"), "--layers", "0"])
    assert "LinVideoWanTransformer3DModel" in refused(capsys, tmp_path / "made")


def test_a_damaged_config(folder, tmp_path, capsys):
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    broken = [("transformer", content) for content in ("{", '{"num_layers": "many"}', "[" * 100_000)]
    for part, changed in (
        ("transformer", {"num_layers": -1}),
        ("transformer", {"num_layers": 10**9}),
        ("transformer", {"num_attention_heads": 0}),
        ("transformer", {"attention_head_dim": 3}),
        ("transformer", {"patch_size": [1]}),
        ("transformer", {"patch_size": [0, 0, 0]}),
        ("vae", {"num_res_blocks": 10**9}),
        ("vae", {"dim_mult": []}),
        ("vae", {"scale_factor_spatial": 0}),
        ("text_encoder", {"num_layers": 10**9}),
    ):
        broken.append((part, json.dumps(json.loads((folder / part / "config.json").read_text()) | changed)))
    for part, content in broken:
        path = damaged / part / "config.json"
        path.write_text(content)
        assert "cannot build from the configs of" in refused(capsys, damaged)
        shutil.copy(folder / part / "config.json", path)


def test_other_commands_still_refuse_unknown_options(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["info", "x", "--nonsense", "1"])
    assert "unrecognized arguments: --nonsense 1" in capsys.readouterr().err
