"""`linvideo train` on a tiny pipeline, from YAML to a video; defaults that do not suit a model are refused."""

import json
import os

import pytest
from command_line import refused

from linvideo import load_pipeline, models
from linvideo.commands.main import main
from linvideo.distillation import DistillConfig
from linvideo.planning.recipes import check_choice_of_defaults, fitting_recipes
from linvideo.run import load_config
from linvideo.run.read_config import given_options
from linvideo.transfer import TrainConfig

OUTPUT = ["--output_dir", "run"]


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
    assert main(["train", "--config", str(config), "--selection.max_train_steps", "1"]) == 0
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
    words = [str(run / "pipeline"), "--prompt", "a cat", "--output", str(tmp_path / "v.mp4")]
    assert main(["generate", *words, *size]) == 0
    assert (tmp_path / "v.mp4").stat().st_size > 0

    (tmp_path / "elsewhere").mkdir()  # the recorded config does the same again, in any folder
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert "is not empty" in refused(capsys, "train", "--config", run / "config.yaml", "--output_dir", run)
    for words in (["--output_dir", "again"], ["--output_dir", run, "--resume_from_checkpoint", "latest"]):
        assert main(["train", "--config", str(run / "config.yaml"), *map(str, words)]) == 0
    weights = "pipeline/transformer/diffusion_pytorch_model.safetensors"
    assert (run / weights).read_bytes() == (tmp_path / "elsewhere" / "again" / weights).read_bytes()


def test_more_linear_layers_than_the_model_has_are_refused(folder, tmp_path, capsys):
    run = tmp_path / "run"
    flags = [folder, "--output_dir", run, "--selection.num_linear_layers", "9", "--optimizer.learning_rate", "1e-3"]
    assert "3 layers" in refused(capsys, "train", *flags)
    assert "nonsense" in refused(capsys, "train", "--output_dir", run, "--nonsense", "1")
    assert not run.exists()


def test_defaults_that_do_not_suit_the_model_are_refused(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    line = refused(capsys, "train", small, *OUTPUT)
    assert f"expected --config with optimizer.learning_rate, or --optimizer.learning_rate, for {small}" in line
    assert f"recipes that fit: {', '.join(fitting_recipes(small, TrainConfig))}" in line
    line = refused(capsys, "distill", "run/pipeline", "--pretrained_model_name_or_path", small, *OUTPUT)
    assert f"recipes that fit: {', '.join(fitting_recipes(small, DistillConfig))}" in line
    line = refused(capsys, "train", "linvideo/demo/teacher", *OUTPUT)
    assert "expected --config with trajectories.height" in line and line.endswith("recipes that fit: demo")
    for command in ("train", "collect"):  # a recipe of another model, a config that says nothing of it
        assert "recipes that fit: wan2.1" in refused(capsys, command, small, "--config", "demo", *OUTPUT)
        assert "recipes that fit: wan2.1" in refused(capsys, command, small, "--config", "seed: 1", *OUTPUT)
    line = refused(capsys, "train", "--config", "demo", small, *OUTPUT)
    assert f"expected MODEL before the options, got {small}" in line
    assert "--config must name a YAML file or a recipe, got nothing" in refused(capsys, "train", small, "--config")
    line = refused(capsys, "train", folder, *OUTPUT, "--train_batch_size", "1")
    assert "no recipe is known to fit it: set --optimizer.learning_rate" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "model, words",
    [
        ("linvideo/demo/teacher", ["--trajectories.height", "16"]),
        ("linvideo/demo/teacher", ["--config=demo"]),
        ("wan2.1-14b", ["--config", "wan2.1-14b-480p-8x80gb"]),
        ("wan2.1-14b", ["--config", "optimizer: {learning_rate: 1e-5}"]),
        ("wan2.1-14b", ["--optimizer.learning_rate", "1e-5"]),
    ],
)
def test_defaults_are_accepted_with_a_config_or_an_explicit_option(model, words, tmp_path):
    words = [*words, "--output_dir", str(tmp_path), "--pretrained_model_name_or_path", model]
    check_choice_of_defaults(load_config(words, TrainConfig), given_options(words, TrainConfig))
    assert "optimizer.adam_beta1" not in given_options(words, TrainConfig)


def test_a_started_run_continues_with_its_own_options(tmp_path):
    check_choice_of_defaults(TrainConfig("run"), ())  # no model yet
    config = TrainConfig(str(tmp_path), pretrained_model_name_or_path="wan2.1-14b", resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match="no recipe|recipes that fit"):
        check_choice_of_defaults(config, ())
    (tmp_path / "config.yaml").touch()
    check_choice_of_defaults(config, ())
