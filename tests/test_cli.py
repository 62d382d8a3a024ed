"""The `linvideo` command on tiny pipelines: what it makes; bad input ends with one line and status 2, unchanged."""

import pytest
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from tiny import tiny_pipeline

from linvideo import cli, load_pipeline, models


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


def test_generate_writes_a_video_of_the_asked_length(folder, tmp_path):
    imageio = pytest.importorskip("imageio")
    output = tmp_path / "new" / "video.mp4"
    size = ["--height", "32", "--width", "32", "--num_frames", "9", "--num_inference_steps", "2"]
    assert cli.main(["generate", "--model", str(folder), "--prompt", "a cat", "--output", str(output), *size]) == 0
    assert len(imageio.mimread(output)) == 9
    assert [file.name for file in output.parent.iterdir()] == ["video.mp4"]


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
        (["--device", "nowhere"], "nowhere"),
        (["--output", "video.xyz"], ".mp4"),
    ],
)
def test_bad_sizes_are_refused(folder, tmp_path, capsys, flags, words):
    assert words in refused(
        capsys, "generate", "--model", folder, "--prompt", "x", "--output", tmp_path / "v.mp4", *flags
    )
    assert not list(tmp_path.iterdir())


def test_a_target_larger_than_the_model(folder, tmp_path, capsys):
    run = tmp_path / "run"
    flags = ["--pretrained_model_name_or_path", folder, "--output_dir", run, "--selection.num_linear_layers", "9"]
    assert "3 layers" in refused(capsys, "train", *flags)
    assert "nonsense" in refused(capsys, "train", "--output_dir", run, "--nonsense", "1")
    assert not run.exists()


def test_no_command_is_one_line(capsys):
    assert "COMMAND" in refused(capsys)


def test_train_from_yaml_then_generate(folder, tmp_path, capsys):
    run, config = tmp_path / "run", tmp_path / "run.yaml"
    config.write_text(
        f"pretrained_model_name_or_path: {folder}\noutput_dir: {run}\nmax_train_steps: 1\nprogress: false\n"
        "trajectories: {num_trajectories: 2, num_inference_steps: 2, height: 32, width: 32, num_frames: 9}\n"
        "warmup: {max_train_steps: 1}\nsensitivity: {num_states: 2}\nselection: {num_linear_layers: 1}\n"
    )
    assert cli.main(["train", "--config", str(config), "--selection.max_train_steps", "1"]) == 0
    assert "linear layers: [" in capsys.readouterr().out
    assert len(models.describe(load_pipeline(run / "pipeline").transformer).layers_linear) == 1
    size = ["--height", "32", "--width", "32", "--num_frames", "5", "--num_inference_steps", "1"]
    words = ["--model", str(run / "pipeline"), "--prompt", "a cat", "--output", str(tmp_path / "v.mp4")]
    assert cli.main(["generate", *words, *size]) == 0
    assert (tmp_path / "v.mp4").stat().st_size > 0


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
    assert "Wan transformer" in refused(capsys, "info", "--model", tmp_path / "ddpm")
    words = ["--model", tmp_path / "ddpm", "--prompt", "x", "--output", tmp_path / "v.mp4"]
    assert "Wan transformer" in refused(capsys, "generate", *words)
    train = ["--pretrained_model_name_or_path", tmp_path / "ddpm", "--output_dir", tmp_path / "run"]
    assert "Wan transformer" in refused(capsys, "train", *train)
