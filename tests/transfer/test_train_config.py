import dataclasses
import re
import sys

import pytest
import torch
import yaml

from linvideo.distillation import DistillConfig
from linvideo.run import load_config
from linvideo.run.read_config import from_dict, make_parser
from linvideo.trajectories.collect import TrajectoryConfig
from linvideo.trajectories.devices import check_device
from linvideo.transfer import TrainConfig


def test_yaml_with_dotted_overrides(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"output_dir": "a", "seed": 3, "selection": {"num_linear_layers": 4}}))
    config = load_config(
        ["--config", str(path), "--output_dir", "b", "--optimizer.learning_rate", "1e-5", "--objective.name", "adm"],
        TrainConfig,
    )
    assert (config.output_dir, config.seed, config.selection.num_linear_layers) == ("b", 3, 4)
    assert (config.optimizer.learning_rate, config.objective.name) == (1e-5, "adm")
    assert config.selection.method == TrainConfig("x").selection.method


def test_a_saved_config_loads_as_itself(tmp_path):
    config = load_config(
        ["--output_dir", "a", "--selection.method", "layers", "--selection.layers", "[1, 3]"], TrainConfig
    )
    config.save(tmp_path / "config.yaml")
    assert (
        load_config(["--config", str(tmp_path / "config.yaml")], TrainConfig)
        == config
        == from_dict(config.to_dict(), TrainConfig)
    )


def test_paths_may_be_path_objects(tmp_path):
    """As a script has them: a run's output_dir, and result.pipeline_path for the next run."""
    config = DistillConfig(
        output_dir=tmp_path / "run",
        student_model_name_or_path=tmp_path / "pipeline",
        trajectories=TrajectoryConfig(path=tmp_path / "trajectories"),
    )
    config.save(tmp_path / "config.yaml")
    assert load_config(["--config", str(tmp_path / "config.yaml")], DistillConfig) == config


def test_the_papers_form_is_selectable():
    config = load_config(
        "--output_dir a --selection.count rounded --selection.rounding threshold --selection.lambda_con 0.01"
        " --selection.lambda_reg 0.01 --selection.objective adm_step --selection.r_learning_rate 1e-3"
        " --objective.name adm_step".split(),
        TrainConfig,
    )
    assert (config.selection.count, config.selection.rounding) == ("rounded", "threshold")
    assert config.objective.name == "adm_step"


BAD = {
    "output_dir=": "output_dir must name a folder",
    "nonsense=1": "nonsense",
    "selection.nonsense=1": "nonsense",
    "seed=one": "seed",
    "mixed_precision=fp16": "mixed_precision must be one of no, bf16, got 'fp16'",
    "report_to=comet": "report_to must be none, tensorboard or wandb, or several separated by commas, got 'comet'",
    "report_to=tensorboard,none": "must be none, tensorboard or wandb, or several separated by commas, got 'none'",
    "feature_map=exp": "feature_map must be one of hedgehog, hedgehog_joint, elu, relu, softmax, got 'exp'",
    "device=foo": "device must be a torch device such as cpu or cuda, got 'foo'",
    "train_batch_size=0": "train_batch_size must be at least 1, got 0",
    "gradient_accumulation_steps=0": "gradient_accumulation_steps must be at least 1, got 0",
    "checkpointing_steps=0": "checkpointing_steps must be at least 1, got 0",
    "checkpoints_total_limit=0": "checkpoints_total_limit must be at least 1, got 0",
    "max_train_steps=-1": "max_train_steps must not be negative, got -1",
    "ema_decay=2": "ema_decay must lie in",
    "prompts.max_sequence_length=0": "prompts.max_sequence_length must be at least 1, got 0",
    "trajectories.num_trajectories=0": "trajectories.num_trajectories must be at least 1, got 0",
    "trajectories.stride=99": "trajectories.stride must be at most num_inference_steps 50, got 99",
    "trajectories.negative_probability=1.5": "trajectories.negative_probability must lie in",
    "trajectories.guidance_scale=-1": "trajectories.guidance_scale must be finite and not negative",
    "trajectories.dtype=int8": "trajectories.dtype must be one of",
    "warmup.learning_rate=0": "warmup.learning_rate must be positive",
    "sensitivity.num_states=-1": "sensitivity.num_states must not be negative",
    "selection.method=random": "selection.method must be one of learned, sensitivity, layers, got 'random'",
    "selection.method=layers": "selection.method layers needs selection.layers or selection.window_layers",
    "selection.count=soft": "selection.count must be one of",
    "selection.rounding=floor": "selection.rounding must be one of top_k, threshold, got 'floor'",
    "selection.r_init=1.0": "selection.r_init must lie inside",
    "selection.r_learning_rate=0": "selection.r_learning_rate must be positive",
    "selection.lambda_con=-1": "lambda_con and lambda_reg must not be negative",
    "selection.alpha_end=0.5": "alpha_start and alpha_end must be at least 1",
    "selection.num_linear_layers=0": "selection.num_linear_layers must be at least 1, got 0",
    "selection.max_train_steps=0": "selection.method learned needs selection.max_train_steps",
    "selection.objective=dmd": "selection.objective must be one of",
    "objective.name=adm_x0": "objective.name must be one of",
    "objective.weight=raw": "objective.weight must be one of",
    "objective.max_dt=0": "objective.max_dt must lie in",
    "validation.steps=-1": "validation.steps must not be negative, got -1",
    "validation.num_videos=0": "validation.num_videos must be at least 1, got 0",
    "validation.num_inference_steps=0": "validation.num_inference_steps must be at least 1, got 0",
    "trajectories.guidance_scale=.nan": "trajectories.guidance_scale must be finite and not negative, got nan",
    "trajectories.flow_shift=.inf": "trajectories.flow_shift must be positive and finite, got inf",
    "selection.r_learning_rate=.nan": "selection.r_learning_rate must be a number, got nan",
    "validation.fps=0": "validation.fps must be at least 1, got 0",
    "validation.prompts=[]": "validation.prompts must hold at least one prompt, got none",
    "optimizer.learning_rate=0": "optimizer.learning_rate must be positive",
    "optimizer.lr_scheduler=step": "optimizer.lr_scheduler must be one of",
    "optimizer.adam_beta1=1": "optimizer.adam_beta1 must lie in",
    "optimizer.max_grad_norm=0": "optimizer.max_grad_norm must be positive",
}


@pytest.mark.parametrize("setting", BAD)
def test_bad_values_give_one_clear_line(setting):
    with pytest.raises(ValueError) as error:
        load_config(["--output_dir", "a", f"--{setting}"], TrainConfig)
    message = str(error.value)
    assert BAD[setting] in message
    assert "\n" not in message and len(message) < 300


@pytest.mark.parametrize(
    "content, expected",
    [
        ("- a\n- b\n", "config"),
        ("output_dir: [a\nseed", "config"),
        ("selection: {foo: 1}", "foo"),
        ("{}", "output_dir"),
    ],
)
def test_bad_files_give_one_clear_line(tmp_path, content, expected):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=expected) as error:
        load_config(["--config", str(path)], TrainConfig)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="missing.yaml"):
        load_config(["--config", str(tmp_path / "missing.yaml")], TrainConfig)


HOSTILE = [
    ("selection: {class_path: foreign.Thing}", "selection.class_path"),
    ("selection: {class_path: foreign.Thing, init_args: {method: layers}}", "selection."),
    ("selection: foreign.Thing", "must be a section of options, got 'foreign.Thing'"),
    ("selection: other.yaml", "must be a section of options, got 'other.yaml'"),
    ("config: other.yaml", "selection.class_path"),
    ("x: &x {class_path: foreign.Thing}\nselection: {<<: *x}", "selection.class_path"),
    ("seed: {class_path: foreign.Thing}", "seed"),
    ("expert: {class_path: foreign.Thing}", "expert"),
    ("validation: {prompts: [{class_path: foreign.Thing}]}", "validation.prompts"),
    ("class_path: foreign.Thing", "class_path"),
    ("seed: !!python/object/apply:foreign.Thing []", "could not determine a constructor"),
]


def test_a_folder_does_not_hide_a_recipe(tmp_path, monkeypatch):
    """`linvideo demo --output_dir demo` leaves one of that name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert load_config(["--config", "demo", "--output_dir", "run"], TrainConfig).max_train_steps == 300
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="must be a YAML file or the name of a recipe, got run"):
        load_config(["--config", "run", "--output_dir", "run"], TrainConfig)


@pytest.mark.parametrize("line, expected", HOSTILE)
@pytest.mark.parametrize("place", ["file", "command line"])
def test_a_config_imports_no_module(tmp_path, monkeypatch, line, expected, place):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "foreign.py").write_text("open('ran', 'w').close()\nclass Thing: pass\n")
    (tmp_path / "other.yaml").write_text("selection: {class_path: foreign.Thing}\n")
    (tmp_path / "run.yaml").write_text(f"output_dir: a\n{line}\n")
    config = "run.yaml" if place == "file" else (tmp_path / "run.yaml").read_text()
    with pytest.raises(ValueError, match=re.escape(expected)):
        load_config(["--config", config], TrainConfig)
    assert not (tmp_path / "ran").exists() and "foreign" not in sys.modules


@pytest.mark.parametrize("value", ["foreign.Thing", '{"class_path": "foreign.Thing"}'])
def test_a_section_is_given_by_its_options_alone(tmp_path, monkeypatch, value):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "foreign.py").write_text("class Thing: pass\n")
    for name in ("selection", "selection.class_path"):
        with pytest.raises(ValueError, match=f"--{name}"):
            load_config(["--output_dir", "a", f"--{name}", value], TrainConfig)
    assert "foreign" not in sys.modules


def aliases(levels: int) -> str:
    """Return YAML whose last line expands to 9 ** levels values."""
    lines = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}' if n else 'x'] * 9)}]" for n in range(levels)]
    return "\n".join([*lines, f"output_dir: *a{levels - 1}"])


MERGES = "m0: &m0 {x: 1}\n" + "\n".join(f"m{n}: &m{n} {{<<: [*m{n - 1}, *m{n - 1}]}}" for n in range(1, 40))


@pytest.mark.parametrize(
    "content",
    [
        aliases(9),
        MERGES,
        "output_dir: " + "[" * 5000 + "]" * 5000,
        "output_dir: " + "{[" * 50_000,
        "output_dir: &x [*x]",
        "output_dir: " + "x" * 300_000,
    ],
    ids=["aliases", "merges", "deep", "deeper", "itself", "long"],
)
def test_a_config_that_would_take_all_memory_is_refused(tmp_path, content):
    (tmp_path / "run.yaml").write_text(content)
    refused = "expected .*at most .*, got|exceeded maximum nesting depth"  # the latter is PyYAML's own, from 6.0.4 on
    with pytest.raises(ValueError, match=refused) as error:
        load_config([f"--config={tmp_path / 'run.yaml'}"], TrainConfig)
    assert len(str(error.value)) < 500
    with pytest.raises(ValueError, match="a is not accepted|must be|at most"):
        load_config(["--config", "a: &x 1\noutput_dir: [*x, " + "[" * 100 + "]" * 100 + "]"], TrainConfig)


def test_a_reasonable_number_of_aliases_is_read():
    config = load_config(
        ["--config", "output_dir: &name a\ntracker_project_name: *name\noptimizer: {adam_beta1: 0.5}"], TrainConfig
    )
    assert (config.output_dir, config.tracker_project_name, config.optimizer.adam_beta1) == ("a", "a", 0.5)


def test_every_option_has_a_description(monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    text = make_parser(TrainConfig).format_help()
    entries = dict(re.findall(r"^  --([\w.]+)[^\n]*? {2,}(\S.*)$", re.sub(r"\n {6,}", "  ", text), re.MULTILINE))
    fields = {f.name: f for f in dataclasses.fields(TrainConfig)}
    names = [name for name, f in fields.items() if not dataclasses.is_dataclass(f.type)]
    for name in fields.keys() - set(names):
        names += [f"{name}.{f.name}" for f in dataclasses.fields(fields[name].type)]
    assert entries.keys() >= set(names)
    assert [name for name in names if entries[name].startswith("(")] == []
    assert "Args:" not in text


def test_the_device_must_exist(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="^device 'cuda' was requested, but PyTorch sees no GPU here$"):
        TrainConfig("a", device="cuda")
    for name in ("", "meta", "cuda:x"):
        with pytest.raises(ValueError, match=f"^device must be a torch device such as cpu or cuda, got '{name}'$"):
            check_device(name)
    check_device(None)
    check_device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    check_device("cuda:0")
    with pytest.raises(ValueError, match="'cuda:1' was requested, but PyTorch sees only 1 GPU"):
        check_device("cuda:1")


def test_the_default_store_is_as_large_as_documented():
    config = TrajectoryConfig()
    values = 16 * ((config.num_frames - 1) // 4 + 1) * (config.height // 8) * (config.width // 8)  # latents of Wan 1.3B
    size = config.num_trajectories * config.states_per_trajectory * 2 * values * 2
    assert f"about {size / 1e9:.0f} GB" in TrajectoryConfig.__doc__
    assert f"{values / 1e6:.1f} M values" in TrajectoryConfig.__doc__


def test_settings_that_contradict_each_other():
    with pytest.raises(ValueError, match="rounding threshold needs selection.method learned, got sensitivity"):
        from_dict({"output_dir": "a", "selection": {"method": "sensitivity", "rounding": "threshold"}}, TrainConfig)
    with pytest.raises(ValueError, match="validation needs .* multiples of 16, got {'height': 24, 'width': 832}"):
        from_dict({"output_dir": "a", "validation": {"steps": 1}, "trajectories": {"height": 24}}, TrainConfig)
    with pytest.raises(ValueError, match="exclude each other"):
        TrainConfig("a", overwrite_output_dir=True, resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match="needs sensitivity.num_states"):
        from_dict(
            {"output_dir": "a", "selection": {"method": "sensitivity"}, "sensitivity": {"num_states": 0}}, TrainConfig
        )
    with pytest.raises(ValueError, match="num_linear_layers must be null or the number of selection.layers, 2, got 3"):
        from_dict(
            {"output_dir": "a", "selection": {"method": "layers", "layers": [0, 1], "num_linear_layers": 3}},
            TrainConfig,
        )
    windows = {"method": "layers", "window_layers": [1], "num_linear_layers": 0}
    assert from_dict({"output_dir": "a", "selection": windows}, TrainConfig).selection.layers == []
    with pytest.raises(ValueError, match="need selection.window_layers, got none, and chunks of 5 latent frames"):
        from_dict({"output_dir": "a", "window": {"chunk": 5}}, TrainConfig)
    with pytest.raises(ValueError, match="distinct"):
        from_dict({"output_dir": "a", "selection": {"method": "layers", "layers": [1, 1]}}, TrainConfig)
