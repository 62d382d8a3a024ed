import json
import shlex

import pytest
import torch

from linvideo import describe, load_pipeline
from linvideo.commands.main import main, make_parser
from linvideo.demo import demo_page, evaluate, few_steps, kernel_check, make_demo, teacher, verdict
from linvideo.demo.world import WORLDS
from linvideo.models.branches import feature_weights
from linvideo.models.generate import generate_video
from linvideo.trajectories.atomic_files import read_safetensors

METRICS = {
    "colour",
    "shape",
    "direction",
    "all_right",
    "good",
    "straightness_px",
    "flicker",
    "rerender_error",
    "coverage",
    "psnr_to_teacher",
    "own_state_error",
    "teacher_state_error",
}


@pytest.fixture(scope="module")
def short_demo(tmp_path_factory):
    """The demo with every stage, each cut to a few steps: what it writes, not how good it is."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    full = make_demo.demo_config

    def short(*arguments, **named):
        config = full(*arguments, **named)
        config.max_train_steps = config.warmup.max_train_steps = config.selection.max_train_steps = 3
        config.trajectories.num_trajectories = config.trajectories.batch_size = 8
        config.sensitivity.num_states = 8
        configs.append(config)
        return config

    def short_distillation(*arguments):
        config = full_distillation(*arguments)
        config.regression.max_train_steps, config.max_train_steps, config.dmd.student_every = 2, 2, 1
        config.trajectories.num_trajectories = config.trajectories.batch_size = 8
        return config

    configs, compared, full_distillation = [], {}, few_steps.distill_config
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_demo, "demo_config", short)
        patch.setattr(few_steps, "distill_config", short_distillation)
        patch.setattr(make_demo, "attention_latency", lambda device, lengths: [row(n) for n in (64, 128)])
        patch.setattr(make_demo, "evaluate", lambda *given: compared.update(given[1]) or evaluate.evaluate(*given))
        outcome = make_demo.run_demo(folder, device="cpu", videos=4, stages=make_demo.STAGES)
    assert [config.objective.name for config in configs] == ["hybrid"]
    return folder, outcome, compared


def row(tokens: int) -> dict:
    return {"tokens": tokens, "softmax": [1.0, 1.0, 1.0], "linear": [1.0, 1.0, 1.0]}


def test_every_converted_model_has_fitted_feature_maps(short_demo):
    """The baselines differ in the choice of layers and in fine-tuning, and in nothing else."""
    _, fitted = read_safetensors(short_demo[0] / "training" / "feature_maps.safetensors")
    for name in ("same_layers_untrained", "alternate_untrained"):
        weights = feature_weights(short_demo[2][name])
        assert len(weights) == 8 and all(torch.equal(weight, fitted[key]) for key, weight in weights.items())


def test_what_the_command_says_at_its_start(capsys, tmp_path):
    make_demo.announce(tmp_path / "demo", ["transfer"])
    make_demo.say("latency", ["transfer"])
    said = capsys.readouterr().out
    assert str(tmp_path / "demo") in said and "part 4 of 4: timing" in said and "distillation" not in said


@pytest.mark.parametrize(
    "final, expected",
    [
        (48, "48 of 48 videos are good after fine-tuning (20 before it), as many as the teacher's 48"),
        (
            46,
            "good after fine-tuning (20 before it), which 48 videos cannot tell from the teacher's 48",
        ),
        (20, "(20 before it), fewer than the teacher's 48: the conversion has cost quality here"),
    ],
)
def test_the_verdict_says_what_came_out(final, expected):
    models = {"teacher": 48, "same_layers_untrained": 20, "final": final}
    outcome = {name: {"good": count / 48, "psnr_to_teacher": 20.0} for name, count in models.items()}
    outcome |= {"videos": 48, "layers_linear": [0, 1], "sensitivity": {"0": 1.0, "1": 2.0, "2": 3.0, "3": 4.0}}
    said = verdict.verdict(outcome)
    assert said.startswith("Half of the attention layers are linear") and expected in said


def test_an_interval_is_not_empty_at_its_ends():
    assert verdict.counted(1.0, 48) == "48 of 48 (93–100%)" and verdict.counted(0.0, 48) == "0 of 48 (0–7%)"


def test_timings_of_a_busy_machine_are_not_shown_as_a_result():
    rows = [row(1024), row(4096)]

    def speed(rows: list[dict]) -> str:
        return demo_page.speed({"latency_ms": rows, "device": "cpu", "environment": {"device": "CPU"}})

    steady = speed(rows)
    assert "softmax / linear" in steady and "Do not trust" not in steady
    rows[0]["softmax"] = [0.4, 0.4, 0.8]  # wide, but which one is faster is clear
    assert "(0.4 to 0.8, unstable)" in (clear := speed(rows)) and "Do not trust" not in clear
    rows[1]["linear"] = [1.0, 0.1, 9.0]
    busy = speed(rows)
    assert "Do not trust" in busy and "softmax / linear" not in busy and "data:image/svg" not in busy


def test_the_next_commands_are_commands():
    parser = make_parser()
    for _, line in demo_page.NEXT:
        program, *words = shlex.split(line)
        args, rest = parser.parse_known_args(words)
        assert program == "linvideo" and ("config_options" in args or not rest)


def test_demo_leaves_a_complete_folder(short_demo):
    folder, outcome, _ = short_demo
    assert {file.name for file in folder.iterdir()} == {
        "distillation",
        "distilled",
        "few_steps.png",
        "frames.png",
        "metrics.json",
        "pipeline",
        "report.html",
        "side_by_side.mp4",
        "training",
    }
    assert list(folder.parent.iterdir()) == [folder]
    written = json.loads((folder / "metrics.json").read_text())
    assert written == json.loads(json.dumps(outcome))
    for name in ("teacher", "final", "same_layers_untrained", "alternate_untrained"):
        assert set(written[name]) == METRICS
    assert written["teacher"]["own_state_error"] == 0
    document = (folder / "report.html").read_text()
    assert "http" not in document
    assert document.count("data:image/webp") == 4 * 4 + 2 * 3  # prompts x models, of the transfer and of few steps
    for what in ("Next: your own model", "of 4 videos are good", *demo_page.NAMES.values()):
        assert what in document
    assert document.index("Good: colour") < document.index("<h2>")  # defined before it is used in a table
    assert not (folder / "training" / "report.html").exists()


def test_demo_converts_half_of_the_layers(short_demo):
    folder, outcome, _ = short_demo
    found = describe(load_pipeline(folder / "pipeline").transformer)
    assert found.layers_linear == outcome["layers_linear"] and len(found.layers_linear) == 4
    assert not found.layers_mixed


def test_the_distilled_model_samples_in_two_steps(short_demo):
    folder, outcome, _ = short_demo
    assert load_pipeline(folder / "distilled").scheduler.config.timesteps == outcome["few_steps"]["timesteps"]
    assert len(outcome["few_steps"]["timesteps"]) == 2
    assert set(outcome["few_steps"]["models"]) == {"teacher", "converted", "distilled"}
    assert "Few steps" in (folder / "report.html").read_text()


@pytest.mark.parametrize("stages, named", [(["transfer", "distil"], "'distil'"), (["distill"], "must have transfer")])
def test_impossible_stages_are_refused(tmp_path, stages, named):
    with pytest.raises(ValueError, match=named):
        make_demo.run_demo(tmp_path / "new", stages=stages)


def test_by_default_there_is_the_transfer_alone(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(make_demo, "run_demo", lambda *_, **named: asked.append(named["stages"]))
    main(["demo", "--output_dir", str(tmp_path / "a")])
    main(["demo", "--output_dir", str(tmp_path / "b"), "--stages", "transfer,adm,distill"])
    assert asked == [["transfer"], ["transfer", "adm", "distill"]]
    config = make_demo.demo_config(tmp_path / "c", seed=0)
    assert config.objective.name == "mse"


def test_kernel_step_agrees_with_the_reference(short_demo):
    check = short_demo[1]["kernel_check"]
    assert check["kernels"] == "interpreter"
    assert check["loss_kernels"] == pytest.approx(check["loss_reference"], rel=1e-5)
    assert 0 < check["gradient_error"] < 1e-4  # fp32 throughout; exactly 0 would mean that one path ran twice


def test_existing_folder_is_refused_and_kept(short_demo):
    folder, *_ = short_demo
    before = (folder / "metrics.json").read_bytes()
    with pytest.raises(ValueError, match="exists"):
        make_demo.run_demo(folder)
    assert (folder / "metrics.json").read_bytes() == before


def test_too_few_videos_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 4"):
        make_demo.run_demo(tmp_path / "new", videos=1)
    assert not (tmp_path / "new").exists()


def test_overwrite_spares_what_no_demo_made(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "file").write_text("mine")
    with pytest.raises(ValueError, match="no demo made it"):
        make_demo.run_demo(mine, overwrite=True)
    with pytest.raises(ValueError, match="the file"):
        make_demo.run_demo(mine / "file", overwrite=True)
    (mine / "report.html").touch()
    with pytest.raises(ValueError, match="no demo made file; move it elsewhere"):
        make_demo.run_demo(mine, overwrite=True)
    assert (mine / "file").read_text() == "mine"


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("on purpose")

    monkeypatch.setattr(make_demo, "write_demo", fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        make_demo.run_demo(tmp_path / "new", device="cpu")
    assert not list(tmp_path.iterdir())


def test_no_triton_means_no_kernel_step(monkeypatch, capsys):
    monkeypatch.setattr(kernel_check.importlib.util, "find_spec", lambda name: None)
    assert kernel_check.check_kernels("anywhere", "cpu") is None
    make_demo.print_kernel_check(None)
    assert "not installed" in capsys.readouterr().out and "not installed" in demo_page.kernels(None)


def test_evaluate_starts_every_model_from_the_same_noise():
    pipeline = load_pipeline(teacher.FOLDER)
    same = load_pipeline(teacher.FOLDER).transformer
    outcome, films = evaluate.evaluate(pipeline, {"teacher": pipeline.transformer, "copy": same}, 4)
    assert torch.equal(films["teacher"], films["copy"])
    assert outcome["copy"]["own_state_error"] == 0 and outcome["copy"]["psnr_to_teacher"] > 99


def test_evaluate_takes_other_captions_and_noise_with_another_seed():
    pipeline = load_pipeline(teacher.FOLDER)
    transformers = {"teacher": pipeline.transformer}
    films = [evaluate.evaluate(pipeline, transformers, 2, WORLDS["small"], seed)[1]["teacher"] for seed in (0, 0, 1)]
    assert torch.equal(films[0], films[1]) and not torch.equal(films[0], films[2])


def test_generate_video_gives_exactly_the_frames_asked_for():
    pipeline = load_pipeline(teacher.FOLDER)
    caption = WORLDS["small"].training_captions()[0]
    video = generate_video(pipeline, caption, height=16, width=16, num_frames=8, num_inference_steps=1)
    assert video.shape == (8, 16, 16, 3)


@pytest.mark.full
def test_conversion_keeps_the_quality(tmp_path):
    """The claim of the README, over 216 videos: fine-tuning repairs what the conversion broke."""
    outcome = make_demo.run_demo(tmp_path / "run", device="cpu", videos=216)
    final, start, best = (outcome[name] for name in ("final", "same_layers_untrained", "teacher"))
    assert len(outcome["layers_linear"]) == 4
    assert final["own_state_error"] <= 0.7 * start["own_state_error"]
    assert final["good"] >= start["good"] + 0.10 or final["good"] >= best["good"] - 0.03
    assert final["all_right"] >= best["all_right"] - 0.10
