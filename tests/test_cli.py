"""The `linvideo` command on tiny pipelines: what it makes; bad input ends with one line and status 2, unchanged."""

import argparse
import json
import os
import re
import signal

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from tiny import TEXT_DIM, tiny_image, tiny_image_pipeline, tiny_pipeline, tiny_tokenizer, tiny_transformer

from linvideo import cli, load_pipeline, models
from linvideo.run import TrainingStopped


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "stock"
    tiny_pipeline().save_pretrained(path)
    return path


def refused(capsys, *argv: object) -> str:
    """The one line of a refusal."""
    try:
        status = cli.main([str(word) for word in argv])
    except SystemExit as stop:  # argparse's own refusals
        status = stop.code
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if "error:" in line]
    assert status == 2 and len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


def test_convert_then_info(folder, tmp_path, capsys):
    target = tmp_path / "converted"
    assert cli.main(["convert", "--model", str(folder), "--output_dir", str(target), "--layers", "0", "2"]) == 0
    assert models.describe(load_pipeline(target).transformer).layers_linear == [0, 2]
    capsys.readouterr()
    assert cli.main(["info", "--model", str(target)]) == 0
    assert "linear  (2): 0, 2" in capsys.readouterr().out


def test_layers_are_named_as_info_names_them():
    parser = cli.make_parser()
    for text in ("0 2 3 4", "0,2-4", "0 2-4", "0, 2-4"):
        args = parser.parse_args(["convert", "--model", "m", "--output_dir", "o", "--layers", *text.split(" ")])
        assert [layer for some in args.layers for layer in some] == [0, 2, 3, 4]


def test_two_experts_are_both_converted(tmp_path, capsys):
    tiny_pipeline(transformer_2=tiny_transformer(seed=1), boundary_ratio=0.9).save_pretrained(tmp_path / "two")
    words = ["convert", "--model", str(tmp_path / "two"), "--output_dir", str(tmp_path / "new"), "--layers", "1"]
    assert cli.main(words) == 0
    assert "both experts were converted" in capsys.readouterr().out
    assert "**untrained**" in (tmp_path / "new" / "README.md").read_text()
    assert cli.main(["info", "--model", str(tmp_path / "new")]) == 0
    out = capsys.readouterr().out
    assert "transformer: LinVideoWan" in out and "transformer_2: LinVideoWan" in out
    assert out.count("linear  (1): 1") == 2


def test_generate_writes_a_video_of_the_asked_length(folder, tmp_path):
    imageio = pytest.importorskip("imageio")
    output = tmp_path / "new" / "video.mp4"
    size = ["--height", "32", "--width", "32", "--num_frames", "9", "--num_inference_steps", "2"]
    assert cli.main(["generate", "--model", str(folder), "--prompt", "a cat", "--output", str(output), *size]) == 0
    assert len(imageio.mimread(output)) == 9
    assert [file.name for file in output.parent.iterdir()] == ["video.mp4"]


SMALL = [
    "--height",
    "32",
    "--width",
    "32",
    "--num-frames",
    "5",
    "--num-inference-steps",
    "2",
]  # as diffusers-cli has it


def test_generate_says_what_it_cost_and_what_is_linear(folder, tmp_path, capfd):
    converted = tmp_path / "converted"
    models.save_pipeline(models.convert(load_pipeline(folder), layers=[1], mode="linear"), converted)
    words = ["generate", "--model", str(converted), "--prompt", "a cat", "--output", str(tmp_path / "v.mp4"), *SMALL]
    assert cli.main(words) == 0
    out, err = capfd.readouterr()
    assert "linear  (1): 1" in out and "s a step" in out and "s in all" in out and "GB" in out
    assert "video 1 of 1: 100%" in err  # the progress bar


def test_generate_many_videos(folder, tmp_path, capsys):
    imageio = pytest.importorskip("imageio")
    (tmp_path / "prompts.txt").write_text("a cat\n# no prompt\na dog\n")
    output = tmp_path / "videos"
    words = ["generate", "--model", folder, "--prompts_file", tmp_path / "prompts.txt", "--output", output, *SMALL]
    words += ["--num_videos_per_prompt", "2", "--seed", "7"]
    assert cli.main([str(word) for word in words]) == 0
    names = [f"{prompt}-{seed}.mp4" for prompt in ("0000", "0001") for seed in (7, 8)]
    assert sorted(path.name for path in output.iterdir()) == [*names, "videos.jsonl"]
    index = [json.loads(line) for line in (output / "videos.jsonl").read_text().splitlines()]
    assert [entry["video"] for entry in index] == names
    assert index[1] == {"video": "0000-8.mp4", "caption": "a cat", "seed": 8} and index[2]["caption"] == "a dog"
    single = [
        "generate",
        "--model",
        folder,
        "--prompt",
        "a dog",
        "--output",
        tmp_path / "dog.mp4",
        "--seed",
        "8",
        *SMALL,
    ]
    assert cli.main([str(word) for word in single]) == 0
    videos = {path: np.stack(imageio.mimread(path)) for path in (*output.glob("*.mp4"), tmp_path / "dog.mp4")}
    assert np.array_equal(
        videos[output / "0001-8.mp4"], videos[tmp_path / "dog.mp4"]
    )  # a seed makes the same video again
    assert not np.array_equal(videos[output / "0001-7.mp4"], videos[output / "0001-8.mp4"])

    (output / "0000-7.mp4").write_text("mine")
    for path in output.glob("000[01]-8.mp4"):
        path.unlink()
    assert "0000-7.mp4 exists" in refused(capsys, *words)
    assert (output / "0000-7.mp4").read_text() == "mine" and len(list(output.glob("*.mp4"))) == 2
    assert cli.main([str(word) for word in [*words, "--overwrite"]]) == 0
    assert len(imageio.mimread(output / "0000-7.mp4")) == 5
    assert [json.loads(line)["video"] for line in (output / "videos.jsonl").read_text().splitlines()] == names
    (output / "videos.jsonl").write_text("mine")
    assert "no index of videos" in refused(capsys, *words, "--overwrite")
    assert (output / "videos.jsonl").read_text() == "mine"


NEVER = "f" * 300
RUN = ["--pretrained_model_name_or_path", "MODEL", "--output_dir", "run"]
BAD = [
    (["generate", "--model", "MODEL", "--prompts_file", "/dev/full", "--output", "o"], "cannot read the prompts file"),
    (["generate", "--model", NEVER, "--prompt", "x"], NEVER[:50]),
    (["generate", "--model", "MODEL", "--prompt", "x", "--output", f"{NEVER}.mp4"], "too long"),
    (["convert", "--model", "MODEL", "--output_dir", NEVER], "too long"),
    (["convert", "--model", "MODEL", "--output_dir", "LOOP"], "loop"),
    (["convert", "--model", "MODEL", "--output_dir", "o", "--feature_maps", "/dev/null"], "/dev/null"),
    (["info", "--model", "DEEP"], "cannot load a pipeline from"),
    (["check", "MODEL", "--height", "31"], "multiple of 16"),
    (["check", "MODEL", "--output", "/dev/null"], ".mp4"),
    (["check", "MODEL", "--width", str(16 * 10**12)], "must be at most 100000"),
    (["generate", "--model", "MODEL", "--prompt", "x", "--num_inference_steps", "9" * 9], "must be at most 100000"),
    (["train", *RUN, "--trajectories.height", str(16 * 10**12)], "trajectories.height must be at most 100000"),
    (["train", *RUN, "--validation.num_inference_steps", "9" * 9], "must be at most 100000"),
    (["analyze", "MODEL", "--output_dir", "o", "--speedup", "nan"], "speedup"),
    (["analyze", "MODEL", "--output_dir", "o", "--num_trajectories", "-1"], "must be at least 1"),
    (["analyze", "MODEL", "--output_dir", "o", "--timed_size", "0", "0", "0"], "must be at least 1"),
    (["analyze", "MODEL", "--output_dir", "o", "--prompts_file", "/"], "cannot read the prompts file"),
    (["evaluate", "MODEL", "--suite", "fidelity", "--output_dir", "o"], "--teacher"),
    (["evaluate", "MODEL", "--suite", "fidelity", "--output_dir", "o", "--num_prompts", "-1"], "must be at least 1"),
    (["evaluate", "MODEL", "--suite", "vbench", "--output_dir", "o", "--full_info", "/dev/null"], "not valid JSON"),
    (["plan", "--model", "MODEL", "--gpus", str(10**9)], "gpus must be from 1 to 100000"),
    (["plan", "--model", "MODEL", "--gpus", "1e9"], "expected a whole number"),
    (["plan", "--model", "wan2.1-1.3b", "--train_batch_size", str(10**12)], "the global batch must be at most"),
    (["plan", "--model", "MODEL", "--max_train_steps", str(10**30)], "max_train_steps must lie within"),
    (["plan", "--model", "MODEL", "--gpu_memory", "1e400"], "must be finite"),
    (["train", *RUN, "--seed", "9" * 30], "seed must lie within"),
    (["train", *RUN, "--optimizer.learning_rate", "1e400"], "optimizer.learning_rate must be finite"),
    (["train", *RUN, "--attention_backend", "sage", "--device", "cpu"], "cannot use attention_backend 'sage' here"),
    (["train", *RUN, "--prompts.prompts_file", "/dev/full"], "cannot read the prompts file"),
    (["train", "--config", "/"], "/"),
    (["distill", *RUN, "--num_steps", "0"], "num_steps must be at least 1"),
    (["distill", *RUN, "--timesteps", "[.nan]"], "timesteps must fall"),
    (["collect", "--worker", "1/1", *RUN], "--worker must be number/count"),
    (["collect", "--worker", "\u00b2/3", *RUN], "--worker must be number/count"),
    (["demo", "--output_dir", "o", "--videos", "3"], "videos must be at least 4"),
    (["demo", "--output_dir", "o", "--stages", ""], "stages must be of"),
]


@pytest.mark.parametrize("words, expected", BAD, ids=[f"{words[0]}-{i}" for i, (words, _) in enumerate(BAD)])
def test_bad_input_ends_in_one_line(folder, tmp_path, capsys, monkeypatch, words, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "model_index.json").write_text("[" * 100_000)
    (tmp_path / "loop").symlink_to("loop")
    places = {"MODEL": folder, "DEEP": tmp_path / "deep", "LOOP": tmp_path / "loop"}
    message = refused(capsys, *(places.get(word, word) for word in words))
    assert expected in message and "\n" not in message
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".mp4", ".safetensors")]


def test_words_that_the_model_does_not_know_are_named(recwarn):
    from linvideo.demo import teacher
    from linvideo.demo.world import WORLDS
    from linvideo.trajectories.prompts import warn_of_unknown_words

    caption = WORLDS["small"].training_captions()[0]
    tokenizer = teacher.build_tokenizer(WORLDS["small"])
    warn_of_unknown_words(tokenizer, [caption, ""])
    warn_of_unknown_words(tiny_tokenizer(), ["any word \u4e2d"])
    assert not recwarn
    with pytest.warns(UserWarning, match="does not know these words of the captions: 'zebra', 'flies'$"):
        warn_of_unknown_words(tokenizer, [f"{caption} zebra", "zebra flies"])


def test_compare_puts_the_teacher_at_the_left(folder, tmp_path, capsys):
    imageio = pytest.importorskip("imageio")
    converted = tmp_path / "converted"
    models.save_pipeline(models.convert(load_pipeline(folder), mode="linear", feature_map="relu"), converted)
    words = ["generate", "--prompt", "a cat", *SMALL]
    for name, more in (("alone", []), ("both", ["--compare", str(folder)])):
        output = ["--output", str(tmp_path / f"{name}.mp4")]
        assert cli.main([*words, "--model", str(converted), *output, *more]) == 0
    assert "PSNR" in capsys.readouterr().out
    alone, both = (np.stack(imageio.mimread(tmp_path / f"{name}.mp4")).astype(int) for name in ("alone", "both"))
    assert both.shape == (5, 32, 64, 3) and abs(both[:, :, 32:] - alone).mean() < 3  # as far as the codec lets it
    itself = ["--output", str(tmp_path / "itself.mp4"), "--compare", str(folder)]
    assert cli.main([*words, "--model", str(folder), *itself]) == 0
    assert "PSNR 100.00 dB and SSIM 1.0000" in capsys.readouterr().out


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 1)])
def test_the_exit_status_of_a_stopped_run(number, status, capsys, monkeypatch):
    def stopped(_):
        raise TrainingStopped("after step 3 of warmup, which is saved", number)

    monkeypatch.setattr(cli, "train", stopped)
    assert cli.main(["train"]) == status
    assert "which is saved; continue with --resume_from_checkpoint latest" in capsys.readouterr().err


@pytest.mark.parametrize("call", [lambda _: torch.empty(2**60), lambda _: bytearray(2**62), lambda _: np.empty(2**59)])
def test_too_little_memory_ends_in_one_line(call, capsys, monkeypatch):
    monkeypatch.setattr(cli, "train", call)
    assert cli.main(["train"]) == 1
    assert re.fullmatch("linvideo: error: not enough memory: .+\n", capsys.readouterr().err)


def test_a_distilled_model_and_its_teacher_keep_their_own_settings(folder, tmp_path, monkeypatch):
    few = load_pipeline(folder)
    few.scheduler = models.FewStepScheduler([1000.0, 500.0])
    models.save_pipeline(few, tmp_path / "few")
    seen = []
    monkeypatch.setattr(
        "linvideo.evaluation.sampling.make_videos", lambda *arguments: seen.append(arguments) or iter(())
    )
    words = ["generate", "--model", str(tmp_path / "few"), "--prompt", "a cat", "--output", str(tmp_path / "v.mp4")]
    assert cli.main([*words, "--compare", str(folder), "--num_inference_steps", "30"]) == 0
    _, _, settings, teacher, teacher_settings, *_ = seen[0]
    assert (settings["num_inference_steps"], settings["guidance_scale"]) == (2, 1.0)
    assert teacher_settings == {"negative_prompt": "", "num_inference_steps": 30}
    assert type(teacher.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    words[2] = str(folder)
    assert cli.main([*words, "--compare", str(tmp_path / "few"), "--guidance_scale", "3"]) == 0
    assert seen[1][2]["guidance_scale"] == 3.0 and seen[1][4]["guidance_scale"] == 1.0
    assert "num_inference_steps" not in seen[1][2] and seen[1][4]["num_inference_steps"] == 2


def test_a_pipeline_that_takes_an_image(folder, tmp_path, capsys):
    tiny_image_pipeline().save_pretrained(tmp_path / "image")
    tiny_image().save(tmp_path / "i.png")
    words = ["generate", "--model", tmp_path / "image", "--prompt", "a cat", "--output", tmp_path / "v.mp4", *SMALL]
    assert "takes an image" in refused(capsys, *words)
    assert "takes no image" in refused(capsys, *words, "--image", tmp_path / "i.png", "--model", folder)
    (tmp_path / "no.png").write_text("no image")
    assert "cannot read" in refused(capsys, *words, "--image", tmp_path / "no.png")
    assert "WanPipeline" in refused(capsys, *words, "--image", tmp_path / "i.png", "--compare", folder)
    assert not (tmp_path / "v.mp4").exists()
    assert cli.main([str(word) for word in [*words, "--image", tmp_path / "i.png"]]) == 0


def test_existing_output_is_kept_without_overwrite(folder, tmp_path, capsys):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "mine.mp4").write_text("mine")
    assert "exists" in refused(capsys, "convert", "--model", folder, "--output_dir", kept)
    assert "exists" in refused(capsys, "demo", "--output_dir", kept)
    assert "exists" in refused(capsys, "generate", "--model", folder, "--prompt", "x", "--output", kept / "mine.mp4")
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["mine.mp4"]
    assert (kept / "mine.mp4").read_text() == "mine"


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--layers", "7"], "from 0 to 2"),
        (["--layers", "0", "0"], "duplicates"),
        (["--layers", "first"], "first"),
        (["--layers", "2-1"], "from low to high"),
        (["--layers", "0-99999999999"], "0-99999999999"),
        (["--layers", "1,,2"], "1,,2"),
        (["--layers", ""], "expected 0-based layer numbers"),
        (["--layers", "\u0663"], "expected 0-based layer numbers"),
        (["--layers", "0-1", "1,2"], "duplicates"),
        (["--layers", "all", "1"], "got both"),
        (["--mode", "half"], "half"),
        (["--feature_map", "identity"], "identity"),
        (["--dtype", "int8"], "int8"),
    ],
)
def test_bad_conversion_changes_nothing(folder, tmp_path, capsys, flags, words):
    assert words in refused(capsys, "convert", "--model", folder, "--output_dir", tmp_path / "new", *flags)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_pipeline(tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "model_index.json" in refused(capsys, "info", "--model", empty)
    assert "missing" in refused(capsys, "info", "--model", tmp_path / "missing")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--height", "30"], "multiple of 16"),
        (["--num_frames", "10"], "num_frames"),
        (["--num_inference_steps", "0"], "num_inference_steps"),
        (["--fps", "0"], "--fps: must be at least 1, got 0"),
        (["--fps", "-1"], "--fps"),
        (["--fps", "16.5"], "--fps: expected a whole number"),
        (["--guidance_scale", "nan"], "--guidance_scale: must be finite and not negative, got nan"),
        (["--guidance_scale", "-1"], "--guidance_scale"),
        (["--guidance_scale", "inf"], "--guidance_scale"),
        (["--seed", "-1"], "--seed"),
        (["--seed", str(2**64)], "--seed: must be at most"),
        (["--device", "nowhere"], "nowhere"),
        (["--output", "video.xyz"], ".mp4"),
        (["--num_videos_per_prompt", "0"], "at least 1"),
        (["--num_videos_per_prompt", str(10**12)], "at most 10000"),
        (["--num_videos_per_prompt", "2"], "a folder"),
        (["--prompts_file", "prompts.txt"], "not allowed with"),
        (["--cpu_offload", "model", "--device", "cpu"], "needs a GPU"),
        (["--attention_backend", "none_such"], "none_such"),
        (["--attention_backend", "sage", "--device", "cpu"], "cannot use attention_backend 'sage' here: "),
        (["--attention_backend", "_native_cudnn", "--device", "cpu"], "cannot use attention_backend '_native_cudnn'"),
        (["--compare", "absent"], "absent"),
    ],
)
def test_bad_sizes_are_refused(folder, tmp_path, capsys, flags, words):
    assert words in refused(
        capsys, "generate", "--model", folder, "--prompt", "x", "--output", tmp_path / "v.mp4", *flags
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("status", [0, 1])
def test_a_video_that_cannot_be_written_is_found_before_the_model_is_loaded(tmp_path, capsys, monkeypatch, status):
    ffmpeg, output = tmp_path / "ffmpeg", tmp_path / "v.mp4"
    ffmpeg.write_text(f"#!/bin/sh\ncat > /dev/null\necho No space left on device >&2\nexit {status}\n")
    ffmpeg.chmod(0o700)
    output.write_text("mine")
    monkeypatch.setattr(cli, "load", None)
    wrong = tmp_path / "v.mp4" / "w.mp4"
    assert "Not a directory" in refused(capsys, "evaluate", "m", "--suite", "vbench", "--output_dir", output)
    for command in (["generate", "--model", "m", "--prompt", "x"], ["check", "m"]):
        line = refused(capsys, *command, "--output", wrong)
        assert f"cannot write the video {wrong}: Not a directory" in line
        with monkeypatch.context() as patch:
            patch.setenv("IMAGEIO_FFMPEG_EXE", str(ffmpeg))
            line = refused(capsys, *command, "--output", output, "--overwrite")
        assert ("No space left" if status else "No such file") in line
    assert output.read_text() == "mine" and len(list(tmp_path.iterdir())) == 2


def test_a_target_larger_than_the_model(folder, tmp_path, capsys):
    run = tmp_path / "run"
    flags = ["--pretrained_model_name_or_path", folder, "--output_dir", run, "--selection.num_linear_layers", "9"]
    assert "3 layers" in refused(capsys, "train", *flags)
    assert "nonsense" in refused(capsys, "train", "--output_dir", run, "--nonsense", "1")
    assert not run.exists()


def test_no_command_is_one_line(capsys):
    assert "COMMAND" in refused(capsys)


def test_train_from_yaml_then_generate(folder, tmp_path, capsys, monkeypatch):
    run, config = tmp_path / "run", tmp_path / "run.yaml"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "captions.txt").write_text("a cat\na dog\n")
    config.write_text(
        f"pretrained_model_name_or_path: {os.path.relpath(folder)}\noutput_dir: run\nmax_train_steps: 1\n"
        "progress: false\noverwrite_output_dir: true\nprompts: {prompts_file: captions.txt}\n"
        "trajectories: {num_trajectories: 2, num_inference_steps: 2, height: 32, width: 32, num_frames: 9}\n"
        "warmup: {max_train_steps: 1}\nsensitivity: {num_states: 2}\nselection: {num_linear_layers: 1}\n"
        "validation: {steps: 9, num_videos: 1, num_inference_steps: 1}\n"
    )
    assert cli.main(["train", "--config", str(config), "--selection.max_train_steps", "1"]) == 0
    assert "linear layers: [" in capsys.readouterr().out
    assert len(models.describe(load_pipeline(run / "pipeline").transformer).layers_linear) == 1
    card = (run / "pipeline" / "README.md").read_text()
    assert "- selective transfer: optimizer steps: warm-up 1, selection 1, fine-tuning 1; " in card
    assert "objective mse" in card and "32x32, 9 frames" in card and str(tmp_path) not in card
    row = json.loads((run / "validation.jsonl").read_text().splitlines()[-1])
    assert row["stage"] == "finetune" and f"| PSNR, dB | {row['psnr']:.4g} |" in card
    stored = json.loads((run / "pipeline" / "scheduler" / "sampling.json").read_text())
    assert stored.pop("fps") == 16 and stored.pop("guidance_scale") == 5.0
    assert stored == {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 2}
    size = ["--num_frames", "5", "--num_inference_steps", "1"]
    words = ["--model", str(run / "pipeline"), "--prompt", "a cat", "--output", str(tmp_path / "v.mp4")]
    assert cli.main(["generate", *words, *size]) == 0
    assert (tmp_path / "v.mp4").stat().st_size > 0

    (tmp_path / "elsewhere").mkdir()  # the recorded config does the same again, in any folder
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert "is not empty" in refused(capsys, "train", "--config", run / "config.yaml", "--output_dir", run)
    for words in (["--output_dir", "again"], ["--output_dir", run, "--resume_from_checkpoint", "latest"]):
        assert cli.main(["train", "--config", str(run / "config.yaml"), *map(str, words)]) == 0
    weights = "pipeline/transformer/diffusion_pytorch_model.safetensors"
    assert (run / weights).read_bytes() == (tmp_path / "elsewhere" / "again" / weights).read_bytes()


def test_a_pipeline_of_another_family(tmp_path, capsys):
    other = DDPMPipeline(
        UNet2DModel(
            8,
            block_out_channels=(8,),
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            norm_num_groups=4,
        ),
        DDPMScheduler(),
    )
    other.save_pretrained(tmp_path / "ddpm")
    assert "video transformer" in refused(capsys, "info", "--model", tmp_path / "ddpm")
    words = ["--model", tmp_path / "ddpm", "--prompt", "x", "--output", tmp_path / "v.mp4"]
    assert "video transformer" in refused(capsys, "generate", *words)
    train = ["--pretrained_model_name_or_path", tmp_path / "ddpm", "--output_dir", tmp_path / "run"]
    assert "Wan transformer" in refused(capsys, "train", *train)


def ltx_pipeline(name: str = "LTXPipeline"):
    from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXVideoTransformer3DModel
    from transformers import T5Config, T5EncoderModel

    blocks = {"block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    layers = {"layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 5}
    text = T5Config(vocab_size=260, d_model=TEXT_DIM, d_kv=8, d_ff=37, num_layers=1, num_heads=4)
    size = {"in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
    return getattr(diffusers, name)(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKLLTXVideo(latent_channels=8, **blocks, **layers),
        text_encoder=T5EncoderModel(text),
        tokenizer=tiny_tokenizer(),
        transformer=LTXVideoTransformer3DModel(**size, cross_attention_dim=32, caption_channels=TEXT_DIM),
    )


def test_vae_and_image_encoder_of_wan_stay_fp32(tmp_path):
    for name, pipeline, expected in (
        ("wan", tiny_image_pipeline(), torch.float32),
        ("ltx", ltx_pipeline(), torch.bfloat16),
    ):
        pipeline.save_pretrained(tmp_path / name)
        loaded = cli.load(argparse.Namespace(model=str(tmp_path / name), dtype="bfloat16"))
        assert loaded.transformer.dtype == loaded.text_encoder.dtype == torch.bfloat16
        assert loaded.vae.dtype == getattr(loaded, "image_encoder", loaded.vae).dtype == expected


def test_an_image_is_asked_for_where_it_is_needed(tmp_path, capsys):
    words = ["generate", "--prompt", "a cat", "--output", tmp_path / "v.mp4", *SMALL, "--num_frames", "9", "--model"]
    for name in ("LTXConditionPipeline", "LTXImageToVideoPipeline"):
        ltx_pipeline(name).save_pretrained(tmp_path / name)
    assert "takes an image" in refused(capsys, *words, tmp_path / "LTXImageToVideoPipeline")
    assert cli.main([str(word) for word in [*words, tmp_path / "LTXConditionPipeline"]]) == 0
    tiny_image().save(tmp_path / "i.png")
    words += [tmp_path / "LTXConditionPipeline", "--image", tmp_path / "i.png", "--overwrite"]
    assert cli.main([str(word) for word in words]) == 0
    parts = tiny_pipeline().components
    parts = {name: parts[name] for name in ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")}
    diffusers.WanVideoToVideoPipeline(**parts).save_pretrained(tmp_path / "video")
    assert "which needs video" in refused(capsys, *words[:-4], tmp_path / "video", "--overwrite")


def test_another_family_converts_and_generates_but_does_not_train(tmp_path, capsys):
    ltx_pipeline().save_pretrained(tmp_path / "ltx")
    words = ["convert", "--model", str(tmp_path / "ltx"), "--output_dir", str(tmp_path / "new"), "--layers", "1"]
    assert cli.main(words) == 0
    assert cli.main(["info", "--model", str(tmp_path / "new")]) == 0
    assert "LinVideoLTXVideoTransformer3DModel: 2 layers" in capsys.readouterr().out
    words = ["generate", "--prompt", "a cat", "--output", str(tmp_path / "v.mp4"), *SMALL, "--num_frames", "9"]
    assert cli.main([*words, "--model", str(tmp_path / "new"), "--compare", str(tmp_path / "ltx")]) == 0
    assert "PSNR" in capsys.readouterr().out
    run = ["--pretrained_model_name_or_path", tmp_path / "ltx", "--output_dir", tmp_path / "run"]
    reason = "rectified flow only"
    assert reason in refused(capsys, "train", *run)
    assert reason in refused(capsys, "distill", *run, "--student_model_name_or_path", tmp_path / "new")
    assert reason in refused(capsys, "plan", "--model", tmp_path / "ltx")
    assert reason in refused(capsys, "check", tmp_path / "ltx", "--output", tmp_path / "c.mp4")
