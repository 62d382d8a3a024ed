"""The `linvideo` command as a whole: bad input ends in one line and status 2, and changes nothing; exit statuses."""

import json
import re
import shlex
import signal
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from command_line import refused
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from linvideo.commands import distill_command
from linvideo.commands.main import COMMANDS, ONLY_CONFIG, main, make_parser, name_of
from linvideo.commands.shared import choose_dtype, read_config
from linvideo.distillation import DistillConfig
from linvideo.run import TrainingStopped
from linvideo.transfer import TrainConfig

NEVER = "f" * 300
RUN = ["MODEL", "--output_dir", "run", "--optimizer.learning_rate", "1e-3"]
BAD = [
    (["generate", "MODEL", "--prompts_file", "/dev/full", "--output", "o"], "cannot read the prompts file"),
    (["generate", NEVER, "--prompt", "x"], NEVER[:50]),
    (["generate", "MODEL", "--prompt", "x", "--output", f"{NEVER}.mp4"], "too long"),
    (["convert", "MODEL", "--output_dir", NEVER], "too long"),
    (["convert", "MODEL", "--output_dir", "LOOP"], "loop"),
    (["convert", "MODEL", "--output_dir", "o", "--fitted_maps", "/dev/null"], "/dev/null"),
    (["info", "DEEP"], "cannot load a pipeline from"),
    (["check", "MODEL", "--height", "31"], "multiple of 16"),
    (["check", "MODEL", "--output", "/dev/null"], ".mp4"),
    (["check", "MODEL", "--width", str(16 * 10**12)], "must be at most 100000"),
    (["generate", "MODEL", "--prompt", "x", "--num_inference_steps", "9" * 9], "must be at most 100000"),
    (["train", *RUN, "--trajectories.height", str(16 * 10**12)], "trajectories.height must be at most 100000"),
    (["train", *RUN, "--validation.num_inference_steps", "9" * 9], "must be at most 100000"),
    (["analyze", "MODEL", "--output_dir", "o", "--speedup", "nan"], "speedup"),
    (["analyze", "MODEL", "--output_dir", "o", "--num_trajectories", "-1"], "must be at least 1"),
    (["analyze", "MODEL", "--output_dir", "o", "--timed_size", "0", "0", "0"], "must be at least 1"),
    (["analyze", "MODEL", "--output_dir", "o", "--prompts_file", "/"], "cannot read the prompts file"),
    (["evaluate", "MODEL", "--suite", "fidelity", "--output_dir", "o"], "--teacher"),
    (["evaluate", "MODEL", "--suite", "fidelity", "--output_dir", "o", "--num_prompts", "-1"], "must be at least 1"),
    (["evaluate", "MODEL", "--suite", "vbench", "--output_dir", "o", "--full_info", "/dev/null"], "not valid JSON"),
    (["plan", "MODEL", "--gpus", str(10**9)], "gpus must be from 1 to 100000"),
    (["plan", "MODEL", "--gpus", "1e9"], "expected a whole number"),
    (["plan", "wan2.1-1.3b", "--train_batch_size", str(10**12)], "the global batch must be at most"),
    (["plan", "MODEL", "--max_train_steps", str(10**30)], "max_train_steps must lie within"),
    (["plan", "MODEL", "--gpu_memory", "1e400"], "must be finite"),
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


def test_no_command_is_one_line(capsys):
    assert "COMMAND" in refused(capsys)


def test_existing_output_is_kept_without_overwrite(folder, tmp_path, capsys):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "mine.mp4").write_text("mine")
    assert "exists" in refused(capsys, "convert", folder, "--output_dir", kept)
    assert "exists" in refused(capsys, "demo", "--output_dir", kept)
    assert "exists" in refused(capsys, "generate", folder, "--prompt", "x", "--output", kept / "mine.mp4")
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["mine.mp4"]
    assert (kept / "mine.mp4").read_text() == "mine"


def test_a_folder_that_is_not_a_pipeline_is_refused(tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "model_index.json" in refused(capsys, "info", empty)
    assert "missing" in refused(capsys, "info", tmp_path / "missing")


def test_a_pipeline_without_a_video_transformer_is_refused(tmp_path, capsys):
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
    assert "video transformer" in refused(capsys, "info", tmp_path / "ddpm")
    words = [tmp_path / "ddpm", "--prompt", "x", "--output", tmp_path / "v.mp4"]
    assert "video transformer" in refused(capsys, "generate", *words)
    train = [tmp_path / "ddpm", "--output_dir", tmp_path / "run", "--optimizer.learning_rate", "1e-3"]
    assert "Wan transformer" in refused(capsys, "train", *train)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 1)])
def test_the_exit_status_of_a_stopped_run(number, status, capsys, monkeypatch):
    def stopped(_):
        raise TrainingStopped("after step 3 of warmup, which is saved", number)

    monkeypatch.setattr("linvideo.commands.train_command.run", stopped)
    assert main(["train"]) == status
    assert "which is saved; continue with --resume_from_checkpoint latest" in capsys.readouterr().err


@pytest.mark.parametrize("call", [lambda _: torch.empty(2**60), lambda _: bytearray(2**62), lambda _: np.empty(2**59)])
def test_too_little_memory_ends_in_one_line(call, capsys, monkeypatch):
    monkeypatch.setattr("linvideo.commands.train_command.run", call)
    assert main(["train"]) == 1
    assert re.fullmatch("linvideo: error: not enough memory: .+\n", capsys.readouterr().err)


def test_model_comes_before_the_options_of_a_config_and_wins():
    words = "plan here --gpus 2 --config demo --output-dir run".split()
    args, rest = make_parser().parse_known_args(words)
    assert args.gpus == 2 and rest == ["here", "--config", "demo", "--output-dir", "run"]
    demo = ["--config", "demo", "--output_dir", "run"]
    for words, teacher in ((["here", *demo], "here"), (demo, "linvideo/demo/teacher")):
        config = read_config(Namespace(config_options=words, help_texts=()), TrainConfig, last=["--seed", "3"])
        assert (config.pretrained_model_name_or_path, config.seed) == (teacher, 3)
    words = ["run/pipeline", "--config", "distill-demo", "--output_dir", "run"]
    config = read_config(
        Namespace(config_options=words, help_texts=()), DistillConfig, model="student_model_name_or_path"
    )
    assert config.student_model_name_or_path == "run/pipeline"
    assert config.pretrained_model_name_or_path == "linvideo/demo/teacher"


@pytest.mark.parametrize("words", [["generate", "--model", "m", "--prompt", "x"], ["train", "--model=m"], ["--model"]])
def test_the_old_option_for_the_model_gets_a_hint(capsys, words):
    assert "MODEL is positional: expected linvideo" in refused(capsys, *words)


def test_the_device_decides_the_dtype():
    chosen = [choose_dtype(None, device) for device in ("cuda", "cuda:1", "cpu", "mps")]
    assert chosen == ["bfloat16", "bfloat16", "float32", "float32"] and choose_dtype("float16", "cuda") == "float16"


@pytest.mark.parametrize("module", COMMANDS, ids=name_of)
def test_examples_are_command_lines(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("seed: 1\n")
    lines = module.EXAMPLES.strip().splitlines()
    assert 1 <= len(lines) <= 2
    for line in lines:
        words = shlex.split(line.partition("linvideo ")[2])
        args, rest = make_parser().parse_known_args(words)
        assert args.command == words[0] == name_of(module)
        if rest:
            kind = DistillConfig if module is distill_command else TrainConfig
            args.config_options = rest
            read_config(args, kind, first=["--output_dir", "run"])


HELP = """
import contextlib, io, json, sys
from linvideo.commands.main import main
texts = {}
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main(words)
    texts[words[0]] = out.getvalue()
print(json.dumps([texts, sorted({"torch", "triton", "diffusers"} & set(sys.modules))]))
"""


def test_help_and_version_import_nothing_slow():
    names = [name_of(module) for module in COMMANDS if module not in ONLY_CONFIG]
    calls = json.dumps([["--version"], ["--help"], *([name, "--help"] for name in names)])
    done = subprocess.run([sys.executable, "-c", HELP, calls], capture_output=True, text=True, check=True)
    texts, imported = json.loads(done.stdout)
    assert imported == []
    assert re.match(r"linvideo \S+\ntorch \d\S+\ntriton .+\ndiffusers \d\S+\n$", texts["--version"])
    found = [re.search(rf"^    {name_of(module)} ", texts["--help"], re.MULTILINE).start() for module in COMMANDS]
    assert found == sorted(found)
    for name in names:
        plain, *groups = re.split(r"^(?:options|examples|[\w ,]+):$", texts[name], flags=re.MULTILINE)
        assert f"examples:\n  linvideo {name}" in texts[name] and len(groups) >= 3, texts[name]


@pytest.mark.parametrize("words", [["train", "--help"], ["distill", "-h"]])
def test_the_help_of_a_config(capsys, words):
    with pytest.raises(SystemExit, match="0"):
        main(words)
    out = capsys.readouterr().out
    assert (
        out.startswith(f"usage: linvideo {words[0]} [MODEL] [options]\n") and "MODEL: folder or Hub id of the " in out
    )
    assert f"examples:\n  linvideo {words[0]}" in out and "recipes for --config: demo, distill-demo, " in out
