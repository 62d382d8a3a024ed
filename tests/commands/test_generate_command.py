"""`linvideo generate` on tiny pipelines: what it writes, prints and refuses."""

import json

import diffusers
import numpy as np
import pytest
import torch
from command_line import refused
from tiny import TEXT_DIM, tiny_image, tiny_image_pipeline, tiny_pipeline, tiny_tokenizer

from linvideo import load_pipeline, models
from linvideo.commands.main import main
from linvideo.commands.shared import load

RATE = ["--optimizer.learning_rate", "1e-3"]
SMALL = "--height 32 --width 32 --num-frames 5 --num-inference-steps 2".split()  # hyphens as diffusers-cli has them


def test_generate_writes_a_video_of_the_requested_length(folder, tmp_path):
    imageio = pytest.importorskip("imageio")
    output = tmp_path / "new" / "video.mp4"
    size = ["--height", "32", "--width", "32", "--num_frames", "9", "--num_inference_steps", "2"]
    assert main(["generate", str(folder), "--prompt", "a cat", "--output", str(output), *size]) == 0
    assert len(imageio.mimread(output)) == 9
    assert [file.name for file in output.parent.iterdir()] == ["video.mp4"]


def test_generate_reports_time_memory_and_linear_layers(folder, tmp_path, capfd):
    converted = tmp_path / "converted"
    models.save_pipeline(models.convert(load_pipeline(folder), layers=[1], mode="linear"), converted)
    words = ["generate", str(converted), "--prompt", "a cat", "--output", str(tmp_path / "v.mp4"), *SMALL]
    assert main(words) == 0
    out, err = capfd.readouterr()
    assert "linear  (1): 1" in out and "s per step" in out and "s in total" in out and "GB" in out
    assert "video 1 of 1" not in err  # the progress bar is for terminals


def test_generate_many_videos(folder, tmp_path, capsys):
    imageio = pytest.importorskip("imageio")
    (tmp_path / "prompts.txt").write_text("a cat\n# no prompt\na dog\n")
    output = tmp_path / "videos"
    words = ["generate", folder, "--prompts_file", tmp_path / "prompts.txt", "--output", output, *SMALL]
    words += ["--num_videos_per_prompt", "2", "--seed", "7"]
    assert main([str(word) for word in words]) == 0
    names = [f"{prompt}-{seed}.mp4" for prompt in ("0000", "0001") for seed in (7, 8)]
    assert sorted(path.name for path in output.iterdir()) == [*names, "videos.jsonl"]
    index = [json.loads(line) for line in (output / "videos.jsonl").read_text().splitlines()]
    assert [entry["video"] for entry in index] == names
    assert index[1] == {"video": "0000-8.mp4", "caption": "a cat", "seed": 8} and index[2]["caption"] == "a dog"
    single = [
        "generate",
        folder,
        "--prompt",
        "a dog",
        "--output",
        tmp_path / "dog.mp4",
        "--seed",
        "8",
        *SMALL,
    ]
    assert main([str(word) for word in single]) == 0
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
    assert main([str(word) for word in [*words, "--overwrite"]]) == 0
    assert len(imageio.mimread(output / "0000-7.mp4")) == 5
    assert [json.loads(line)["video"] for line in (output / "videos.jsonl").read_text().splitlines()] == names
    (output / "videos.jsonl").write_text("mine")
    assert "is not an index of videos" in refused(capsys, *words, "--overwrite")
    assert (output / "videos.jsonl").read_text() == "mine"


def test_compare_puts_the_teacher_on_the_left(folder, tmp_path, capsys):
    imageio = pytest.importorskip("imageio")
    converted = tmp_path / "converted"
    models.save_pipeline(models.convert(load_pipeline(folder), mode="linear", feature_map="relu"), converted)
    words = ["generate", "--prompt", "a cat", *SMALL]
    for name, more in (("alone", []), ("both", ["--compare", str(folder)])):
        output = ["--output", str(tmp_path / f"{name}.mp4")]
        assert main([*words, str(converted), *output, *more]) == 0
    assert "PSNR" in capsys.readouterr().out
    alone, both = (np.stack(imageio.mimread(tmp_path / f"{name}.mp4")).astype(int) for name in ("alone", "both"))
    assert both.shape == (5, 32, 64, 3) and abs(both[:, :, 32:] - alone).mean() < 3  # as far as the codec lets it
    itself = ["--output", str(tmp_path / "itself.mp4"), "--compare", str(folder)]
    assert main([*words, str(folder), *itself]) == 0
    assert "PSNR 100.00 dB and SSIM 1.0000" in capsys.readouterr().out


def test_a_distilled_model_and_its_teacher_keep_their_own_settings(folder, tmp_path, monkeypatch):
    few = load_pipeline(folder)
    few.scheduler = models.FewStepScheduler([1000.0, 500.0])
    models.save_pipeline(few, tmp_path / "few")
    seen = []
    monkeypatch.setattr(
        "linvideo.evaluation.sampling.make_videos", lambda *arguments: seen.append(arguments) or iter(())
    )
    words = ["generate", str(tmp_path / "few"), "--prompt", "a cat", "--output", str(tmp_path / "v.mp4")]
    assert main([*words, "--compare", str(folder), "--num_inference_steps", "30"]) == 0
    _, _, settings, teacher, teacher_settings, *_ = seen[0]
    assert (settings["num_inference_steps"], settings["guidance_scale"]) == (2, 1.0)
    assert teacher_settings == {"negative_prompt": "", "num_inference_steps": 30}
    assert type(teacher.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    words[1] = str(folder)
    assert main([*words, "--compare", str(tmp_path / "few"), "--guidance_scale", "3"]) == 0
    assert seen[1][2]["guidance_scale"] == 3.0 and seen[1][4]["guidance_scale"] == 1.0
    assert "num_inference_steps" not in seen[1][2] and seen[1][4]["num_inference_steps"] == 2


def test_a_pipeline_that_takes_an_image(folder, tmp_path, capsys):
    tiny_image_pipeline().save_pretrained(tmp_path / "image")
    tiny_image().save(tmp_path / "i.png")
    words = ["generate", tmp_path / "image", "--prompt", "a cat", "--output", tmp_path / "v.mp4", *SMALL]
    assert "takes an image" in refused(capsys, *words)
    assert "takes no image" in refused(capsys, words[0], folder, *words[2:], "--image", tmp_path / "i.png")
    (tmp_path / "no.png").write_text("no image")
    assert "cannot read" in refused(capsys, *words, "--image", tmp_path / "no.png")
    assert "WanPipeline" in refused(capsys, *words, "--image", tmp_path / "i.png", "--compare", folder)
    assert not (tmp_path / "v.mp4").exists()
    assert main([str(word) for word in [*words, "--image", tmp_path / "i.png"]]) == 0


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
    assert words in refused(capsys, "generate", folder, "--prompt", "x", "--output", tmp_path / "v.mp4", *flags)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("status", [0, 1])
def test_a_video_that_cannot_be_written_is_found_before_the_model_is_loaded(tmp_path, capsys, monkeypatch, status):
    ffmpeg, output = tmp_path / "ffmpeg", tmp_path / "v.mp4"
    ffmpeg.write_text(f"#!/bin/sh\ncat > /dev/null\necho No space left on device >&2\nexit {status}\n")
    ffmpeg.chmod(0o700)
    output.write_text("mine")
    monkeypatch.setattr(models, "load_pipeline", None)
    wrong = tmp_path / "v.mp4" / "w.mp4"
    assert "Not a directory" in refused(capsys, "evaluate", "m", "--suite", "vbench", "--output_dir", output)
    for command in (["generate", "m", "--prompt", "x"], ["check", "m"]):
        line = refused(capsys, *command, "--output", wrong)
        assert f"cannot write the video {wrong}: Not a directory" in line
        with monkeypatch.context() as patch:
            patch.setenv("IMAGEIO_FFMPEG_EXE", str(ffmpeg))
            line = refused(capsys, *command, "--output", output, "--overwrite")
        assert ("No space left" if status else "No such file") in line
    assert output.read_text() == "mine" and len(list(tmp_path.iterdir())) == 2


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
        loaded = load(str(tmp_path / name), "bfloat16")
        assert loaded.transformer.dtype == loaded.text_encoder.dtype == torch.bfloat16
        assert loaded.vae.dtype == getattr(loaded, "image_encoder", loaded.vae).dtype == expected


def test_an_image_is_required_only_if_the_pipeline_needs_one(tmp_path, capsys):
    words = ["generate", "--prompt", "a cat", "--output", tmp_path / "v.mp4", *SMALL, "--num_frames", "9"]
    for name in ("LTXConditionPipeline", "LTXImageToVideoPipeline"):
        ltx_pipeline(name).save_pretrained(tmp_path / name)
    assert "takes an image" in refused(capsys, *words, tmp_path / "LTXImageToVideoPipeline")
    assert main([str(word) for word in [*words, tmp_path / "LTXConditionPipeline"]]) == 0
    tiny_image().save(tmp_path / "i.png")
    words += [tmp_path / "LTXConditionPipeline", "--image", tmp_path / "i.png", "--overwrite"]
    assert main([str(word) for word in words]) == 0
    parts = tiny_pipeline().components
    parts = {name: parts[name] for name in ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")}
    diffusers.WanVideoToVideoPipeline(**parts).save_pretrained(tmp_path / "video")
    assert "which needs video" in refused(capsys, *words[:-4], tmp_path / "video", "--overwrite")


def test_another_family_converts_and_generates_but_does_not_train(tmp_path, capsys):
    ltx_pipeline().save_pretrained(tmp_path / "ltx")
    words = ["convert", str(tmp_path / "ltx"), "--output_dir", str(tmp_path / "new"), "--layers", "1"]
    assert main(words) == 0
    assert main(["info", str(tmp_path / "new")]) == 0
    assert "LinVideoLTXVideoTransformer3DModel: 2 layers" in capsys.readouterr().out
    words = ["generate", "--prompt", "a cat", "--output", str(tmp_path / "v.mp4"), *SMALL, "--num_frames", "9"]
    assert main([*words, str(tmp_path / "new"), "--compare", str(tmp_path / "ltx")]) == 0
    assert "PSNR" in capsys.readouterr().out
    run = ["--pretrained_model_name_or_path", tmp_path / "ltx", "--output_dir", tmp_path / "run", *RATE]
    reason = "rectified flow only"
    assert reason in refused(capsys, "train", *run)
    assert reason in refused(capsys, "distill", *run, "--student_model_name_or_path", tmp_path / "new")
    assert reason in refused(capsys, "plan", tmp_path / "ltx")
    assert reason in refused(capsys, "check", tmp_path / "ltx", "--output", tmp_path / "c.mp4")
