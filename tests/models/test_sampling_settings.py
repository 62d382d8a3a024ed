"""Sampling settings are kept in a pipeline's folder, and commands use them as defaults."""

import json

import pytest
from diffusers import WanPipeline
from tiny import tiny_pipeline

from linvideo import convert, load_pipeline, save_pipeline
from linvideo.commands.main import main
from linvideo.models import FewStepScheduler, default_fps, sampling_settings
from linvideo.models.generate import generate_video
from linvideo.models.sampling_settings import FILE, KINDS

SETTINGS = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 3, "guidance_scale": 1.5, "fps": 7}
CALL = {name: value for name, value in SETTINGS.items() if name != "fps"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("settings")
    save_pipeline(tiny_pipeline(), path / "stock", settings=SETTINGS)
    save_pipeline(tiny_pipeline(), path / "old")
    few = tiny_pipeline()
    few.scheduler = FewStepScheduler([1000.0, 500.0])
    save_pipeline(few, path / "few", settings=SETTINGS)
    return path


def test_settings_are_copied_from_folder_to_folder(folders, tmp_path):
    for load in (load_pipeline, WanPipeline.from_pretrained):
        pipeline = load(str(folders / "stock"))
        assert sampling_settings(pipeline) == CALL and default_fps(pipeline) == 7
    save_pipeline(convert(pipeline, layers=[0]), tmp_path / "linear")
    linear = load_pipeline(tmp_path / "linear")
    assert sampling_settings(linear) == CALL and default_fps(linear) == 7
    assert linear.scheduler.config.shift == pipeline.scheduler.config.shift  # holds the flow shift
    save_pipeline(linear, tmp_path / "linear", overwrite=True)
    assert json.loads((tmp_path / "linear" / FILE).read_text()) == SETTINGS


def test_a_folder_without_settings_gets_none(folders, tmp_path):
    for pipeline in (tiny_pipeline(), load_pipeline(folders / "old")):
        assert sampling_settings(pipeline) == {} and default_fps(pipeline) == 16
    assert not (folders / "old" / FILE).exists()


def test_a_distilled_model_has_its_own_steps_and_refuses_guidance(folders):
    few = load_pipeline(folders / "few")
    own = {"num_inference_steps": 2, "guidance_scale": 1.0}
    assert json.loads((folders / "few" / FILE).read_text()) == SETTINGS | own
    assert sampling_settings(few) == CALL | own
    size = {"height": 32, "width": 32, "num_frames": 5}
    few.set_progress_bar_config(disable=True)
    for name, value in (("guidance_scale", 5.0), ("num_inference_steps", 4)):
        with pytest.raises(ValueError, match=f"^{name} of this distilled model must be {own[name]}, got {value}$"):
            generate_video(few, "a cat", **size, **{name: value})
    calls, forward = [], few.transformer.forward
    few.transformer.forward = lambda *args, **kwargs: (calls.append(0), forward(*args, **kwargs))[1]
    generate_video(few, "a cat", **size)  # the pipeline's defaults would be 50 steps with guidance
    assert len(calls) == 2


@pytest.mark.parametrize(
    "content",
    ["{", "[1]", "5", '{"height": "a"}', '{"fps": 0}', '{"width": true}', '{"guidance_scale": NaN}', "[" * 10**5],
)
def test_damaged_settings_are_refused_in_one_line(folders, tmp_path, content):
    save_pipeline(load_pipeline(folders / "stock"), tmp_path / "copy")
    (tmp_path / "copy" / FILE).write_text(content)
    with pytest.raises(ValueError, match="cannot read the sampling settings in .*sampling.json") as error:
        sampling_settings(load_pipeline(tmp_path / "copy"))
    assert "\n" not in str(error.value)


class Stop(ValueError):
    pass


@pytest.mark.parametrize("command", ["generate", "evaluate", "check", "analyze"])
def test_commands_use_the_settings_and_print_them(folders, tmp_path, capsys, monkeypatch, command):
    seen = []

    def stop(*args, **kwargs):
        seen.append((args, kwargs))
        raise Stop

    places = {"generate": "sampling.make_videos", "evaluate": "fidelity.fidelity", "check": "check.check_pipeline"}
    monkeypatch.setattr(f"linvideo.evaluation.{places.get(command, 'analyze.analyze')}", stop)
    stock, output = str(folders / "stock"), str(tmp_path / "new")
    words = {
        "generate": [stock, "--prompt", "a cat", "--output", f"{output}.mp4"],
        "evaluate": [stock, "--suite", "fidelity", "--teacher", stock, "--output_dir", output],
        "check": [stock, "--output", f"{output}.mp4"],
        "analyze": [stock, "--output_dir", output],
    }
    assert main([command, *words[command], "--height", "64"]) == 2
    out = capsys.readouterr().out
    assert f"loading {stock}" in out and "64x48, 5 frames" in out
    (args, kwargs) = seen[0]
    found = args[2] if command == "generate" else kwargs
    if command == "analyze":
        found = vars(args[3])
    expected = CALL | {"height": 64}
    names = ("height", "width", "num_frames") if command == "check" else expected
    assert {name: found[name] for name in names} == {name: expected[name] for name in names}


def test_the_command_refuses_guidance_for_a_distilled_model(folders, tmp_path, capsys):
    words = ["generate", str(folders / "few"), "--prompt", "a cat", "--output", str(tmp_path / "v.mp4")]
    assert main([*words, "--guidance_scale", "5"]) == 2
    assert "guidance_scale of this distilled model must be 1.0, got 5.0" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_embedded_teacher_has_all_settings():
    assert sampling_settings(load_pipeline("linvideo/demo/teacher")).keys() | {"fps"} == KINDS.keys()
