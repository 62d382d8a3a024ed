"""Every recipe loads, and fits the GPUs that its first lines name; which recipes fit a model."""

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from linvideo.commands.main import main
from linvideo.demo.make_demo import WORLD
from linvideo.demo.teacher import SETTINGS
from linvideo.distillation import DistillConfig
from linvideo.models import load_pipeline
from linvideo.planning.known import HUB, KNOWN
from linvideo.planning.plan import make_plan
from linvideo.planning.recipes import fitting_recipes
from linvideo.planning.sizes import read_sizes
from linvideo.run import load_config
from linvideo.run.bounded_yaml import read_yaml
from linvideo.run.read_config import RECIPES
from linvideo.run.run_config import RunConfig
from linvideo.trajectories.prompts import read_prompts
from linvideo.transfer import TrainConfig

GUIDE = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
PLANS = re.findall(r"^linvideo plan --config wan.*", GUIDE, re.MULTILINE)
NAMES = sorted(path.name.removesuffix(".yaml") for path in RECIPES.iterdir())
STAND_INS = {  # published models in place of the pipelines that the other expert's run exports
    "wan2.2-a14b-480p-low-noise-8x80gb": "wan2.2-a14b",
    "wan2.2-i2v-a14b-480p-low-noise-8x80gb": "wan2.2-i2v-a14b",
}


def test_there_is_a_recipe_for_every_model_and_method():
    wanted = ("demo", "1.3b-480p", "2.1-14b-480p-8x80gb", "14b-720p-8x80gb", "lora", "i2v-14b")
    wanted += ("high-noise", "low-noise", "distill-demo", "distill-wan2.1-1.3b-480p")
    wanted += ("distill-wan2.1-14b-480p", "distill-wan2.1-14b-720p")
    assert all(any(name in recipe for recipe in NAMES) for name in wanted)


def load(name: str, output_dir: Path) -> tuple[TrainConfig, bool]:
    """Return a config that can be planned, and whether the recipe is a distillation, which has a critic."""
    words = ["--config", name, "--output_dir", str(output_dir)]
    if not name.startswith("distill"):
        return load_config(words, TrainConfig), False
    config = load_config(words, DistillConfig)
    return TrainConfig(**{field.name: getattr(config, field.name) for field in fields(RunConfig)}), True


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("demo")])
def test_a_recipe_fits_its_gpus(name, tmp_path):
    config, critic = load(name, tmp_path / "run")
    head = (RECIPES / f"{name}.yaml").read_text().splitlines()[1]
    gpus, memory = map(int, re.match(r"# (\d+) x (\d+) GB", head).groups())
    assert f"--config {name} " in head and (critic or "--output_dir run" in head)
    assert ("torchrun" in head) == (gpus > 1) and (gpus == 1 or f"--nproc_per_node={min(gpus, 8)} " in head)
    sizes = read_sizes(STAND_INS.get(name, config.pretrained_model_name_or_path), config.trajectories)
    plan = make_plan(sizes, config, gpus, memory, critic)
    column = plan["layouts"]["as configured"]
    # a distillation corresponds to fine-tuning with a critic
    assert column["totals"]["fine-tuning"] <= plan["usable_memory"] if critic else column["fits"], column["totals"]
    assert plan["global_batch"] == 16


@pytest.mark.parametrize("line", PLANS)
def test_other_gpus_take_the_options_that_plan_prints(line, capsys):
    """The guide lists plans for other GPUs than a recipe's: they differ from it in the numbers of the layout only."""

    def plan(*more: str) -> dict:
        assert main([*shlex.split(line, comments=True)[1:], *more, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    first = plan()
    printed = first["layouts"]["as configured"]["options"]
    again = plan(*shlex.split(" ".join(printed)))
    for result in (first, again):
        assert result["layouts"]["as configured"]["fits"] and result["global_batch"] == 16
    assert again["layouts"]["as configured"]["options"] == printed


def test_no_two_recipes_differ_in_the_layout_only():
    """Such a recipe would not be needed, because `linvideo plan` prints the numbers of a layout."""
    layout = ("gradient_accumulation_steps", "train_batch_size", "parallel", "warmup", "sensitivity")
    seen = {}
    for name in NAMES:
        values = read_yaml((RECIPES / f"{name}.yaml").read_text())
        rest = json.dumps({key: value for key, value in values.items() if key not in layout}, sort_keys=True)
        assert seen.setdefault(rest, name) == name


def test_the_demo_is_sampled_as_its_teacher_is_meant_to_be(tmp_path):
    config = load_config(["--config", "demo", "--output_dir", str(tmp_path)], TrainConfig)
    sampler, settings = config.trajectories, SETTINGS[WORLD.name]
    names = ("num_inference_steps", "guidance_scale")
    assert all(getattr(sampler, name) == getattr(settings, name) for name in names)
    assert (sampler.height, sampler.width, sampler.num_frames) == (WORLD.size, WORLD.size, WORLD.frames)


def test_the_demo_works_in_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "distill-demo"):
        config, _ = load(name, tmp_path)
        assert read_prompts(config.prompts.prompts_file) == WORLD.training_captions()
        assert read_sizes(config.pretrained_model_name_or_path, config.trajectories).config.num_layers == 8
        assert load_pipeline(config.pretrained_model_name_or_path).transformer.config.num_layers == 8


def test_distillations_take_the_trajectories_of_the_transfer(tmp_path):
    for name in (name for name in NAMES if name.startswith("distill")):
        config, _ = load(name, tmp_path)
        start = re.match("distill-(demo|.*-[0-9]+p)", name)[1]  # model and size, without the GPUs
        transfer, _ = load(next(other for other in NAMES if other.startswith(start)), tmp_path)
        assert (config.trajectories, config.prompts) == (transfer.trajectories, transfer.prompts)
        assert (config.seed, config.mixed_precision) == (transfer.seed, transfer.mixed_precision)


def test_the_guide_names_every_recipe():
    assert [name for name in NAMES if f"`{name}`" not in GUIDE] == []
    assert len(PLANS) >= 6


def test_an_unknown_recipe_is_named(tmp_path):
    for words in (["--config", "wan9"], ["--config=wan9"]):
        with pytest.raises(ValueError, match="or the name of a recipe, got wan9; recipes: demo, distill-demo"):
            load_config([*words, "--output_dir", str(tmp_path)], TrainConfig)


def test_only_config_takes_a_recipes_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config(["--config", "demo", "--output_dir", "demo"], TrainConfig).output_dir == "demo"


@pytest.mark.parametrize("known", KNOWN)
def test_the_recipes_that_fit_a_model(known, tmp_path):
    """A model is recognized by its known name, a Hub id, or the config of a downloaded folder."""
    ids = [place for place, name in HUB.items() if name == known]
    part, two = ["diffusers", "WanTransformer3DModel"], known.startswith("wan2.2")
    index = {"_class_name": "WanPipeline", "transformer": part, "transformer_2": part if two else [None, None]}
    (tmp_path / "transformer").mkdir()
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    config = {"in_channels": 16, "image_dim": None, "added_kv_proj_dim": None} | KNOWN[known]
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    texts = {name: (RECIPES / f"{name}.yaml").read_text() for name in NAMES}
    of_model = [name for name, text in texts.items() if any(f": {place}\n" in text for place in ids)]
    for kind in (TrainConfig, DistillConfig):
        expected = [name for name in of_model if f"linvideo {kind.command} " in texts[name]]
        for model in (known, *ids, str(tmp_path)):
            assert fitting_recipes(model, kind) == expected
    (tmp_path / "transformer" / "config.json").write_text("{")
    assert fitting_recipes(str(tmp_path), TrainConfig) == fitting_recipes("no/such", TrainConfig) == []


def test_some_recipes_fit():
    assert fitting_recipes("wan2.1-1.3b", TrainConfig) and fitting_recipes("wan2.1-14b", DistillConfig)
