"""`linvideo convert` and `linvideo info` on tiny pipelines."""

import pytest
from command_line import refused
from tiny import tiny_pipeline, tiny_transformer

from linvideo import load_pipeline, models
from linvideo.commands.main import main, make_parser


def test_convert_then_info(folder, tmp_path, capsys):
    target = tmp_path / "converted"
    assert main(["convert", str(folder), "--output_dir", str(target), "--layers", "0", "2"]) == 0
    assert models.describe(load_pipeline(target).transformer).layers_linear == [0, 2]
    capsys.readouterr()
    assert main(["info", str(target)]) == 0
    assert "linear  (2): 0, 2" in capsys.readouterr().out


def test_window_layers(folder, tmp_path, capsys):
    target, mode = tmp_path / "converted", ["--layers", "1", "--mode", "window"]
    options = ["--window.chunk", "1", "--window.overlap", "2", "--window.anchors", "first", "--window.causal"]
    assert main(["convert", str(folder), "--output_dir", str(target), *mode, *options]) == 0
    assert "its new window layers are untrained" in capsys.readouterr().out
    assert main(["info", str(target)]) == 0
    shown = "window  (1): 1; chunks of 1 latent frame, overlap 2, anchors first, causal"
    assert shown in capsys.readouterr().out


def test_layers_are_named_as_info_names_them():
    parser = make_parser()
    for text in ("0 2 3 4", "0,2-4", "0 2-4", "0, 2-4"):
        args = parser.parse_args(["convert", "m", "--output_dir", "o", "--layers", *text.split(" ")])
        assert [layer for some in args.layers for layer in some] == [0, 2, 3, 4]


def test_two_experts_are_both_converted(tmp_path, capsys):
    tiny_pipeline(transformer_2=tiny_transformer(seed=1), boundary_ratio=0.9).save_pretrained(tmp_path / "two")
    words = ["convert", str(tmp_path / "two"), "--output_dir", str(tmp_path / "new"), "--layers", "1"]
    assert main(words) == 0
    assert "both experts were converted" in capsys.readouterr().out
    assert "**untrained**" in (tmp_path / "new" / "README.md").read_text()
    assert main(["info", str(tmp_path / "new")]) == 0
    out = capsys.readouterr().out
    assert "transformer: LinVideoWan" in out and "transformer_2: LinVideoWan" in out
    assert out.count("linear  (1): 1") == 2


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
        (["--window.chunk", "3"], 'go with mode "window" only'),
        (["--mode", "window", "--window.overlap", "-1"], "overlap must be an integer of at least 0, got -1"),
        (["--feature_map", "identity"], "identity"),
        (["--dtype", "int8"], "int8"),
    ],
)
def test_bad_conversion_changes_nothing(folder, tmp_path, capsys, flags, words):
    assert words in refused(capsys, "convert", folder, "--output_dir", tmp_path / "new", *flags)
    assert not list(tmp_path.iterdir())
