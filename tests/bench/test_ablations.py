"""The ablations: settings, shared stages, their own objectives, the distance and the report."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import PROMPTS, tiny_config, tiny_teacher
from toy import AffineFlow, toy_prompts, toy_store

from benchmarks.ablations import ablations_report, films, headroom_report, suite, tuning
from benchmarks.ablations.__main__ import describe_teacher, main
from benchmarks.ablations.ablate import ablate, start_after
from benchmarks.ablations.bench import Bench, diversity
from benchmarks.ablations.distance import kernel_distance, labels
from benchmarks.ablations.objectives import AblationStep, RecordingRollouts
from benchmarks.ablations.settings import (
    COST,
    DEFAULT,
    SETTINGS,
    SUITES,
    TUNING_SEED,
    Setting,
    Suite,
    fixed_layers,
    steps,
)
from benchmarks.ablations.variants import RopeAfterBranch
from linvideo.demo import teacher
from linvideo.demo.train_teacher import METRICS
from linvideo.demo.world import WORLDS
from linvideo.models import load_pipeline
from linvideo.ops.reference import features
from linvideo.run.checkpoint import list_checkpoints, load_checkpoint
from linvideo.transfer import train
from linvideo.transfer.objectives import ObjectiveConfig
from linvideo.transfer.train_config import TrainConfig

TINY = Suite("small", tuple(SETTINGS), 4, 2, 1, 4, num_trajectories=4, batch_size=2, videos=4, noises=2, compared=1)


# Settings.


def test_suites_name_settings_and_begin_with_the_default():
    for chosen in SUITES.values():
        assert set(chosen.settings) <= set(SETTINGS)
        assert chosen.settings[0] == DEFAULT.name
        assert len(set(chosen.settings)) == len(chosen.settings)


def test_only_the_default_changes_nothing():
    def content(setting: Setting) -> tuple:
        changes = tuple(sorted(setting.changes.items()))
        rules = setting.layers, setting.windows, setting.share, setting.length, setting.tuned
        return changes, *rules, setting.objective, setting.sampler_steps, setting.variant

    assert len({content(setting) for setting in SETTINGS.values()}) == len(SETTINGS)
    assert all(setting.tuned in (None, *SETTINGS) for setting in SETTINGS.values())


def test_objectives_get_the_same_time():
    for name in COST:
        assert steps(name, 3000, 100) * COST[name] == pytest.approx(3000, rel=0.01)
    hybrid = steps("hybrid", 3000, 100)
    at = [ObjectiveConfig("hybrid", mse_steps=100).at(step) for step in range(hybrid)]
    assert sum(COST[name] for name in at) == pytest.approx(3000, rel=0.01)
    assert steps("hybrid", 40, 100) == 40
    assert steps("hybrid", 3000, 100, "own_mse") > hybrid
    assert steps("adm", 3000, 100, guided=False) > steps("adm", 3000, 100)
    assert steps("mse", 3000, 100, guided=False) == 3000


@pytest.mark.parametrize("rule", ["first", "last", "spread", "random"])
@pytest.mark.parametrize("num_layers", [8, 12, 30])
def test_fixed_layers(rule, num_layers):
    for count in range(1, num_layers + 1):
        chosen = fixed_layers(rule, count, num_layers, 0)
        assert chosen == sorted(set(chosen)) and len(chosen) == count
        assert 0 <= chosen[0] and chosen[-1] < num_layers
    assert fixed_layers("spread", 4, 8, 0) == [1, 3, 5, 7]
    assert fixed_layers("random", 4, 30, 0) != fixed_layers("random", 4, 30, 1)


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="rule"):
        fixed_layers("middle", 1, 8, 0)


# Stages that are shared.


@pytest.mark.parametrize(("stage", "r_init"), [("sensitivity", 0.6), ("selection", 0.8)])
def test_a_run_that_shares_stages_ends_as_one_that_does_not(tmp_path, stage, r_init):
    values = tiny_config("x").to_dict()
    trajectories = values["trajectories"] | {"path": str(tmp_path / "trajectories")}
    sections = {"trajectories": trajectories, "checkpointing_steps": 100}
    train(tiny_config(tmp_path / "source", **sections), tiny_teacher(), PROMPTS)
    sections["selection"] = values["selection"] | {"r_init": r_init}
    whole = train(tiny_config(tmp_path / "whole", **sections), tiny_teacher(), PROMPTS)
    config = start_after(stage, tmp_path / "source", tiny_config(tmp_path / "shared", **sections))
    shared = train(config, tiny_teacher(), PROMPTS)
    assert shared.layers_linear == whole.layers_linear
    state = whole.pipeline.transformer.state_dict()
    for name, value in shared.pipeline.transformer.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_shared_stages_must_be_there(tmp_path):
    with pytest.raises(ValueError, match="expected a checkpoint at the end of warmup"):
        start_after("warmup", tmp_path, TrainConfig(output_dir=str(tmp_path / "new")))


# Objectives. With u_T = x + c and u_S = a x + c all results are known in closed form.


def toy_step(tmp_path, kind: str | None, objective: str = "own_mse", student: float = 0.5) -> AblationStep:
    sigmas = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0])
    prompts, store = toy_prompts(), toy_store(tmp_path / "store", 1000 * sigmas[:-1])
    config = TrainConfig(output_dir=str(tmp_path / "run"), train_batch_size=4)
    models = (AffineFlow(student), AffineFlow(1.0))
    grid = (1000 * sigmas[:-1], sigmas)
    return AblationStep(kind, *models, store, prompts, grid, config, "finetune", ObjectiveConfig(objective))


def test_renoised_adm_moves_the_noised_estimate_towards_the_teacher(tmp_path):
    step = toy_step(tmp_path, "adm_renoise")
    x, sigma, scale = step.rollouts.x.clone(), step.rollouts.sigma.clone(), step.student.scale
    original, drawn = step._t_and_noise, []

    def record(clean, draws):
        drawn.append((clean.detach(), *original(clean, draws)))
        return drawn[0][1:]

    step._t_and_noise = record
    step(0)
    clean, t, noise = drawn[0]
    t = t.view(-1, 1, 1, 1, 1)
    gradient = ((1 - t) / t).clamp(max=5) * (1.0 - scale.detach()) * ((1 - t) * clean + t * noise)
    through = -(1 - t) * sigma.view(-1, 1, 1, 1, 1) * x  # d x_hat / d scale, u = scale x + ...
    assert scale.grad.item() == pytest.approx((gradient * through).mean().item(), rel=1e-4)


def test_dmd_asks_nothing_of_a_student_whose_score_is_the_teachers(tmp_path):
    step = toy_step(tmp_path, "dmd", student=1.0)
    before = step.score_net.scale.item()
    name, _ = step(0)
    assert name == "own_mse"  # the name in the config, although the kind decides what runs
    assert step.student.scale.grad.item() == pytest.approx(0.0, abs=1e-7)
    assert step.score_net.scale.item() != before


def test_a_score_network_learns_from_the_final_samples_of_rollouts(tmp_path):
    step = toy_step(tmp_path, "adm_score_net")
    rollouts = step.rollouts
    assert isinstance(rollouts, RecordingRollouts)
    first = rollouts.ended.clone()
    for number in range(6):
        step(number)
    assert rollouts.next >= 4  # four rollouts of four steps each, from different starts
    assert not torch.equal(rollouts.ended[: rollouts.next], first[: rollouts.next])
    assert torch.equal(rollouts.ended[rollouts.next :], first[rollouts.next :])


def test_the_teachers_samples_stand_in_at_first(tmp_path):
    step = toy_step(tmp_path, "adm_score_net")
    last = step.store.batch([3], step.prompts)
    assert torch.allclose(step.rollouts.ended[0], (last.x - last.t.item() * last.u)[0])


def test_uniform_t_draws_a_step_as_often_as_it_covers_t(tmp_path):
    step = toy_step(tmp_path, "uniform_t", "mse")
    t = torch.cat([step._uniform_t(draw).t for draw in range(500)])
    share = [(t - sigma).abs().lt(1e-3).float().mean().item() for sigma in (1.0, 0.8, 0.5, 0.2)]
    assert share == pytest.approx([0.2, 0.3, 0.3, 0.2], abs=0.04)


def test_own_states_can_stand_in_for_adm(tmp_path):
    ours, theirs = toy_step(tmp_path / "a", "own_mse_for_adm", "adm"), toy_step(tmp_path / "b", None, "own_mse")
    assert ours(0)[1] == theirs(0)[1]


def test_without_a_kind_it_is_the_librarys_step(tmp_path):
    ours, theirs = toy_step(tmp_path / "a", None, "adm"), toy_step(tmp_path / "b", None, "adm")
    theirs._loss = super(AblationStep, theirs)._loss
    assert ours(0) == theirs(0)


# Variants.


def test_rope_after_the_map_equals_its_formula_and_sees_only_distances():
    torch.manual_seed(0)
    branch = RopeAfterBranch(2, 8, mixed=False)
    q, k, v = torch.randn(3, 1, 6, 2, 8)

    def tables(offset: int):
        angle = (torch.arange(6.0) + offset)[:, None] * torch.tensor([1.0, 0.5, 0.2, 0.1])
        return angle.cos(), angle.sin()

    def rotated(phi: torch.Tensor) -> torch.Tensor:
        """Return R phi, calculated with complex numbers from the pairs of both halves."""
        cos, sin = tables(0)
        pairs = torch.view_as_complex(phi.unflatten(-1, (2, 4, 2)).contiguous())
        return torch.view_as_real(pairs * torch.complex(cos, sin)[None, :, None, None]).flatten(-3)

    phi_q, phi_k = features(q, branch.q_weight, None, "hedgehog"), features(k, branch.k_weight, None, "hedgehog")
    scores = torch.einsum("bnhf,bmhf->bhnm", rotated(phi_q), rotated(phi_k))
    total = torch.einsum("bnhf,bmhf->bhnm", phi_q, phi_k).sum(-1, keepdim=True)
    expected = torch.einsum("bhnm,bmhd->bnhd", scores / (total + 1e-6), v)
    assert torch.allclose(branch(q, k, v, rope=tables(0)), expected, atol=1e-5)
    assert torch.allclose(branch(q, k, v, rope=tables(7)), expected, atol=1e-5)


# Learning rates.


def test_the_best_learning_rate_is_found_on_a_seed_that_does_not_count():
    setting, good = SETTINGS["MSE, badly chosen layers"], {0.25: 0.5, 0.5: 0.6, 1.0: 0.7, 2.0: 0.7, 4.0: 0.65}
    error = {0.25: 5.0, 0.5: 4.0, 1.0: 3.0, 2.0: 2.0, 4.0: 1.0}

    def row(factor: float, seed: int = TUNING_SEED) -> dict:
        found = {"setting": setting.name, "seed": seed, "rate_factor": factor, "good": good[factor]}
        return found | {"own_state_error": error[factor]}

    assert tuning.missing([], setting) == [0.25, 0.5, 1.0]
    rows = [row(0.25), row(1.0), row(0.5, seed=0)]  # a row of another seed doesn't count
    assert tuning.missing(rows, setting) == [0.5]
    rows.append(row(0.5))
    assert tuning.missing(rows, setting) == [2.0]  # the best one so far is the highest
    rows.append(row(2.0))
    assert tuning.best(rows, setting) == 2.0  # as good as 1, and closer to the teacher
    assert tuning.missing(rows, setting) == [4.0]
    rows.append(row(4.0))
    assert tuning.missing(rows, setting) == [] and tuning.best(rows, setting) == 2.0
    assert tuning.best(rows, SETTINGS["MSE, half negative prompts"]) == 2.0
    assert tuning.best(rows, DEFAULT) is None
    high = [row(factor) | {"good": factor} for factor in (0.25, 0.5, 1.0, 2.0, 4.0)]
    assert tuning.missing(high, setting) == []  # the limit


# The distance.


def test_diversity_is_the_distance_of_videos_with_the_same_caption():
    videos = torch.randn(2, 3, 4, 5)  # two captions, three videos of each
    pairs = [(a, b) for a in range(3) for b in range(a)]
    expected = torch.stack([(videos[:, a] - videos[:, b]).square().mean() for a, b in pairs]).mean()
    assert diversity(videos.flatten(0, 1), 3) == pytest.approx(expected.item())
    assert diversity(videos[:, :1].expand(-1, 3, -1, -1).flatten(0, 1), 3) == 0


def test_the_kernel_distance_is_that_of_its_definition():
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64) + 1

    def kernel(a, b):
        return float((a @ b / 3 + 1) ** 3)

    xx = sum(kernel(x[i], x[j]) for i in range(5) for j in range(5) if i != j) / 20
    yy = sum(kernel(y[i], y[j]) for i in range(4) for j in range(4) if i != j) / 12
    xy = sum(kernel(a, b) for a in x for b in y) / 20
    assert kernel_distance(x, y) == pytest.approx(xx + yy - 2 * xy)


def test_the_kernel_distance_has_no_bias_and_sees_another_law():
    draws = torch.Generator().manual_seed(0)
    same = [kernel_distance(*torch.randn(2, 40, 8, generator=draws, dtype=torch.float64)) for _ in range(200)]
    assert abs(sum(same) / 200) < 3 * torch.tensor(same).std() / 200**0.5
    assert min(same) < 0 < max(same)
    assert kernel_distance(torch.randn(100, 8, generator=draws) + 1, torch.randn(100, 8, generator=draws)) > max(same)


def test_labels_name_every_object():
    def scenes(world: str, *captions: str):
        return WORLDS[world].scenes_from_captions(list(captions), torch.Generator().manual_seed(0))

    assert labels(scenes("small", "a red disc moving up", "a cyan cross moving left")).tolist() == [
        [0, 0, 1, 6],
        [1, 5, 2, 4],
    ]
    two = "a blue square moving left in front of a cyan cross moving up-left camera up"
    assert labels(scenes("middle", two, two)).tolist() == [[0, 2, 0, 4], [0, 5, 2, 5], [1, 2, 0, 4], [1, 5, 2, 5]]


# Whole runs.


class FakeDistance:
    def __call__(self, videos):
        return 0.5

    def between(self, videos, others):
        return 0.25


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A bench with an untrained teacher of four layers, which is sampled in three steps."""
    settings = dataclasses.replace(teacher.SETTINGS["small"], layers=4, ffn_dim=32, num_inference_steps=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(teacher.SETTINGS, "small", settings)
        folder = tmp_path_factory.mktemp("suite")
        teacher.build_pipeline(WORLDS["small"]).save_pretrained(folder / "teacher")
        bench = Bench(dataclasses.replace(TINY, headroom=True), folder / "teacher", folder, "cpu")
        bench.distance = FakeDistance()  # the test of the command trains its network
        bench.rows = [bench.teacher_row(0), bench.row(DEFAULT, 0)]
        yield bench


def test_the_teachers_row(bench):
    first, default = bench.rows
    assert first["diversity"] > 0 and default["diversity"] > 0
    assert first["distance"] == 0.5 and first["teacher_distance"] == 0.25 and "psnr_to_teacher" not in first
    assert bench.world_row(0)["good"] == 1
    assert len(default["layers_linear"]) == 2 and default["steps"] == 4
    assert [share for share, _ in default["curve"]] == [0, 0.25, 0.5, 0.75, 1.0]
    assert default["device_seconds"] > 0 and default["own_state_error"] > 0


def test_what_the_models_of_a_seed_start_from(bench):
    noise, _, _, captions = bench.start(0)
    assert len(captions) == 4 and captions[0] == captions[1] != captions[2] == captions[3]
    assert not torch.equal(noise[0], noise[1])
    *_, tuning_captions = bench.start(TUNING_SEED)
    assert len(tuning_captions) == 2  # half of the captions
    # The videos don't depend on how many are compared, and the error is that of the one compared video.
    error, videos = bench.sample(bench.pipeline.transformer, 0, 4)
    assert error == 0
    assert torch.allclose(videos, load_file(bench.teacher_videos(0))["videos"], atol=1e-5)
    other = load_pipeline(bench.folder / "teacher").transformer
    torch.nn.init.normal_(other.proj_out.weight)
    error, _ = bench.sample(other, 0, 4)
    assert error == pytest.approx(bench.sample(other, 0, 1)[0])
    assert error > 0


def test_a_suite_without_guidance(bench):
    unguided = Bench(dataclasses.replace(TINY, guidance_scale=1.0), bench.folder / "teacher", bench.folder, "cpu")
    noise, embeds, negative, _ = unguided.start(0)
    videos = [each.sample_videos(each.pipeline.transformer, noise, embeds, negative) for each in (unguided, bench)]
    assert not torch.allclose(*videos)
    assert torch.equal(videos[0], bench.sample_videos(bench.pipeline.transformer, noise, embeds, negative, guidance=1))
    setting = SETTINGS["every second, ADM, small step"]
    config = unguided.config(setting, 0)
    assert config.trajectories.guidance_scale == 1.0
    assert config.max_train_steps == steps("adm", 4, 0, guided=False)
    shutil.rmtree(config.output_dir)  # it starts as a copy of the default run's


@pytest.mark.parametrize(
    "name",
    [
        *("MSE, half negative prompts", "MSE, first half, four times as long", "75.0% linear, first layers"),
        *("no fine-tuning", "ADM, one step of 25", "ADM, re-noised", "ADM, score network", "DMD", "every second"),
        *("lowest sensitivity", "no L_reg", "100.0% linear", "t uniform in the MSE", "LoRA of rank 16", "elu"),
        "hybrid, ADM in the last fifth",
        "hedgehog, no warm-up, RoPE after the map",
        "first half linear, rest window, 1 + 1",
    ],
)
def test_settings_run(bench, name):
    setting = SETTINGS[name]
    row = bench.row(setting, 0, None if setting.tuned is None else 0.5)
    if setting.length == 4:
        assert row["steps"] == 16
    assert row["learning_rate"] == pytest.approx(
        1e-3 * (0.5 if setting.tuned else setting.changes.get("optimizer.learning_rate", 1))
    )
    assert row["setting"] == name and len(row["layers_linear"]) == round(4 * setting.share)
    if setting.windows is not None:
        assert row["layers_window"] == [2, 3] and 0 < row["softmax_pairs"] < 0.5
    assert 0 <= row["good"] <= 1 and row["own_state_error"] > 0
    if setting.layers == "default" or setting.after == "selection":
        assert row["layers_linear"] == bench.rows[1]["layers_linear"]
    assert {path.name for path in (bench.folder / "runs").iterdir()} == {"default-0"}


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in SETTINGS if name != DEFAULT.name])
def test_every_setting_runs(bench, name):
    assert bench.row(SETTINGS[name], 0, SETTINGS[name].tuned and 0.5)["setting"] == name


def test_pictures_of_kept_videos(bench, tmp_path):
    picture = tmp_path / "films.png"
    (bench.folder / "request.json").write_text(json.dumps({"suite": TINY.scale}))
    films.main([str(bench.folder), str(picture), "teacher", DEFAULT.name])
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        films.main([str(bench.folder), str(picture), "teacher"])


def test_lora_trains_low_rank_updates_only(bench):
    setting = SETTINGS["LoRA of rank 16"]
    student = ablate(bench.config(setting, 0), bench.pipeline, bench.prompts, setting, lambda student: 0.0).student
    selected, _ = load_checkpoint(list_checkpoints(bench.folder / "runs" / "default-0")[-2])  # before fine-tuning
    after = dict(student.named_parameters())["blocks.3.ffn.net.2.base_layer.weight"]
    assert torch.equal(after, selected["blocks.3.ffn.net.2.weight"])
    assert any("lora_B" in name and p.abs().max() > 0 for name, p in student.named_parameters())


@pytest.mark.full
def test_the_command_continues_and_reports(tmp_path, monkeypatch, capsys):
    names = (DEFAULT.name, "no fine-tuning")
    monkeypatch.setitem(SUITES, "small", Suite(**{**vars(TINY), "settings": names}))
    monkeypatch.setattr(ablations_report, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(ablations_report, "DOCS", tmp_path)
    arguments = ["--suite", "small", "--seeds", "1", "--output_dir", str(tmp_path / "work"), "--processes", "1"]
    main([*arguments, "--no_report"])
    rows = json.loads((tmp_path / "work" / "rows.json").read_text())
    assert [row["setting"] for row in rows] == ["teacher", *names]
    (tmp_path / "work" / "rows.json").write_text(json.dumps(rows[:2]))
    main(arguments)
    again = json.loads((tmp_path / "work" / "rows.json").read_text())
    assert again[:2] == rows[:2] and again[2]["good"] == rows[2]["good"]
    assert again[2]["own_state_error"] == rows[2]["own_state_error"]
    assert "[1/1] no fine-tuning" in capsys.readouterr().out
    (result,) = (tmp_path / "results").glob("*.json")
    assert json.loads(result.read_text())["rows"] == again
    assert "no fine-tuning" in (tmp_path / "ablations.md").read_text()
    assert main(arguments) is None and len(list((tmp_path / "results").glob("*.json"))) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "expected --seeds to be at least 1, got 0"),
        (["--processes", "0"], "expected --processes to be at least 1"),
        (["--suite", "middle"], "expected --teacher for the world middle"),
        (["--groups", "layers", "guidance"], "got layers, guidance"),
        (["--suite", "headroom"], "expected --teacher to be a folder from python -m linvideo.demo.train_teacher"),
    ],
)
def test_the_command_says_what_is_wrong(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_the_results_say_which_teacher_it_was(tmp_path):
    folder = tmp_path / "mine"
    shutil.copytree(teacher.FOLDER, folder)
    (folder / METRICS).write_text(json.dumps({"good": 0.8, "minutes": 30}))
    found = describe_teacher(folder)
    weights = load_pipeline(folder).transformer.parameters()
    assert found["name"] == "mine" and found["parameters"] == sum(weight.numel() for weight in weights)
    assert found["good"] == 0.8 and found["minutes"] == 30 and len(found["weights"]) == 16


def test_a_folder_of_another_scale_is_refused(tmp_path, capsys):
    (tmp_path / "request.json").write_text('{"suite": {}}')
    with pytest.raises(ValueError, match="another request"):
        suite.run(TINY, [DEFAULT.name], 1, teacher.FOLDER, tmp_path, 1)


@pytest.mark.full
def test_a_poor_teacher_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "TEACHER_GOOD", 1.01)
    with pytest.raises(ValueError, match="expected a teacher with at least 101% good videos, got 100%"):
        suite.run(TINY, [DEFAULT.name], 1, teacher.FOLDER, tmp_path / "work", 1)


# The report.


def row(setting: str, seed: int, good: float, **more) -> dict:
    figures = {"good": good, "own_state_error": 0.01, "psnr_to_teacher": 20.0, "layers_linear": [0, 1]}
    figures |= {"curve": [[0, 0.02], [1.0, 0.01]], "steps": 3, "sensitivity": {"0": 1.0, "1": 2.0, "2": 3.0}}
    return {"setting": setting, "seed": seed} | figures | more


def document(rows: list[dict], time: str = "2026-01-02T03:04:05Z") -> dict:
    environment = {"device": "NVIDIA H200", "packages": {"torch": "2.13.0"}, "commit": "0123", "time": time}
    scale = {"name": "small", "world": "small", "videos": 168, "budget": 200, "batch_size": 8, "selection_steps": 80}
    return {"format": 1, "environment": environment, "suite": scale, "rows": rows}


def test_the_report_shows_mean_and_spread(tmp_path):
    rows = [row("default", 0, 0.9), row("default", 1, 1.0), row("elu", 0, 0.5), row("elu", 1, 0.5, diverged="x")]
    rows.append(row("100.0% linear", 0, 0.1, layers_linear=[0, 1, 2]))
    rows += [row("12.5% linear", 0, 1.0, layers_linear=[0]), row("no L_reg", 0, 0.9)]
    (tmp_path / "a.json").write_text(json.dumps(document(rows)))
    (tmp_path / "older.json").write_text(json.dumps(document([row("default", 0, 0.1)], "2025-01-02T03:04:05Z")))
    files = ablations_report.write(tmp_path, tmp_path / "docs")
    text = files[0].read_text()
    assert "| default | 95.0 ± 7.1 |" in text
    assert "| elu | 50.0 |" in text and "1 of 2 diverged" in text
    assert "10.0 | " in text and "### Target" in text and "### T law" not in text
    names = {path.name for path in files}
    assert {"small-nvidia-h200-target.png", "small-nvidia-h200-layers.svg"} <= names
    assert all(path.stat().st_size for path in files)


def test_saving_keeps_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations_report, "FOLDER", tmp_path)
    first = ablations_report.save([row("default", 0, 0.9)], "small", TINY)
    content = first.read_text()
    assert ablations_report.save([row("default", 0, 0.9)], "small", TINY) == first
    second = ablations_report.save([row("default", 0, 0.8)], "small", TINY)
    assert second != first and first.read_text() == content


def test_the_suite_tunes_before_it_compares(tmp_path, monkeypatch, capsys):
    """The order of the rows, the factors and the report, with rows that are made up in place of runs."""
    good = {0.25: 0.5, 0.5: 0.7, 1.0: 0.6}

    class Rows:
        def __init__(self, *arguments):
            pass

        def teacher_row(self, seed):
            return {"setting": "teacher", "seed": seed, "good": 0.8, "all_right": 0.8}

        def world_row(self, seed):
            return {"setting": "world", "seed": seed, "good": 1.0}

        def row(self, setting, seed, factor=None):
            ahead = 0.05 if setting.name.startswith("ADM") else 0.0
            found = {"setting": setting.name, "seed": seed, "good": good.get(factor, 0.4) + 0.01 * seed + ahead}
            found |= {"layers_linear": [0], "own_state_error": 0.1, "learning_rate": 1e-3 * (factor or 1)}
            return found if factor is None else found | {"rate_factor": factor}

    def in_this_process(make, arguments, rounds, processes):
        bench = make(*arguments)
        yield from (getattr(bench, method)(*rest) for jobs in rounds for method, *rest in jobs)

    monkeypatch.setattr(suite, "Bench", Rows)
    monkeypatch.setattr(suite, "side_by_side", in_this_process)
    names = [DEFAULT.name, "MSE, badly chosen layers", "ADM, small step, badly chosen layers"]
    names += ["lowest sensitivity", "first half"]
    arguments = (SUITES["headroom"], names, 2, teacher.FOLDER, tmp_path / "work", 1)
    rows = suite.run(*arguments)
    tuned = [row for row in rows if row["seed"] == TUNING_SEED]
    assert [row["setting"] for row in tuned[:2]] == ["teacher", "default"] and len(tuned) == 2 + 2 * 3
    counted = [row for row in rows if row["seed"] != TUNING_SEED]
    assert [row.get("rate_factor") for row in counted if row["setting"] in names[1:3]] == [0.5] * 4
    assert rows.index(tuned[-1]) < rows.index(
        next(row for row in rows if row["setting"] == names[1] and row["seed"] == 0)
    )
    assert len(rows) == 4 + len(tuned) + 5 * 2 and suite.run(*arguments) == rows

    monkeypatch.setattr(ablations_report, "FOLDER", tmp_path / "results")
    described = {
        "name": "poor",
        "parameters": 2_000_000,
        "good": 0.8,
        "all_right": 0.8,
        "minutes": 30.0,
        "run": {"steps": 9},
    }
    ablations_report.save(rows, "headroom", SUITES["headroom"], described)
    assert not ablations_report.write(tmp_path / "results", tmp_path)[1:]  # the other page doesn't show it
    (document,) = ablations_report.load(tmp_path / "results")
    assert TUNING_SEED not in {row["seed"] for row in document["rows"]}
    (page,) = headroom_report.write(tmp_path / "results", tmp_path)
    text = page.read_text()
    assert "### Objectives against MSE\n" in text
    assert "| ADM, small step, badly chosen layers | +5.0 ± 0.0 |" in text
    assert "| lowest sensitivities | +0.0 ± 0.0 |" in text
    assert "| poor | steps 9 | 2.0 M |" in text
    assert "5.0e-04" in text
    assert "without guidance" not in text


def test_intervals_are_those_of_student():
    one, other = [0.01, 0.02, 0.03], [0.21, 0.22, 0.23]
    assert headroom_report.deviation([one, [], [0.5]]) == (pytest.approx(0.01), 2)
    assert headroom_report.deviation([one, other]) == (pytest.approx(0.01), 4)  # within the groups
    assert headroom_report.deviation([[0.02], []]) == (0, 0)
    assert headroom_report.with_interval(0.02, 0.01, 0) == "+2.0"
    assert headroom_report.with_interval(0.02, 0.01 / 3**0.5, 2) == "+2.0 ± 2.5"  # 4.303 x 1 / sqrt(3)


def test_differences_between_teachers():
    def document(name: str, ahead: float) -> dict:
        adm = [0.5 + ahead - 0.01, 0.5 + ahead + 0.01]
        good = {"MSE, badly chosen layers": [0.5, 0.5], "ADM, small step, badly chosen layers": adm}
        rows = [
            {"setting": setting, "seed": seed, "good": values[seed]}
            for setting, values in good.items()
            for seed in (0, 1)
        ]
        return {"teacher": {"name": name}, "suite": {"guidance_scale": None}, "rows": rows}

    documents = [document("a", 0.01), document("b", 0.03), document("c", 0.0) | {"rows": []}]
    alone = document("d", 0.0)
    alone["rows"] = [row | {"setting": row["setting"].replace("ADM, small step", "hybrid")} for row in alone["rows"]]
    documents.append(alone)
    table = headroom_report.difference_table(documents, headroom_report.COMPARISONS["Objectives against MSE"])
    assert table[0] == "|  | a | b | d | mean, these teachers | mean, others |"
    # Each seed is 1 point off its mean: a standard deviation of sqrt(2), with 3 degrees of freedom for all cells. The
    # means of the teachers a and b are 1 point off theirs, with 1 degree of freedom.
    assert table[2:] == [
        "| ADM, small step, badly chosen layers | +1.0 ± 3.2 | +3.0 ± 3.2 | - | +2.0 ± 2.3 | +2.0 ± 12.7 |",
        "| hybrid, badly chosen layers | - | - | +0.0 ± 3.2 | +0.0 ± 3.2 | - |",
    ]
    none = documents[2:3]
    assert headroom_report.difference_table(none, headroom_report.COMPARISONS["Objectives against MSE"]) == []
