"""Each script of examples/ runs, as short as it is, and writes to its output folder only."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

from linvideo import convert, describe, load_pipeline
from linvideo.models.attention import FAMILIES

SCRIPTS = {path.stem: path for path in sorted((Path(__file__).parents[1] / "examples").glob("*.py"))}


def run(name: str, *arguments: object) -> dict:
    """The script's namespace, after it has run as a program."""
    sys.argv = [str(SCRIPTS[name]), *map(str, arguments)]
    return runpy.run_path(sys.argv[0], run_name="__main__")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """An empty working directory that stays empty, and no trace of the script in this process."""
    families = dict(FAMILIES)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "argv", sys.argv)
    yield
    FAMILIES.clear()
    FAMILIES.update(families)
    assert not list((tmp_path / "here").iterdir())


def test_every_script_is_short_and_says_how_to_run_it():
    assert {"op", "convert_and_generate", "train_in_your_own_loop", "distil", "add_a_family"} == set(SCRIPTS)
    for name, path in SCRIPTS.items():
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 40 and f"python examples/{name}.py" in lines[0], name


def test_op(capsys):
    run("op")
    assert capsys.readouterr().out.count("relative error") == 7


def test_convert_and_generate(tmp_path, capsys):
    run("convert_and_generate", tmp_path)
    assert "linear  (4): 0-3" in capsys.readouterr().out
    assert (tmp_path / "disc.mp4").stat().st_size and describe(
        load_pipeline(tmp_path / "converted").transformer
    ).r == {}


def test_train_in_your_own_loop(tmp_path):
    student = run("train_in_your_own_loop", tmp_path / "trained")["student"]
    found = describe(load_pipeline(tmp_path / "trained").transformer)
    assert found == describe(student) and len(found.layers_linear) == 4 and not found.layers_mixed
    assert {0, 1} <= set(found.layers_linear) and 7 not in found.layers_linear  # the least sensitive, a sensitive one


def test_distil(tmp_path):
    run("distil", tmp_path)
    assert load_pipeline(tmp_path / "run" / "pipeline").scheduler.config.timesteps == [1000.0, 500.0]
    assert (tmp_path / "disc.mp4").stat().st_size


def test_add_a_family(capsys):
    """Also with rotary embeddings, which the script's own inputs leave out."""
    script = run("add_a_family")
    assert "LinearAllegro: 4 layers" in capsys.readouterr().out
    scale, cropped = (2.0, 2.0, 2.2), ((0, 0), (4, 4))
    *angles, t, h, w = get_3d_rotary_pos_embed_allegro(96, cropped, (4, 4), 2, scale)
    places = torch.cartesian_prod(*(grid.long() for grid in (t, h, w))).T.unsqueeze(1)
    inputs = script["inputs"] | {"timestep": torch.tensor([500]), "image_rotary_emb": (tuple(angles), tuple(places))}
    with torch.no_grad():
        stock, mixed, linear = (
            model(**inputs).sample for model in (*script["models"], convert(script["stock"], mode="linear"))
        )
        assert not torch.equal(stock, script["outputs"][0])
    assert torch.equal(stock, mixed) and not torch.equal(stock, linear) and linear.isfinite().all()
