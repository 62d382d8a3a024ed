import json

import pytest
import torch
from tiny import tiny_inputs, tiny_pipeline, tiny_transformer
from tiny_run import PROMPTS, run, tiny_config, tiny_teacher, watched

from linvideo.commands.main import main
from linvideo.models import convert, describe, load_pipeline
from linvideo.run import TrainingDiverged, read_metrics
from linvideo.trajectories import TrajectoryStore
from linvideo.trajectories.flow import predict_velocity
from linvideo.transfer import objectives, train
from linvideo.transfer.trainer import warmed_up


def test_the_exported_pipeline_is_the_students(tmp_path):
    teacher = tiny_teacher()
    before = {name: value.clone() for name, value in teacher.transformer.state_dict().items()}
    result = train(tiny_config(tmp_path / "run"), teacher, PROMPTS)
    assert all(torch.equal(before[name], value) for name, value in teacher.transformer.state_dict().items())

    loaded = load_pipeline(result.pipeline_path)
    description = describe(loaded.transformer)
    assert description.layers_linear == result.layers_linear and len(result.layers_linear) == 2
    assert description.layers_mixed == []
    with torch.no_grad():
        ours, theirs = (pipe.transformer(**tiny_inputs())[0] for pipe in (result.pipeline, loaded))
    assert torch.equal(ours, theirs)

    assert set(result.r) == set(result.sensitivity) == {0, 1, 2}
    stages = {"trajectories", "warmup", "sensitivity", "selection", "finetune", "export"}
    assert set(result.seconds) == stages
    selection = json.loads((tmp_path / "run" / "selection.json").read_text())
    assert selection["linear_layers"] == result.layers_linear and selection["error_rounded"] > 0

    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 16))
    assert [row["stage"] for row in rows] == ["warmup"] * 4 + ["selection"] * 5 + ["finetune"] * 6
    assert set(rows[5]["r"]) == {"0", "1", "2"} and "grad_r_task" in rows[5]
    assert {"loss_mse", "loss_adm"} <= {key for row in rows[9:] for key in row}


def test_training_lowers_the_error_of_linear_and_window_layers(tmp_path):
    settings = {
        "use_ema": False,
        "max_train_steps": 60,
        "gradient_accumulation_steps": 1,
        "train_batch_size": 8,
        "selection": {"method": "layers", "layers": [0], "window_layers": [2]},
        "window": {"chunk": 1, "overlap": 0},
        "warmup": {"max_train_steps": 20},
        "objective": {"name": "mse"},
        "optimizer": {"learning_rate": 2e-4},
    }
    config = tiny_config(tmp_path / "run", **settings)
    with watched() as seen:
        result = train(config, tiny_teacher(), PROMPTS)
    batch = seen.data.store.draw(range(24), "test", prompts=seen.data.prompts)

    def error(model):
        with torch.no_grad():
            u = predict_velocity(model, batch.x, batch.timestep, batch.conditions)
        return float((u - batch.u).square().mean())

    assert (result.layers_linear, result.layers_window) == ([0], [2]) and set(result.sensitivity) == {0, 2}
    description = describe(load_pipeline(result.pipeline_path).transformer)
    assert (description.layers_linear, description.layers_window) == ([0], [2])
    linear = convert(seen.teacher, layers=[0], mode="linear")
    raw = error(convert(linear, layers=[2], mode="window", window={"chunk": 1, "overlap": 0}))
    warm = error(warmed_up(seen.teacher, config, [0], [2]))
    assert warm < 0.9 * raw and error(result.pipeline.transformer) < 0.5 * warm
    with pytest.raises(ValueError, match="was not warmed up"):
        warmed_up(seen.teacher, config, [1])


def test_selection_by_sensitivity_takes_the_lowest_errors(tmp_path):
    result = run(tmp_path / "run", max_train_steps=0, selection={"method": "sensitivity", "num_linear_layers": 1})
    assert result.layers_linear == [min(result.sensitivity, key=result.sensitivity.get)]
    assert result.r == {}


def test_r_may_start_from_sensitivity(tmp_path):
    selection = {"num_linear_layers": 1, "r_from_sensitivity": True, "max_train_steps": 0}
    result = run(tmp_path / "run", max_train_steps=0, selection=selection)
    order = sorted(result.sensitivity, key=result.sensitivity.get)
    assert [result.r[layer] for layer in order] == pytest.approx([0.6, 0.775, 0.95])
    assert result.layers_linear == order[:1]


def test_top_k_can_replace_threshold_rounding_when_no_r_is_below_it(tmp_path):
    selection = {"num_linear_layers": 1, "r_init": 0.4, "max_train_steps": 1, "rounding": "threshold"}
    result = run(tmp_path / "a", max_train_steps=0, selection=selection)
    assert result.layers_linear == [0, 1, 2]  # although the target is 1
    selection["r_init"] = 0.8
    with pytest.raises(ValueError, match="selection.rounding top_k"):
        run(tmp_path / "b", max_train_steps=0, selection=selection)
    selection["rounding"] = "top_k"
    resumed = run(tmp_path / "b", max_train_steps=0, selection=selection, resume_from_checkpoint="latest")
    assert len(resumed.layers_linear) == 1
    selection["rounding"] = "threshold"
    with pytest.raises(ValueError, match="selection.rounding 'top_k' "):
        run(tmp_path / "b", max_train_steps=0, selection=selection, resume_from_checkpoint="latest")


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": {"name": "own_mse"}},
        {"objective": {"name": "adm_step"}},
        {"objective": {"name": "adm", "weight": "score"}},
        {"mixed_precision": "bf16"},
        {"feature_map": "elu"},
        {"report_to": "tensorboard"},
    ],
    ids=str,
)
def test_other_settings_run_to_the_end(tmp_path, settings):
    result = run(tmp_path / "run", **{"max_train_steps": 2, **settings})
    assert all(value.isfinite().all() for value in result.pipeline.transformer.state_dict().values())
    if "report_to" in settings:
        assert list((tmp_path / "run" / "logs").rglob("events*"))


def test_gradient_checkpointing_gives_the_same_weights(tmp_path):
    plain = run(tmp_path / "a", max_train_steps=2).pipeline.transformer.state_dict()
    saved = run(tmp_path / "b", max_train_steps=2, gradient_checkpointing=True).pipeline.transformer.state_dict()
    assert all(torch.allclose(plain[name], saved[name], atol=1e-6) for name in plain)


def test_gradient_accumulation_averages_over_micro_batches(tmp_path):
    from linvideo.transfer.gradient_step import GradientStep

    config = tiny_config(tmp_path / "run", max_train_steps=0)
    with watched() as seen:
        train(config, tiny_teacher(), PROMPTS)
    student, data = convert(seen.teacher, mode="linear"), seen.data
    parts = (student, seen.teacher, data.store, data.prompts, data.source.grid, config, "test")
    name, loss = GradientStep(*parts, objectives.ObjectiveConfig(name="mse"))(3)
    gradient = student.proj_out.weight.grad.clone()
    student.zero_grad()
    positions = (range(2), range(2, 4))
    batches = [data.store.draw(part, 0, "test", 3, prompts=data.prompts) for part in positions]
    by_hand = sum(objectives.teacher_state_mse(student, batch) for batch in batches) / 2
    by_hand.backward()
    assert name == "mse" and loss == pytest.approx(float(by_hand.detach()))
    assert torch.allclose(gradient, student.proj_out.weight.grad, atol=1e-7)


def test_not_finite_steps_are_skipped_and_too_many_end_the_run(tmp_path, monkeypatch):
    original = objectives.teacher_state_mse
    calls = []

    def sometimes_nan(student, batch):
        calls.append(0)
        return original(student, batch) * (float("nan") if len(calls) in (3, 4) else 1.0)

    monkeypatch.setattr(objectives, "teacher_state_mse", sometimes_nan)
    settings = {"gradient_accumulation_steps": 1, "objective": {"name": "mse"}}
    settings["selection"] = {"method": "sensitivity", "num_linear_layers": 1}
    result = run(tmp_path / "a", max_nonfinite_steps=2, **settings)
    assert all(value.isfinite().all() for value in result.pipeline.transformer.state_dict().values())
    rows = [row for row in read_metrics(tmp_path / "a" / "metrics.jsonl") if row["stage"] == "finetune"]
    assert len(rows) == 6 and ["loss" in row for row in rows] == [True, True, False, False, True, True]

    calls.clear()
    with pytest.raises(TrainingDiverged, match="2 steps had a non-finite loss or gradient, the last was step 4 of"):
        run(tmp_path / "b", max_nonfinite_steps=1, **settings)


def test_a_run_that_skipped_most_of_its_steps_is_not_exported(tmp_path, monkeypatch):
    original, calls = objectives.teacher_state_mse, []

    def mostly_nan(student, batch):
        calls.append(0)
        return original(student, batch) * (1.0 if len(calls) <= finite else float("nan"))

    monkeypatch.setattr(objectives, "teacher_state_mse", mostly_nan)
    settings = {"gradient_accumulation_steps": 1, "objective": {"name": "mse"}, "warmup": {"max_train_steps": 0}}
    settings["selection"] = {"method": "layers", "layers": [0]}
    finite = 3
    with pytest.warns(UserWarning, match="3 of 6 steps had a non-finite loss or gradient and were skipped"):
        run(tmp_path / "half", **settings)
    calls.clear()
    finite = 2
    with pytest.raises(TrainingDiverged, match="4 of 6 steps .* no pipeline is written"):
        run(tmp_path / "most", **settings)
    assert not (tmp_path / "most" / "pipeline").exists()


def refused(match, output_dir, teacher=None, prompts=PROMPTS, **settings):
    """Check that `train` raises ValueError and leaves output_dir unchanged."""
    before = sorted(str(path) for path in output_dir.rglob("*")) if output_dir.exists() else None
    with pytest.raises(ValueError, match=match) as error:
        train(tiny_config(output_dir, **settings), teacher, prompts)
    assert "\n" not in str(error.value)
    assert (sorted(str(path) for path in output_dir.rglob("*")) if output_dir.exists() else None) == before


def test_bad_input_is_refused_before_anything_is_written(tmp_path):
    new, teacher = tmp_path / "new", tiny_teacher()
    refused("pretrained_model_name_or_path", new)
    refused("expected a pipeline folder", new, pretrained_model_name_or_path=str(tmp_path))
    refused("at most the model's 3 layers, got 4", new, teacher, selection={"num_linear_layers": 4})
    refused("must lie in 0 to 2", new, teacher, selection={"method": "layers", "layers": [3]})
    refused("expected a stock WanTransformer3DModel", new, tiny_pipeline(convert(tiny_transformer(), layers=[0])))
    refused("text-to-video", new, tiny_pipeline(tiny_transformer(in_channels=36)))
    refused("multiple of 16", new, teacher, trajectories={"height": 40})
    refused("at least one prompt", new, teacher, prompts=[])
    refused("latest or a checkpoint folder", new, teacher, resume_from_checkpoint=str(tmp_path / "none"))


def test_a_folder_in_use_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    refused("not empty", tmp_path, tiny_teacher())
    refused("holds no training run", tmp_path, tiny_teacher(), resume_from_checkpoint="latest")
    refused("got the file", tmp_path / "mine.txt", tiny_teacher())


def test_overwrite_deletes_the_old_run_and_nothing_else(tmp_path):
    folder = tmp_path / "run"
    run(folder, max_train_steps=2)
    (folder / "mine.txt").write_text("mine")
    refused("not empty", folder, tiny_teacher())
    result = run(folder, max_train_steps=1, seed=1, overwrite_output_dir=True)
    assert (folder / "mine.txt").read_text() == "mine"
    assert TrajectoryStore(folder / "trajectories").request["seed"] == 1
    assert not (folder / "checkpoint-11").exists() and result.pipeline_path.is_dir()


def test_trajectories_may_be_shared_but_not_mistaken(tmp_path):
    run(tmp_path / "a", max_train_steps=0)
    shared = {**tiny_config("x").to_dict()["trajectories"], "path": str(tmp_path / "a" / "trajectories")}
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "a" / "trajectories").iterdir()}
    run(tmp_path / "b", max_train_steps=0, trajectories=shared)
    assert not (tmp_path / "b" / "trajectories").exists()
    assert files == {path: path.stat().st_mtime_ns for path in files}
    with pytest.raises(ValueError, match=r"guidance_scale 2\.0 \(now 3\.0\)"):
        run(tmp_path / "c", trajectories={**shared, "guidance_scale": 3.0})
    run(tmp_path / "c", max_train_steps=0, trajectories=shared)  # the refused run left nothing in the folder


def test_workers_on_their_own_fill_one_store(tmp_path, capsys):
    pipeline = tiny_teacher()
    pipeline.save_pretrained(tmp_path / "teacher")
    options = tiny_config(tmp_path / "run", pretrained_model_name_or_path=str(tmp_path / "teacher"), device="cpu")
    options.save(tmp_path / "options.yaml")
    (tmp_path / "captions.txt").write_text("\n".join(PROMPTS))
    flags = ["--config", tmp_path / "options.yaml", "--prompts.prompts_file", tmp_path / "captions.txt"]
    for worker, said in (("1/2", "1 of 3 shards"), ("0/2", "3 of 3 shards")):
        assert main(["collect", "--worker", worker, *map(str, flags)]) == 0
        assert said in capsys.readouterr().out
    assert main(["train", *map(str, flags), "--resume_from_checkpoint", "latest"]) == 0
    run(tmp_path / "whole")
    for number in range(3):
        name = f"trajectories/shard-{number:06d}.safetensors"
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    file = "pipeline/transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.parametrize("worker", ["2/2", "1", "a/b", "-1/2"])
def test_workers_are_numbered(worker, tmp_path, capsys):
    assert main(["collect", f"--worker={worker}", "--output_dir", str(tmp_path / "run")]) == 2
    assert f"got {worker}" in capsys.readouterr().err and not (tmp_path / "run").exists()
