"""The options of `linvideo distill`: defaults, refused values, files, and the help."""

import dataclasses
import re

import pytest
import yaml

from linvideo.distillation import DistillConfig
from linvideo.run import load_config
from linvideo.run.read_config import from_dict, make_parser
from linvideo.transfer import TrainConfig

BAD = {
    "output_dir=": "output_dir must name a folder",
    "nonsense=1": "nonsense",
    "dmd.nonsense=1": "nonsense",
    "selection.num_linear_layers=1": "selection",
    "train_batch_size=0": "train_batch_size must be at least 1, got 0",
    "max_train_steps=-1": "max_train_steps must not be negative, got -1",
    "num_steps=0": "num_steps must be at least 1, got 0",
    "num_steps=two": "num_steps",
    "timesteps=[500, 900]": "timesteps must fall from at most 1000 to more than 0, got [500.0, 900.0]",
    "timesteps=[1001]": "timesteps must fall from at most 1000 to more than 0, got [1001.0]",
    "timesteps=[1000, 0]": "timesteps must fall from at most 1000 to more than 0, got [1000.0, 0.0]",
    "timesteps=[500, 500]": "timesteps must fall",
    "timesteps=[]": "timesteps must fall",
    "timesteps=fast": "timesteps",
    "critic_optimizer.learning_rate=0": "learning_rate must be positive, got 0",
    "critic_optimizer.lr_scheduler=step": "lr_scheduler must be one of",
    "optimizer.adam_beta1=1": "adam_beta1 must lie in [0, 1), got 1.0",
    "regression.max_train_steps=-1": "regression.max_train_steps must not be negative, got -1",
    "regression.learning_rate=0": "regression.learning_rate must be positive, got 0",
    "regression.learning_rate=.nan": "regression.learning_rate must be positive, got nan",
    "dmd.student_every=0": "dmd.student_every must be at least 1, got 0",
    "max_train_steps=4": "max_train_steps must be 0 or at least dmd.student_every 5, else the student never",
    "dmd.flow_shift=0": "dmd.flow_shift must be positive, got 0",
    "dmd.flow_shift=.nan": "dmd.flow_shift must be positive, got nan",
    "dmd.adversarial_weight=.nan": "dmd.adversarial_weight must not be negative, got nan",
    "dmd.t_min=0": "expected 0 < dmd.t_min < dmd.t_max < 1, got 0.0 and 0.98",
    "dmd.t_min=0.99": "expected 0 < dmd.t_min < dmd.t_max < 1, got 0.99 and 0.98",
    "dmd.t_max=1": "expected 0 < dmd.t_min < dmd.t_max < 1, got 0.02 and 1.0",
    "dmd.adversarial_weight=-1": "dmd.adversarial_weight must not be negative, got -1",
    "dmd.adversarial_layer=middle": "adversarial_layer",
    "validation.steps=-1": "validation.steps must not be negative, got -1",
}


def load(*argv: str) -> DistillConfig:
    return load_config(["--output_dir", "a", *argv], DistillConfig)


@pytest.mark.parametrize("setting", BAD)
def test_bad_values_give_one_clear_line(setting):
    with pytest.raises(ValueError) as error:
        load(f"--{setting}")
    message = str(error.value)
    assert BAD[setting] in message
    assert "\n" not in message and len(message) < 300


def test_a_run_without_a_stage_that_trains_is_refused():
    with pytest.raises(ValueError, match="^expected max_train_steps or regression.max_train_steps of at least 1"):
        load("--max_train_steps", "0", "--regression.max_train_steps", "0")
    load("--max_train_steps", "0")
    load("--regression.max_train_steps", "0")


def test_defaults():
    config = load()
    assert config == DistillConfig("a")
    assert config.scheduler().config.timesteps == [1000.0, 750.0, 500.0, 250.0]
    assert config.dmd.student_every == 5 and config.dmd.adversarial_weight == 0.0
    assert config.use_ema and config.student_model_name_or_path is None
    # no momentum where the direction of the gradient changes with the critic
    for optimizer in (config.optimizer, config.critic_optimizer):
        assert optimizer.adam_beta1 == 0.0 and optimizer.lr_scheduler == "constant_with_warmup"
    assert config.optimizer is not DistillConfig("a").optimizer
    for name in ("trajectories", "prompts"):  # so the trajectories of a default transfer fit a default distillation
        assert getattr(config, name) == getattr(TrainConfig("a"), name)


@pytest.mark.parametrize(
    "num_steps, timesteps", [(1, [1000.0]), (2, [1000.0, 500.0]), (3, [1000.0, 2000 / 3, 1000 / 3])]
)
def test_timesteps_are_evenly_spaced_from_1000_down(num_steps, timesteps):
    assert load("--num_steps", str(num_steps)).scheduler().config.timesteps == pytest.approx(timesteps)


def test_given_timesteps_replace_the_number_of_steps():
    scheduler = load("--num_steps", "2", "--timesteps", "[1000, 900, 300]").scheduler()
    assert scheduler.config.timesteps == [1000.0, 900.0, 300.0] and scheduler.num_steps == 3


@pytest.mark.parametrize(
    "regression, dmd, weight, needed",
    [(1, 5, 0, True), (1, 0, 0, True), (0, 5, 0, False), (0, 5, 0.1, True), (1, 0, 0.1, True)],
)
def test_trajectories_are_needed_by_regression_and_by_a_discriminator(regression, dmd, weight, needed):
    stages = {"regression": {"max_train_steps": regression}, "max_train_steps": dmd}
    config = from_dict({"output_dir": "a", **stages, "dmd": {"adversarial_weight": weight}}, DistillConfig)
    assert config.needs_trajectories is needed


def test_yaml_with_dotted_overrides(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"output_dir": "b", "seed": 3, "dmd": {"t_min": 0.1}, "timesteps": [900, 100]}))
    config = load("--config", str(path), "--dmd.student_every", "2", "--critic_optimizer.learning_rate", "1e-5")
    assert (config.output_dir, config.seed, config.dmd.t_min, config.dmd.student_every) == ("b", 3, 0.1, 2)
    assert config.timesteps == [900, 100] and config.critic_optimizer.learning_rate == 1e-5
    assert config.critic_optimizer.adam_beta1 == 0.0  # a section that is given in part keeps its other defaults
    assert config.optimizer == DistillConfig("a").optimizer


def test_a_saved_config_loads_as_itself(tmp_path):
    config = load("--timesteps", "[1000, 400]", "--dmd.flow_shift", "5", "--trajectories.path", "there")
    config.save(tmp_path / "config.yaml")
    loaded = load_config(["--config", str(tmp_path / "config.yaml")], DistillConfig)
    assert loaded == config == from_dict(config.to_dict(), DistillConfig)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["dmd"]["flow_shift"] == 5


def test_every_option_has_a_description(monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    text = make_parser(DistillConfig).format_help()
    entries = dict(re.findall(r"^  --([\w.]+)[^\n]*? {2,}(\S.*)$", re.sub(r"\n {6,}", "  ", text), re.MULTILINE))
    fields = {f.name: f for f in dataclasses.fields(DistillConfig)}
    names = [name for name, f in fields.items() if not dataclasses.is_dataclass(f.type)]
    for name in fields.keys() - set(names):
        names += [f"{name}.{f.name}" for f in dataclasses.fields(fields[name].type)]
    assert entries.keys() >= set(names) and "dmd.adversarial_layer" in names
    assert [name for name in names if entries[name].startswith("(")] == []
    assert "Args:" not in text and "usage: linvideo distill" in text
