"""`linvideo analyze`: its numbers equal those of a training run, and its proposal follows from them."""

import argparse
import json
import re
import shlex
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_image, tiny_image_pipeline, tiny_pipeline
from tiny_run import PROMPTS, tiny_config, tiny_experts, tiny_teacher

from linvideo import convert, load_pipeline
from linvideo.commands.main import main
from linvideo.commands.shared import read_config
from linvideo.evaluation import analyze as module
from linvideo.evaluation.analysis_report import commands, conclusion, text, write_report
from linvideo.evaluation.analyze import LayerSet, analyze, path, propose, set_sizes, smallest_number
from linvideo.evaluation.latency import Timing
from linvideo.models.describe import ranges
from linvideo.nn import Window
from linvideo.trajectories import TrajectoryStore, encode_prompts
from linvideo.trajectories.images import digest
from linvideo.trajectories.prompts import PromptConfig
from linvideo.transfer import TrainConfig, train
from linvideo.transfer.selection import SelectionConfig, lowest
from linvideo.transfer.sensitivity import velocity_error
from linvideo.transfer.warmup import attention_output_errors, load_feature_maps

CONFIG = tiny_config("unused", selection={"method": "sensitivity", "num_linear_layers": 2}, max_train_steps=0)
MEASURED = {name: getattr(CONFIG, name) for name in ("trajectories", "warmup", "sensitivity")}
IMAGES = [tiny_image(seed) for seed in range(3)]
OPTIONS = {"captions": PROMPTS, **MEASURED, "negative_prompt": "dull", "progress": False}


def synthetic_times(monkeypatch, milliseconds):
    """Replace the times of a forward by ones that depend on the number of linear layers."""
    monkeypatch.setattr(module._Measurements, "timing", lambda _, layers: Timing(*[milliseconds[len(layers)]] * 3))


WINDOW = {"chunk": 1, "overlap": 0}  # the tiny videos have two latent frames


def times_by_kind(monkeypatch, **saved):
    """Replace the times of a forward by 10 ms less what each layer of a kind saves."""
    monkeypatch.setattr(
        module._Measurements,
        "timing",
        lambda _, kinds: Timing(*[10.0 - sum(saved[kind] for kind in kinds.values())] * 3),
    )


def run(folder, teacher=None, **options):
    return analyze(teacher or tiny_teacher(), output_dir=folder, **{**OPTIONS, **options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("analyze") / "analysis"


@pytest.fixture(scope="module")
def analysis(folder):
    with pytest.MonkeyPatch.context() as patch:  # a forward takes 10 ms, each linear layer saves 2
        synthetic_times(patch, [10.0, 8.0, 6.0, 4.0])
        return run(folder, speedup=1.3)


def held_states(folder):
    """Return the states on which errors are measured, read from the disk."""
    prompts = encode_prompts(tiny_teacher(), PROMPTS, PromptConfig(negative_prompt="dull"))
    store, count = TrajectoryStore(folder / "trajectories"), CONFIG.sensitivity.num_states
    return [store.draw(range(count), CONFIG.seed, "held", prompts=prompts)]


def test_errors_and_maps_are_those_of_a_training_run(analysis, folder, tmp_path):
    config = replace(CONFIG, output_dir=str(tmp_path / "run"), prompts=PromptConfig(negative_prompt="dull"))
    result = train(config, tiny_teacher(), prompts=PROMPTS)
    assert analysis.sensitivity == result.sensitivity and analysis.floor == result.sensitivity_floor
    maps = "feature_maps.safetensors"
    assert (folder / maps).read_bytes() == (tmp_path / "run" / maps).read_bytes()
    assert result.layers_linear == analysis.proposal.layers


def test_sets_are_the_least_sensitive_layers_with_their_joint_errors(analysis, folder):
    states = held_states(folder)
    assert [len(chosen.layers) for chosen in analysis.sets] == [1, 2, 3]
    for number, chosen in enumerate(analysis.sets, 1):
        assert chosen.layers == lowest(analysis.sensitivity, number)
        model = convert(tiny_teacher().transformer, chosen.layers, mode="linear")
        load_feature_maps(model, folder / "feature_maps.safetensors")
        assert chosen.velocity_error == pytest.approx(velocity_error(model, states), rel=1e-5)
    assert analysis.sets[0].velocity_error == min(analysis.sensitivity.values())
    assert analysis.velocity_square == pytest.approx(states[0].u.square().mean().item(), rel=1e-6)


def test_attention_output_errors_are_after_the_fit(analysis, folder):
    states, model = held_states(folder), convert(tiny_teacher().transformer)
    before = attention_output_errors(model, states[0])
    load_feature_maps(model, folder / "feature_maps.safetensors")
    for layer, error in attention_output_errors(model, states[0]).items():
        # of batches of 4 and 2, whose relative errors are averaged, against one of 6
        assert analysis.attention_output_errors[layer] == pytest.approx(error.item(), rel=0.05)
        assert error < before[layer]


def test_the_proposal_by_hand(analysis):
    assert [chosen.speedup for chosen in analysis.sets] == [1.25, pytest.approx(10 / 6), 2.5]
    assert analysis.proposal == analysis.sets[1]
    assert analysis.saved("linear") == 2
    assert analysis.tokens == 2 * 2 * 2 and analysis.size == [32, 32, 5]


def test_propose_takes_the_smallest_error_that_is_fast_enough():
    def chosen(layers, error, speedup):
        return LayerSet(layers, error, Timing(1, 1, 1), speedup)

    sets = [chosen([0], 1e-4, 1.1), chosen([0, 1], 3e-3, 1.3), chosen([0, 1, 2], 2e-3, 1.5), chosen([0, 1, 2, 3], 1, 2)]
    assert propose(sets, 1.2) == sets[2]  # joint errors need not rise
    assert propose(sets, 1.05) == sets[0] and propose(sets, 2) == sets[3]
    assert propose(sets, 2.1) is None and propose(sets, None) is None


def test_the_path_of_one_kind_is_the_order_of_sensitivity():
    errors = {0: 3.0, 1: 0.5, 2: 2.0, 3: 0.5, 4: 1e-9, 5: 2e-9}
    for saved in (1e-3, 7.0, 0.0, -2.0):  # also if the kind is not faster
        sets = path({"linear": errors}, {"linear": saved}, floor=1.0)
        assert [sorted(kinds) for kinds in sets] == [lowest(errors, number) for number in range(1, 7)]
        assert set(sets[-1].values()) == {"linear"}


def test_the_path_of_two_kinds_takes_what_costs_least_per_time_saved():
    errors = {"linear": {0: 0.1, 1: 5.0, 2: 1.0}, "window": {0: 0.09, 1: 0.4, 2: 2.0}}
    sets = path(errors, {"linear": 2.0, "window": 1.0}, floor=0.0)
    # layer 0 linear costs 0.05 per ms, layer 1 window 0.4 and then linear 4.6, layer 2 linear 0.5
    linear, window = "linear", "window"
    assert sets == [
        {0: linear},
        {0: linear, 1: window},
        {0: linear, 1: window, 2: linear},
        {0: linear, 1: linear, 2: linear},
    ]
    assert path(errors, {"linear": 2.0, "window": -1.0}, 0.0)[-1] == dict.fromkeys(range(3), linear)
    assert all(window not in kinds.values() for kinds in path(errors, {"linear": 2.0, "window": -1.0}, 0.0))
    slow = path(errors, {"linear": -1.0, "window": -2.0}, 0.0)  # nothing is faster: by error alone
    assert slow == [{0: window}, {0: window, 1: window}, {0: window, 1: window, 2: linear}]


def test_which_numbers_of_layers_are_measured():
    assert set_sizes(3) == [1, 2, 3] and set_sizes(40) == [5, 10, 15, 20, 25, 30, 35, 40]
    assert set_sizes(30) == [4, 8, 11, 15, 19, 22, 26, 30]
    assert all(smallest_number(float, wanted, 30) == [wanted] for wanted in range(1, 31))
    asked = []
    assert smallest_number(lambda n: asked.append(n) or n, 14, 40) == [14] and len(asked) <= 7
    assert smallest_number(lambda n: 0.1 * n, 3.5, 30) == []


def test_a_number_between_the_measured_ones_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "set_sizes", lambda _: [3])
    synthetic_times(monkeypatch, [10.0, 8.0, 6.0, 4.0])
    analysis = run(tmp_path / "new", speedup=1.5)
    assert [len(chosen.layers) for chosen in analysis.sets] == [2, 3] and len(analysis.proposal.layers) == 2


def test_an_interrupted_run_continues_and_a_repeated_one_measures_nothing(analysis, folder, tmp_path, monkeypatch):
    calls = []
    measure = velocity_error
    monkeypatch.setattr(module, "velocity_error", lambda *a: calls.append(1) or measure(*a))
    add = module.WorkFolder.add
    monkeypatch.setattr(module.WorkFolder, "add", lambda self, row: add(self, row) or interrupt(self.rows))

    def interrupt(rows):
        if len(rows) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "new")
    assert not (tmp_path / "new" / "analysis.json").exists() and len(calls) == 2
    monkeypatch.delattr(module, "fit_feature_maps")  # neither is fitted again nor sampled
    monkeypatch.setattr(module, "collect", lambda store, *_: store.complete or pytest.fail("sampled again"))
    again = run(tmp_path / "new")
    assert again.sensitivity == analysis.sensitivity
    assert [chosen.velocity_error for chosen in again.sets] == [chosen.velocity_error for chosen in analysis.sets]
    assert len(calls) == 6  # none, three alone, two, three
    rows = (tmp_path / "new" / "rows.json").read_text()
    assert run(tmp_path / "new", speedup=None).proposal is None
    assert (tmp_path / "new" / "rows.json").read_text() == rows and len(calls) == 6


def test_a_damaged_shard_is_named(analysis, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "rows.json").unlink()
    shard = tmp_path / "copy" / "trajectories" / "shard-000001.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    with pytest.raises(ValueError, match=f"{shard.name} is damaged .*: it has a different checksum"):
        run(tmp_path / "copy", speedup=1.3)


def test_times_are_of_whole_forwards_on_this_device(tmp_path, monkeypatch):
    """Real times, for a video of another size than the sampled ones; the stock model is the pipeline's own."""
    models = []
    predict = module.predict_velocity
    monkeypatch.setattr(
        module, "predict_velocity", lambda model, *a: models.append((type(model), a)) or predict(model, *a)
    )
    monkeypatch.setattr(module, "TIMED_SECONDS", 0.0)
    teacher = tiny_teacher()
    analysis = run(tmp_path / "new", teacher, timed_size=(64, 48, 9), speedup=None)
    assert analysis.size == [64, 48, 9] and analysis.tokens == 3 * 4 * 3
    assert all(0 < chosen.milliseconds.p20 <= chosen.milliseconds.p80 for chosen in (analysis, *analysis.sets))
    kinds = {kind for kind, _ in models}
    assert len(kinds) == 2 and type(teacher.transformer) in kinds
    assert all(x.shape == (1, 16, 3, 8, 6) for _, (x, *_) in models)
    stored = json.loads((tmp_path / "new" / "analysis.json").read_text())
    assert stored["environment"]["dtype"] == "float32" and stored["environment"]["device"].startswith("CPU")
    assert stored["milliseconds_saved_per_layer"] == analysis.saved("linear")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The folder and the analysis of linear and window layers."""
    with pytest.MonkeyPatch.context() as patch:
        times_by_kind(patch, linear=2.0, window=1.5)
        folder = tmp_path_factory.mktemp("analyze") / "kinds"
        return folder, run(folder, kinds=["window", "linear"], window=WINDOW)


def mixed_set(analysis):
    return next(chosen for chosen in analysis.sets if chosen.layers and chosen.window_layers)


def test_linear_figures_do_not_depend_on_window_layers(both, analysis, folder):
    own, measured = both
    assert measured.sensitivity == analysis.sensitivity and measured.floor == analysis.floor
    assert measured.attention_output_errors == analysis.attention_output_errors
    maps = "feature_maps.safetensors"
    assert (own / maps).read_bytes() == (folder / maps).read_bytes()
    assert measured.saved("linear") == 2 and measured.saved("window") == 1.5 and measured.softmax_pairs == 0.5


def test_errors_of_window_layers_and_of_sets_of_both_kinds(both):
    folder, analysis = both
    states, base = held_states(folder), tiny_teacher().transformer
    windows = convert(base, mode="window", window=WINDOW)
    before = attention_output_errors(windows, states[0])
    load_feature_maps(windows, folder / "window_maps.safetensors")
    for layer, error in attention_output_errors(windows, states[0]).items():
        assert analysis.window_attention_output_errors[layer] == pytest.approx(error.item(), rel=0.05)
        assert error < before[layer]
    whole = [chosen.velocity_error for chosen in analysis.sets if chosen.window_layers == [0, 1, 2]]
    assert whole == [pytest.approx(velocity_error(windows, states), rel=1e-5)]

    chosen = mixed_set(analysis)
    model = convert(base, chosen.layers, mode="linear")
    load_feature_maps(model, folder / "feature_maps.safetensors")
    model = convert(model, chosen.window_layers, mode="window", window=WINDOW)
    load_feature_maps(model, folder / "window_maps.safetensors", chosen.window_layers)
    assert chosen.velocity_error == pytest.approx(velocity_error(model, states), rel=1e-5)
    assert chosen.milliseconds.median == 10 - 2 * len(chosen.layers) - 1.5 * len(chosen.window_layers)


def test_window_maps_are_those_of_a_training_run(both, tmp_path):
    selection = SelectionConfig(method="layers", window_layers=[0, 1, 2])
    options = {"selection": selection, "window": Window(**WINDOW), "max_train_steps": 0}
    config = replace(CONFIG, output_dir=str(tmp_path), prompts=PromptConfig(negative_prompt="dull"), **options)
    train(config, tiny_teacher(), prompts=PROMPTS)
    assert (both[0] / "window_maps.safetensors").read_bytes() == (tmp_path / "feature_maps.safetensors").read_bytes()


def test_an_analysis_of_window_layers_continues_with_the_same_ones_only(both, monkeypatch):
    folder, analysis = both
    times_by_kind(monkeypatch, linear=2.0, window=1.5)
    monkeypatch.setattr(module, "velocity_error", lambda *_: pytest.fail("measured again"))
    kinds = ["linear", "window"]
    assert run(folder, kinds=kinds, window=WINDOW) == analysis
    with pytest.raises(ValueError, match="another request: window"):
        run(folder, kinds=kinds, window={**WINDOW, "overlap": 1})
    with pytest.raises(ValueError, match="another request: kinds .*, window"):
        run(folder)


def test_the_report_shows_all_kinds(both, tmp_path):
    analysis = both[1]
    chosen = mixed_set(analysis)
    analysis = replace(analysis, proposal=chosen)
    shown = text(analysis, tmp_path)
    assert "each linear layer saves 2 ms and each window layer saves 1.5 ms; window layers have chunks of 1" in shown
    listed = f"{ranges(chosen.layers)} linear and {ranges(chosen.window_layers)} window"
    assert f"speedup of 1.3: layers {listed}, with a measured" in shown and f"  {listed}\n" in shown
    write_report(analysis, tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert html.count("data:image/svg") == 3 and "velocity error with this layer window" in html
    slower = [replace(one, milliseconds=Timing(11, 11, 11), speedup=0.9) for one in analysis.sets if not one.layers]
    slower = replace(analysis, sets=[*(one for one in analysis.sets if one.layers), *slower])
    assert conclusion(slower)[1:] == [
        "Window layers are slower than softmax layers at this size on this device: with all layers window, the speedup"
        " is 0.90."
    ]


def test_the_commands_of_a_proposal_with_both_kinds(both, tmp_path):
    folder, analysis = both
    stock, chosen = tmp_path / "stock model", mixed_set(analysis)
    tiny_teacher().save_pretrained(stock)
    proposed = replace(analysis, model=str(stock), proposal=chosen)
    *conversions, (_, train_line) = commands(proposed, folder)
    for _, line in conversions:
        words = [str(tmp_path / word) if word.startswith("converted") else word for word in shlex.split(line)]
        assert main(words[1:]) == 0
    made = load_pipeline(tmp_path / "converted").transformer
    for kind, layers, maps in (
        ("linear", chosen.layers, "feature_maps"),
        ("window", chosen.window_layers, "window_maps"),
    ):
        model = convert(
            tiny_teacher().transformer, layers, mode=kind, **({"window": WINDOW} if kind == "window" else {})
        )
        expected = load_feature_maps(model, folder / f"{maps}.safetensors").state_dict()
        weights = [name for name in expected if "linear_attn" in name]
        assert weights and all(torch.equal(expected[name], made.state_dict()[name]) for name in weights)

    windows = replace(chosen, layers=[])
    settings = {"chunk": 2, "overlap": 1, "anchors": ["first"], "causal": True}
    for line, layers, window in (
        (train_line, chosen.layers, WINDOW),
        (commands(replace(proposed, proposal=windows, window=settings), folder)[-1][1], [], settings),
    ):
        words = shlex.split(line.replace("RECIPE", "wan2.1-1.3b-480p-1gpu"))
        config = read_config(argparse.Namespace(config_options=words[2:], help_texts=()), TrainConfig)
        assert (config.selection.layers, config.selection.window_layers) == (layers, chosen.window_layers)
        assert config.window == Window.of(window)


@pytest.fixture(scope="module")
def of_images(tmp_path_factory):
    """The folder and the analysis of an image-to-video pipeline."""
    with pytest.MonkeyPatch.context() as patch:
        synthetic_times(patch, [10.0, 8.0, 6.0, 4.0])
        folder = tmp_path_factory.mktemp("analyze") / "images"
        return folder, run(folder, tiny_image_pipeline(), images=IMAGES)


def test_errors_of_an_image_pipeline_are_those_of_a_training_run(of_images, tmp_path):
    folder, analysis = of_images
    config = replace(CONFIG, output_dir=str(tmp_path / "run"), prompts=PromptConfig(negative_prompt="dull"))
    result = train(config, tiny_image_pipeline(), prompts=PROMPTS, images=IMAGES)
    assert analysis.sensitivity == result.sensitivity and analysis.floor == result.sensitivity_floor
    for name in ("feature_maps.safetensors", "image_conditions.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


def test_only_the_same_images_continue_an_analysis(of_images, tmp_path, monkeypatch):
    synthetic_times(monkeypatch, [10.0, 8.0, 6.0, 4.0])
    folder, analysis = of_images
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="another request: images"):
        run(folder, tiny_image_pipeline(), images=IMAGES[::-1])
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for image, file in zip(IMAGES, files, strict=True):
        image.save(file)
    monkeypatch.setattr("linvideo.trajectories.images._encode", lambda *_: pytest.fail("encoded again"))
    assert run(folder, tiny_image_pipeline(), images=files) == analysis
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_forwards_of_image_pipelines_are_timed_with_image_conditions(tmp_path, monkeypatch):
    timed = []
    monkeypatch.setattr(module, "time_call", lambda call, *_: timed.append(call()) or Timing(1.0, 1.0, 1.0))
    seen, predict = [], module.predict_velocity
    monkeypatch.setattr(module, "predict_velocity", lambda model, *a: seen.append(a) or predict(model, *a))
    run(tmp_path / "new", tiny_image_pipeline(), images=IMAGES, timed_size=(64, 48, 9), speedup=None)
    assert len(timed) == 4 and all(u.shape == (1, 16, 3, 8, 6) for u in timed)
    assert all(under.latents.shape == (1, 20, 3, 8, 6) for _, _, under in seen)
    assert all(under.image_embeds.shape == (1, 5, 20) for _, _, under in seen)


def test_the_pipeline_is_not_changed(tmp_path, monkeypatch):
    synthetic_times(monkeypatch, [10.0, 8.0, 6.0, 4.0])
    teacher = tiny_teacher()
    transformer, before = teacher.transformer, {n: x.clone() for n, x in teacher.transformer.state_dict().items()}
    run(tmp_path / "new", teacher)
    assert teacher.transformer is transformer and transformer.state_dict().keys() == before.keys()
    assert all(torch.equal(x, before[name]) for name, x in transformer.state_dict().items())


@pytest.mark.parametrize(
    "pipeline, options, words",
    [
        (lambda: convert(tiny_pipeline(), [0]), {}, "expected a stock Wan pipeline with softmax layers"),
        (lambda: SimpleNamespace(transformer=torch.nn.Linear(1, 1)), {}, "a pipeline with a Wan transformer, got"),
        (tiny_experts, {}, "got one with two experts"),
        (tiny_image_pipeline, {}, "every prompt of an image-to-video model needs an image, but 3 of 3 have none"),
        (tiny_image_pipeline, {"images": [*IMAGES[:2], None]}, "needs an image, but 1 of 3 have none"),
        (tiny_image_pipeline, {"images": IMAGES[:1]}, "expected an image for each of 3 prompts, got 1"),
        (tiny_image_pipeline, {"images": [*IMAGES[:2], "no.png"]}, "cannot read the image no.png"),
        (
            tiny_teacher,
            {"images": IMAGES},
            "prompts of a text-to-video model must not have images, but 3 of 3 have one",
        ),
        (
            lambda: tiny_image_pipeline(transformer_2=tiny_image_pipeline().transformer),
            {"images": IMAGES},
            "two experts",
        ),
        (tiny_teacher, {"speedup": 1.0}, "speedup must be more than 1, or None for no proposal, got 1.0"),
        (tiny_teacher, {"speedup": float("nan")}, "speedup must be more than 1"),
        (tiny_teacher, {"timed_size": (32, 32, 6)}, "num_frames must be 1 more than a multiple of 4, got 6"),
        (tiny_teacher, {"captions": []}, "at least one prompt"),
        (tiny_teacher, {"kinds": ["linear", "sparse"]}, "kinds must be a list of linear and window, got"),
        (tiny_teacher, {"window": WINDOW}, 'go with the kind "window" only, got kinds linear'),
        (tiny_teacher, {"kinds": ["window"], "window": {"chunk": 0}}, "chunk must be an integer of at least 1, got 0"),
        (tiny_teacher, {"sensitivity": replace(CONFIG.sensitivity, num_states=0)}, "num_states must be at least 1"),
    ],
)
def test_bad_input_is_refused_and_nothing_written(tmp_path, pipeline, options, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        run(tmp_path / "new", pipeline(), **options)
    assert not list(tmp_path.iterdir())


def test_existing_files_stay_unless_they_are_an_analysis_to_overwrite(analysis, folder, tmp_path, monkeypatch):
    other = tmp_path / "training"
    (other / "trajectories").mkdir(parents=True)
    (other / "request.json").write_text('{"suite": "fidelity"}')
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="another request"):
            run(other, overwrite=overwrite)
        (other / "request.json").write_text("[1]")
        with pytest.raises(ValueError, match="expected an object in"):
            run(other, overwrite=overwrite)
        (other / "request.json").write_text('{"suite": "fidelity"}')
    assert (other / "trajectories").exists()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"seed 0 \(now 1\)"):
        run(folder, seed=1)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    synthetic_times(monkeypatch, [10.0, 8.0, 6.0, 4.0])
    run(tmp_path / "mine", seed=1)
    (tmp_path / "mine" / "notes.txt").write_text("kept")
    assert run(tmp_path / "mine", overwrite=True).sensitivity == analysis.sensitivity
    assert (tmp_path / "mine" / "notes.txt").read_text() == "kept"


def test_an_error_that_is_not_finite_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "velocity_error", lambda *_: float("nan"))
    with pytest.raises(ValueError, match="velocity error of layers .* is not finite in torch.float32"):
        run(tmp_path / "new")


def test_the_text_states_the_conclusion(analysis):
    listed = ranges(analysis.proposal.layers)
    assert f"speedup of 1.3: layers {listed} linear, with a measured speedup of 1.67" in conclusion(analysis)[0]
    slow = [replace(chosen, speedup=0.5) for chosen in analysis.sets]
    assert (
        "No set of layers is faster at this size on this device"
        in conclusion(replace(analysis, sets=slow, proposal=None))[0]
    )
    unreached = replace(analysis, wanted_speedup=3.0, proposal=None)
    assert "No set of layers reaches a speedup of 3" in conclusion(unreached)[0]
    assert "3 linear layers, has 2.50" in conclusion(unreached)[0] and commands(unreached, "x") == []
    lines = text(analysis, "x").splitlines()
    assert sum(line.endswith("  0-2") for line in lines) == 1


def test_the_report_is_one_file(analysis, tmp_path):
    write_report(analysis, tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert html.count("data:image/svg") == 2
    assert "http" not in html and [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_the_command_and_what_it_proposes(tmp_path, capsys, monkeypatch):
    synthetic_times(monkeypatch, [10.0, 8.0, 6.0, 4.0])
    stock, output = tmp_path / "stock model", tmp_path / "analysis"
    tiny_teacher().save_pretrained(stock)
    flags = "--height 32 --width 32 --num_frames 5 --num_inference_steps 2 --num_trajectories 2 --num_states 4"
    command = ["analyze", str(stock), "--output_dir", str(output), *flags.split(), "--warmup_steps", "2"]
    assert main([*command, "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "Proposed for a speedup of 1.3" in out and (output / "report.html").exists()
    convert_line, train_line = (line for line in out.splitlines() if line.startswith("linvideo "))

    words = shlex.split(convert_line.replace("converted", shlex.quote(str(tmp_path / "converted"))))
    assert main(words[1:]) == 0
    layers = json.loads((output / "analysis.json").read_text())["proposal"]["layers"]
    expected = load_feature_maps(
        convert(tiny_teacher().transformer, layers, mode="linear"), output / module.FEATURE_MAPS
    )
    made = load_pipeline(tmp_path / "converted").transformer.state_dict()
    assert all(torch.equal(x, made[name]) for name, x in expected.state_dict().items())

    tiny_experts().save_pretrained(tmp_path / "experts")
    words = ["convert", str(tmp_path / "experts"), "--output_dir", str(tmp_path / "no"), *words[-4:-2]]
    assert words[-2] == "--fitted_maps" and main(words) == 2
    assert "but this pipeline has two" in capsys.readouterr().err and not (tmp_path / "no").exists()

    words = shlex.split(train_line.replace("RECIPE", "wan2.1-1.3b-480p-1gpu"))
    config = read_config(argparse.Namespace(config_options=words[2:], help_texts=()), TrainConfig)
    assert config.selection.layers == layers and config.pretrained_model_name_or_path == str(stock)

    capsys.readouterr()
    assert main([*command, "--seed", "1"]) == 2 and "another request" in capsys.readouterr().err
    assert main([*command, "--speedup", "none"]) == 0
    assert "No speedup was requested" in capsys.readouterr().out


def test_the_command_with_images(tmp_path, capsys, monkeypatch):
    synthetic_times(monkeypatch, [10.0, 8.0, 6.0, 4.0])
    tiny_image_pipeline().save_pretrained(tmp_path / "image")
    tiny_teacher().save_pretrained(tmp_path / "text")
    lines = []
    for i, (caption, image) in enumerate(zip(PROMPTS, IMAGES, strict=True)):
        image.save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"caption": caption, "image": f"{i}.png"}))
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    flags = "--height 32 --width 32 --num_frames 5 --num_inference_steps 2 --num_trajectories 2 --num_states 4"
    flags = [*flags.split(), "--warmup_steps", "2", "--device", "cpu", "--output_dir", str(tmp_path / "analysis")]
    prompts = ["--prompts_file", str(tmp_path / "prompts.jsonl")]
    assert main(["analyze", str(tmp_path / "text"), *prompts, *flags]) == 2
    assert "must not have images, but 2 of 2 have one" in capsys.readouterr().err
    assert main(["analyze", str(tmp_path / "image"), *flags]) == 2
    assert "needs an image, but 2 of 2 have none" in capsys.readouterr().err
    assert not (tmp_path / "analysis").exists()
    assert main(["analyze", str(tmp_path / "image"), *prompts, *flags]) == 0
    assert "Proposed for a speedup of 1.3" in capsys.readouterr().out
    request = json.loads((tmp_path / "analysis" / "request.json").read_text())
    assert request["captions"] == PROMPTS[::2]  # two of three, from all over the list
    assert request["images"] == [digest(image) for image in IMAGES[::2]]
    IMAGES[1].save(tmp_path / "2.png")
    assert main(["analyze", str(tmp_path / "image"), *prompts, *flags]) == 2
    assert "another request: images" in capsys.readouterr().err
    assert main(["analyze", str(tmp_path / "image"), *prompts, *flags, "--overwrite"]) == 0
