"""Whole distillations of tiny models: their results, what trains when, what stays unchanged, what is refused."""

import pytest
import torch
from command_line import refused
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from tiny import generate, tiny_image, tiny_image_pipeline, tiny_image_transformer, tiny_inputs, tiny_transformer
from tiny_distill_run import LINEAR, distill_config, run, tiny_student
from tiny_run import PROMPTS, tiny_config, tiny_experts, tiny_teacher

from linvideo.commands.main import main
from linvideo.distillation import distill
from linvideo.distillation.dmd_step import DmdStep
from linvideo.models import FewStepScheduler, convert, describe, load_pipeline
from linvideo.run import read_metrics
from linvideo.run.checkpoint import list_checkpoints, load_checkpoint
from linvideo.run.optimizer import StudentOptimizer
from linvideo.trajectories import TrajectoryStore
from linvideo.transfer import collect

NO_REGRESSION = {"regression": {"max_train_steps": 0}}
PLAIN_DMD = {"dmd": {"student_every": 3}}


def copied(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def exported(folder) -> dict[str, torch.Tensor]:
    return load_pipeline(folder / "pipeline").transformer.state_dict()


def in_dmd(folder, step: int) -> dict[str, torch.Tensor]:
    """Return the trained weights in a checkpoint of that stage, the critic's with the prefix "critic."."""
    model, state = load_checkpoint(folder / f"checkpoint-{step}")
    assert state["stage"] == "dmd"
    return model


# results of a run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return folder and result of a run, and the initial weights of teacher and student, which it left unchanged."""
    folder, teacher = tmp_path_factory.mktemp("whole"), tiny_teacher()
    student = tiny_student(teacher)
    before, scheduler = (copied(teacher.transformer), copied(student)), teacher.scheduler
    config = distill_config(folder, checkpointing_steps=1)
    result = distill(config, teacher, student, PROMPTS)
    assert same(copied(teacher.transformer), before[0]) and same(copied(student), before[1])
    assert teacher.scheduler is scheduler and teacher.transformer.training is False
    return folder, result, before


def test_the_exported_pipeline_samples_in_few_steps(whole):
    folder, result, _ = whole
    loaded = load_pipeline(result.pipeline_path)
    assert result.pipeline_path == folder / "pipeline" and result.timesteps == [1000.0, 500.0]
    card = (folder / "pipeline" / "README.md").read_text()
    assert "- distillation to few steps: optimizer steps: regression " in card and r"\[1000.0, 500.0\]" in card
    assert "num_inference_steps=2, guidance_scale=1.0" in card
    for pipeline in (loaded, result.pipeline):
        assert isinstance(pipeline.scheduler, FewStepScheduler)
        assert list(pipeline.scheduler.config.timesteps) == [1000.0, 500.0]
        description = describe(pipeline.transformer)
        assert description.layers_linear == LINEAR and description.layers_mixed == []
    assert same(copied(loaded.transformer), copied(result.pipeline.transformer))
    assert not any("discriminator" in name or "critic" in name for name in loaded.transformer.state_dict())
    with torch.no_grad():
        ours, theirs = (pipe.transformer(**tiny_inputs())[0] for pipe in (result.pipeline, loaded))
    assert torch.equal(ours, theirs)
    frames, again = generate(loaded), generate(result.pipeline)
    assert frames.shape == (5, 32, 32, 3) and (frames == again).all()
    with pytest.raises(ValueError, match="distilled to 2 steps, got 5"):
        generate(loaded, num_inference_steps=5)


def test_the_rows_of_a_run(whole):
    folder, result, _ = whole
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 12))
    assert [row["stage"] for row in rows] == ["regression"] * 4 + ["dmd"] * 7
    assert set(result.seconds) == {"trajectories", "regression", "dmd", "export"}
    student = {"loss_student", "grad_norm_student", "learning_rate"}
    assert all({"loss", "grad_norm"} <= row.keys() for row in rows)
    assert [student <= row.keys() for row in rows[4:]] == [False, False, True, False, False, True, False]
    assert [bool(student & row.keys()) for row in rows[4:]] == [False, False, True, False, False, True, False]


def test_regression_moves_the_student(whole):
    folder, _, (_, student) = whole
    start = in_dmd(folder, 4)
    assert not same({name: student[name] for name in student if name in start}, start)
    losses = [row["loss"] for row in read_metrics(folder / "metrics.jsonl")[:4]]
    assert losses[-1] < losses[0]


def test_the_critic_trains_every_step_and_the_student_every_third(whole):
    folder, *_ = whole
    states = [in_dmd(folder, step) for step in range(4, 11)]  # before the stage, then after 6 of its 7 steps
    for number, (before, after) in enumerate(zip(states, states[1:], strict=False), 1):
        moved = {name for name in after if not torch.equal(before[name], after[name])}
        of_critic = {name for name in after if name.startswith("critic.")}
        assert "critic.discriminator.layers.1.weight" in of_critic
        # all weights of the critic change, except biases that are 0 and have no gradient
        assert len(moved & of_critic) > 0.9 * len(of_critic)
        assert bool(moved - of_critic) == (number % 3 == 0), number


def test_the_critic_starts_as_the_teacher(whole):
    folder, _, (teacher, _) = whole
    critic = {n.removeprefix("critic."): v for n, v in in_dmd(folder, 4).items() if n.startswith("critic.")}
    assert {name for name in critic if name not in teacher} == {n for n in critic if n.startswith("discriminator.")}
    assert all(torch.equal(value, teacher[name]) for name, value in critic.items() if name in teacher)


def test_the_average_of_the_students_steps_is_exported(whole):
    folder, *_ = whole
    start, first, second = (in_dmd(folder, step) for step in (4, 7, 10))
    theirs, moved = exported(folder), 0
    # diffusers' EMA starts with the weights of its first step; after n more its decay is min(0.98, (1 + n) / (10 + n))
    decays = [0.0, 2 / 11]
    for name in (name for name in start if not name.startswith("critic.")):
        average = start[name]
        for decay, trained in zip(decays, (first[name], second[name]), strict=True):
            average = decay * average + (1 - decay) * trained
        # a few fp32 rounding errors of a number of this size
        assert torch.allclose(theirs[name], average, rtol=1e-6, atol=1e-7)
        moved += not torch.allclose(average, second[name], rtol=1e-5, atol=1e-6)
    assert moved > 0


def test_without_an_average_the_last_weights_are_exported(tmp_path):
    run(tmp_path, use_ema=False, max_train_steps=4, checkpointing_steps=1, **NO_REGRESSION, **PLAIN_DMD)
    last, weights = in_dmd(tmp_path, 3), exported(tmp_path)
    assert all(torch.equal(weights[name], last[name]) for name in last if not name.startswith("critic."))
    assert "ema" not in load_checkpoint(tmp_path / "checkpoint-3")[1]["components"]


def test_gradients_of_the_students_turn_do_not_reach_the_critic(tmp_path, monkeypatch):
    left, original = [], DmdStep.critic_gradient
    student = DmdStep.student_gradient

    def has_gradients(step):
        return any(p.grad is not None for p in step.critic.parameters())

    def turn(step, number):
        loss = student(step, number)
        left.append(has_gradients(step))
        return loss

    def checked(step, number):
        assert not has_gradients(step) and all(p.grad is None for p in step.student.parameters())
        return original(step, number)

    monkeypatch.setattr(DmdStep, "student_gradient", turn)
    monkeypatch.setattr(DmdStep, "critic_gradient", checked)
    run(tmp_path)
    assert left == [True, True]


# skipped stages


def test_regression_alone(tmp_path):
    done = run(tmp_path, max_train_steps=0)
    assert done.models.critic is None
    assert {row["stage"] for row in read_metrics(tmp_path / "metrics.jsonl")} == {"regression"}
    assert isinstance(load_pipeline(tmp_path / "pipeline").scheduler, FewStepScheduler)
    checkpoint = load_checkpoint(list_checkpoints(tmp_path)[-1])[0]
    assert all(torch.equal(checkpoint[name], value) for name, value in exported(tmp_path).items() if name in checkpoint)


def test_matching_alone_needs_no_trajectories(tmp_path):
    done = run(tmp_path, **NO_REGRESSION, **PLAIN_DMD)
    assert not (tmp_path / "trajectories").exists() and done.data.store is None
    assert not hasattr(done.models.critic, "discriminator")
    assert {row["stage"] for row in read_metrics(tmp_path / "metrics.jsonl")} == {"dmd"}
    assert not same(exported(tmp_path), copied(done.converted))


def test_a_converted_teacher_is_refused(tmp_path):
    teacher = tiny_teacher()
    teacher.transformer = convert(teacher.transformer, [1], mode="linear")
    with pytest.raises(ValueError, match="expected a stock WanTransformer3DModel as the teacher, got LinVideo"):
        distill(distill_config(tmp_path), teacher, teacher.transformer, PROMPTS)


def test_a_discriminator_needs_trajectories(tmp_path):
    run(tmp_path, **NO_REGRESSION, max_train_steps=3)
    assert TrajectoryStore(tmp_path / "trajectories").complete


def test_a_stock_model_may_be_the_student(tmp_path):
    teacher = tiny_teacher()
    distill(distill_config(tmp_path, max_train_steps=3), teacher, teacher.transformer, PROMPTS)
    assert describe(load_pipeline(tmp_path / "pipeline").transformer).layers_linear == []


# trajectories of other runs, images, validation, settings


def test_trajectories_of_a_transfer_can_be_reused(tmp_path, whole):
    config = tiny_config(tmp_path / "transfer")
    collect(config, teacher_pipeline=tiny_teacher(), prompts=PROMPTS)
    shared = {**config.to_dict()["trajectories"], "path": str(tmp_path / "transfer" / "trajectories")}
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "transfer" / "trajectories").iterdir()}
    run(tmp_path / "a", trajectories=shared)
    assert not (tmp_path / "a" / "trajectories").exists()
    assert files == {path: path.stat().st_mtime_ns for path in files}
    assert same(exported(tmp_path / "a"), exported(whole[0]))
    with pytest.raises(ValueError, match=r"guidance_scale 2\.0 \(now 3\.0\)"):
        run(tmp_path / "c", trajectories={**shared, "guidance_scale": 3.0})
    with pytest.raises(ValueError, match=r"seed 0 \(now 1\)"):
        run(tmp_path / "c", trajectories=shared, seed=1)


def test_t_is_shifted_as_by_the_sampler_unless_another_shift_is_given(tmp_path, monkeypatch):
    shifts, original = [], DmdStep.__init__

    def kept(step, *models, flow_shift, **rest):
        shifts.append(flow_shift)
        original(step, *models, flow_shift=flow_shift, **rest)

    monkeypatch.setattr(DmdStep, "__init__", kept)
    settings = {**NO_REGRESSION, "max_train_steps": 5}
    trajectories = {**distill_config("x").to_dict()["trajectories"], "flow_shift": 7.0}
    run(tmp_path / "a", **settings, **PLAIN_DMD)  # the tiny pipeline has 3
    run(tmp_path / "b", **settings, **PLAIN_DMD, trajectories=trajectories)
    run(tmp_path / "c", **settings, dmd={"flow_shift": 5.0}, trajectories=trajectories)
    assert shifts == [3.0, 7.0, 5.0]


def test_schedules_count_the_students_own_steps(tmp_path, monkeypatch):
    counts, original = [], StudentOptimizer.__init__

    def kept(optimizer, student, settings, num_steps, *rest):
        counts.append((num_steps, settings.learning_rate, settings.lr_scheduler, settings.adam_beta1))
        original(optimizer, student, settings, num_steps, *rest)

    monkeypatch.setattr(StudentOptimizer, "__init__", kept)
    settings = {"optimizer": {"learning_rate": 2e-4, "lr_scheduler": "constant", "adam_beta1": 0.0}}
    run(tmp_path, **settings, regression={"max_train_steps": 4, "learning_rate": 3e-4})
    critic = (7, 4e-4, "polynomial", 0.0)
    assert counts == [(4, 3e-4, "cosine", 0.9), (2, 2e-4, "constant", 0.0), critic]


@pytest.mark.parametrize("clip", [True, False], ids=["wan21", "wan22"])
def test_an_image_to_video_pipeline(clip, tmp_path):
    pipeline = tiny_image_pipeline(tiny_image_transformer(clip, num_layers=2, ffn_dim=32))
    student = convert(pipeline.transformer, [1], mode="linear")
    prompts = {"prompts": {"max_sequence_length": 512}}  # the model needs 512 tokens
    config = distill_config(tmp_path, max_train_steps=3, **prompts)
    images = [tiny_image(seed) for seed in range(3)]
    result = distill(config, pipeline, student, PROMPTS, images)
    loaded = load_pipeline(result.pipeline_path)
    assert type(loaded).__name__ == "WanImageToVideoPipeline" and isinstance(loaded.scheduler, FewStepScheduler)
    assert not same(copied(loaded.transformer), copied(student))
    loaded.set_progress_bar_config(disable=True)
    size = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "guidance_scale": 1.0}
    assert loaded(image=images[0], prompt="a fox", output_type="np", **size).frames.shape == (1, 5, 32, 32, 3)


def test_validation_samples_the_student_in_its_few_steps(tmp_path, whole):
    validation = {"steps": 4, "num_videos": 1, "num_inference_steps": 2}
    done = run(tmp_path / "a", validation=validation)
    rows = read_metrics(tmp_path / "a" / "validation.jsonl")
    assert [(row["step"], row["stage"]) for row in rows] == [(4, "regression"), (8, "dmd"), (11, "dmd")]
    assert same(exported(tmp_path / "a"), exported(whole[0]))  # validation changes nothing
    assert read_metrics(tmp_path / "a" / "metrics.jsonl") == read_metrics(whole[0] / "metrics.jsonl")
    assert done.data.validator.student_scheduler.config.timesteps == done.run.config.scheduler().config.timesteps


@pytest.mark.parametrize(
    "settings", [{"mixed_precision": "bf16"}, {"gradient_checkpointing": True}, {"offload_teacher": True}], ids=str
)
def test_other_settings_run_to_the_end(settings, tmp_path, whole):
    done = run(tmp_path, **settings)
    weights = exported(tmp_path)
    assert all(value.isfinite().all() for value in weights.values()) and not same(weights, copied(done.converted))
    if "mixed_precision" not in settings:  # the computation is the same, only its place and time differ
        others = exported(whole[0])
        assert all(torch.allclose(weights[name], others[name], atol=1e-6) for name in weights)


def test_not_finite_steps_are_skipped(tmp_path, monkeypatch):
    original = DmdStep.student_gradient
    monkeypatch.setattr(DmdStep, "student_gradient", lambda step, number: original(step, number) * float("nan"))
    run(tmp_path, **NO_REGRESSION)
    start, last = in_dmd(tmp_path, 0), in_dmd(tmp_path, 6)
    student = [name for name in start if not name.startswith("critic.")]
    assert all(torch.equal(start[name], last[name]) for name in student)
    weights = exported(tmp_path)  # the EMA didn't change, either
    assert all(torch.equal(start[name], weights[name]) for name in student)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert ["learning_rate" in row for row in rows] == [False, False, True, False, False, True, False]
    assert not any("loss_student" in row for row in rows) and all("loss" in row for row in rows)
    assert load_checkpoint(tmp_path / "checkpoint-7")[1]["nonfinite"] == 2


def test_the_attention_backend_applies_to_all_models(tmp_path, monkeypatch):
    # diffusers makes a model's backend the default for all models; later tests must not get it
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)
    done = run(tmp_path, attention_backend="_native_math", max_train_steps=3)

    def backends(model):
        layers = [attn for block in model.blocks for attn in (block.attn1, block.attn2)]
        return {attn.processor._attention_backend for attn in layers}

    assert [backends(vars(done.models)[name]) for name in ("student", "teacher", "critic")] == [{"_native_math"}] * 3
    assert backends(done.converted) == {None}


# refused input


def refused_in_python(match, output_dir, teacher=None, student=None, prompts=PROMPTS, **settings):
    with pytest.raises(ValueError, match=match) as error:
        distill(distill_config(output_dir, **settings), teacher, student, prompts)
    assert "\n" not in str(error.value) and not output_dir.exists()


def test_bad_input_is_refused_before_anything_is_written(tmp_path):
    new, teacher = tmp_path / "new", tiny_teacher()
    student = tiny_student(teacher)
    refused_in_python("^student_model_name_or_path must name the converted model, got None$", new, teacher)
    refused_in_python("pretrained_model_name_or_path must name the teacher", new, None, student)
    mixed = convert(teacher.transformer, [0, 2], mode="mixed")
    refused_in_python(r"got mixed layers \[0, 2\]", new, teacher, mixed)
    other = tiny_transformer(3, ffn_dim=32, text_dim=24)
    refused_in_python("the teacher's text_dim 32, got 24", new, teacher, other)
    refused_in_python("the teacher's in_channels 16, got 36", new, teacher, tiny_image_transformer(clip=False))
    refused_in_python("the teacher's patch_size", new, teacher, tiny_transformer(2, patch_size=(1, 1, 1)))
    refused_in_python("expected a Wan transformer as the student, got Linear", new, teacher, torch.nn.Linear(1, 1))
    refused_in_python("two experts", new, tiny_experts(), student)
    layer = {"adversarial_weight": 0.1, "adversarial_layer": 3}
    refused_in_python(r"dmd.adversarial_layer must lie in \[0, 2\], got 3", new, teacher, student, dmd=layer)
    refused_in_python("at least one prompt", new, teacher, student, prompts=[])
    folder = str(tmp_path / "none")
    refused_in_python("none", new, teacher, student_model_name_or_path=folder)


def test_a_folder_in_use_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


# the command


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return the teacher and the student as pipeline folders."""
    path, teacher = tmp_path_factory.mktemp("folders"), tiny_teacher()
    teacher.save_pretrained(path / "teacher")
    words = [str(path / "teacher"), "--output_dir", str(path / "student"), "--layers", "1"]
    assert main(["convert", *words]) == 0
    return path / "teacher", path / "student"


def test_the_command_distils_what_is_in_folders(folders, whole, tmp_path, capsys):
    teacher, student = folders
    config = distill_config(tmp_path / "run", device="cpu", pretrained_model_name_or_path=str(teacher))
    config.save(tmp_path / "run.yaml")
    (tmp_path / "captions.txt").write_text("\n".join(PROMPTS))
    flags = ["--config", tmp_path / "run.yaml", "--student_model_name_or_path", student]
    flags += ["--prompts.prompts_file", tmp_path / "captions.txt"]
    assert main(["distill", *map(str, flags)]) == 0
    said = capsys.readouterr().out
    assert "timesteps [1000.0, 500.0]" in said and f"is in {tmp_path / 'run' / 'pipeline'}" in said
    assert f"{tmp_path / 'run' / 'report.html'}" in said
    assert same(exported(tmp_path / "run"), exported(whole[0]))


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--nonsense", "1"], "nonsense"),
        (["--dmd.student_every", "0"], "dmd.student_every must be at least 1, got 0"),
        (["--timesteps", "[1, 2]"], "timesteps must fall"),
        ([], "student_model_name_or_path must name the converted model"),
    ],
)
def test_bad_options_are_one_line(flags, words, folders, tmp_path, capsys):
    teacher = ["--pretrained_model_name_or_path", folders[0], "--device", "cpu", "--optimizer.learning_rate", "2e-4"]
    size = ["--trajectories.height", "32", "--trajectories.width", "32", "--trajectories.num_frames", "5"]
    assert words in refused(capsys, "distill", "--output_dir", tmp_path / "run", *teacher, *size, *flags)
    assert not (tmp_path / "run").exists()
