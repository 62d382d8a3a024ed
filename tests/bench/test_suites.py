"""Every suite runs end to end at a tiny shape, so that the first run on a GPU needs no debugging."""

import itertools
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as bench
from benchmarks import op, peers, results, train_steps, wan, windows
from benchmarks.measure import PASSES, attempt
from benchmarks.shapes import SHAPES, TINY, WAN, WINDOW, Shape
from linvideo.transfer.train_config import TrainConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """suite -> rows of one tiny run, and the folder that it wrote."""
    folder = tmp_path_factory.mktemp("results")
    bench.main(["--tiny", "--suite", "op,block,model,train", "--output_dir", str(folder)])
    documents = results.load(folder)
    return {document["rows"][0]["suite"]: document["rows"] for document in documents}, folder


def test_each_suite_has_a_file_that_fits_the_schema(measured):
    rows, folder = measured
    assert rows.keys() == set(bench.SUITES)
    assert len(list(folder.glob("*.json"))) == len(rows)
    assert not list(folder.glob(".*"))


def test_everything_ran(measured):
    absent = [row for rows in measured[0].values() for row in rows if "absent" in row]
    assert not absent


def test_op_rows(measured):
    rows = measured[0]["op"]
    here = [name for name, peer in peers.PEERS.items() if not peer.cuda_only]
    assert {(row["name"], row["pass"]) for row in rows} == {(name, which) for name in here for which in PASSES}
    assert all(row["gbytes"] > 0 and row["tflops"] > 0 for row in rows)


def test_only_the_peers_that_are_asked_for():
    rows = list(op.rows_of("tiny", torch.float32, "cpu", ["linvideo elu", "RELU", "sdpa Flash"]))
    assert {row["name"] for row in rows} == {"linvideo elu", "linvideo relu", "softmax SDPA flash"}


def test_composed_and_whole_models_have_the_same_counts(measured):
    rows = measured[0]["model"]
    settings = [(row["how"], row["compiled"], row["backend"], row["linear_layers"]) for row in rows]
    kinds = [*(("_native_flash", n) for n in (0, 2, 3)), *((f"{WINDOW}_native_flash", n) for n in (0, 2))]
    expected = [(how, c, *kind) for how in ("composed", "whole") for c in (False, True) for kind in kinds]
    assert sorted(settings) == sorted(expected)


def test_a_composed_forward_is_the_sum_of_its_blocks():
    parts = wan.Parts("tiny", "cpu", torch.float32, TINY)
    times = {"rest": [10.0, 9.0, 12.0], "_native_flash": [5.0, 4.0, 6.0], "linear": [1.0, 0.5, 2.0]}
    times |= {f"{WINDOW}_native_flash": [3.0, 2.0, 4.0]}
    blocks = [{"attention": name, "compiled": True, "ms": ms} for name, ms in times.items()]
    composed = {(row["backend"], row["linear_layers"]): row["ms"] for row in parts.composed_rows(blocks)}
    softmax = {0: [25.0, 21.0, 30.0], 2: [17.0, 14.0, 22.0], 3: [13.0, 10.5, 18.0]}
    windows = {0: [19.0, 15.0, 24.0], 2: [15.0, 12.0, 20.0]}
    expected = {("_native_flash", n): ms for n, ms in softmax.items()}
    assert composed == expected | {(f"{WINDOW}_native_flash", n): ms for n, ms in windows.items()}


def test_models_run_the_layers_that_their_rows_name():
    parts = wan.Parts("tiny", "cpu", torch.float32, TINY)
    outputs = []
    for backend, count, kinds in (
        ("_native_flash", 2, ["linear", "linear", "softmax"]),
        (f"{WINDOW}_native_flash", 0, ["window"] * 3),
        (f"{WINDOW}_native_flash", 2, ["linear", "linear", "window"]),
        ("_native_flash", 3, ["linear"] * 3),
    ):
        assert "ms" in parts.whole_row(backend, count, compiled=False)
        attentions = [block.attn1 for block in parts.model.blocks]
        assert [attn.attention_type for attn in attentions] == kinds
        outputs.append(parts.model(**parts.arguments)[0])
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(outputs, 2))


def test_the_eager_training_step_has_the_same_loss(tmp_path):
    """The two attentions that the train suite compares compute the same."""
    config = TrainConfig(output_dir=str(tmp_path), pretrained_model_name_or_path="tiny", train_batch_size=1)
    norms = []
    for attention in (nullcontext, train_steps.eager_attention):
        step = train_steps.training_step("selective transfer", TINY, config, "cpu", torch.float32)
        with attention():
            norms.append(step())
    assert norms[0] == pytest.approx(norms[1], rel=1e-3) and norms[0] > 0


def test_training_steps(measured):
    rows = measured[0]["train"]
    steps, attentions = {row["step"] for row in rows}, {row["attention"] for row in rows}
    assert steps == {"selective transfer", "ADM"} and attentions == {"fused", "eager"} and len(rows) == 4


def test_the_report_comes_with_it(measured):
    text = (measured[1] / "benchmarks.md").read_text()
    for section in ("### Attention", "### Whole models", "### Blocks", "### Training steps"):
        assert section in text


def test_parts_cover_the_work_once():
    whole = [name for name, _ in bench.jobs(list(bench.SUITES), None, torch.bfloat16, "cuda", False)]
    parts = [whole[i::3] for i in range(3)]
    assert sorted(sum(parts, [])) == sorted(whole) and len(set(whole)) == len(whole)
    models = [f"block+model {name}{mode}" for name in WAN for mode in ("", ", compiled")]
    assert [name for name in whole if name.startswith("block+model")] == models
    assert "train 1.3b-480p" in whole and "op wan2.1-14b-720p" in whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "ops"], "expected --suite to be a list of op, block, model, train, got ops"),
        (["--suite", "block"], "expected a CUDA GPU for --suite block, found none"),
        (["--part", "3/2"], "expected --part i/n with 1 <= i <= n, got 3/2"),
        (["--part", "half"], "expected --part i/n with 1 <= i <= n, got half"),
        (["--tiny", "--part", "2/2"], "nothing to measure"),
        (["--peers", "hedgehog", "flesh"], "expected --peers to be words that are in the names linvideo hedgehog"),
    ],
)
def test_bad_arguments(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        bench.main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_time_limit_begins_no_further_row(tmp_path, capsys):
    def job():
        for number in range(3):
            time.sleep(0.1)
            yield {"suite": "train", "model": str(number), "dtype": "x", "step": "x", "attention": "x", "ms": [1.0] * 3}

    environment = dict.fromkeys(results.ENVIRONMENT) | {"device": "x", "time": "2026-01-02T03:04:05Z"}
    (path,) = bench.run([("one", job), ("two", job), ("three", job)], environment, tmp_path, 0.45)
    assert 4 <= len(results.read(path)["rows"]) <= 5
    assert "stopped at the time limit in: two, three" in capsys.readouterr().out


def test_a_job_that_fails_does_not_end_the_others(tmp_path, capsys):
    row = {"suite": "train", "model": "m", "dtype": "x", "step": "x", "attention": "x", "ms": [1.0] * 3}

    def fails():
        yield row
        raise KeyError("no memory")

    environment = dict.fromkeys(results.ENVIRONMENT) | {"device": "x", "time": "2026-01-02T03:04:05Z"}
    (path,) = bench.run([("one", fails), ("two", lambda: iter([row]))], environment, tmp_path, 9.0)
    assert len(results.read(path)["rows"]) == 2 and "ended by KeyError" in capsys.readouterr().out


def test_a_wrong_result_is_not_timed():
    x = peers.Inputs.random(SHAPES["tiny"], torch.float32, "cpu")
    for name, peer in peers.PEERS.items():
        if not peer.cuda_only:
            op.verify(name, peer.build(x), x)
    for name in ("linvideo hedgehog, RoPE", peers.WINDOW):
        right = peers.PEERS[name].build(x)()
        for wrong in (1.1 * right, right * float("nan")):
            with pytest.raises(ArithmeticError):
                op.verify(name, lambda wrong=wrong: wrong, x)
    (row,) = op._peer_rows("tiny", "linvideo elu", peers.Peer(lambda x: lambda: x.q, "plain"), x)
    assert "relative error" in row["absent"]


def test_a_failed_measurement_is_a_row_with_its_reason():
    def fails():
        raise RuntimeError("No available kernel.\nand more")

    assert attempt({"name": "x"}, fails) == {"name": "x", "absent": "RuntimeError: No available kernel."}


def test_a_run_that_is_killed_keeps_what_it_has(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "--shapes", "cpu-n256", "--output_dir", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    try:
        while not list(tmp_path.glob("*.json")):
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(0.5)
    finally:
        process.kill()
        process.wait()
    (path,) = tmp_path.glob("*.json")
    rows = results.read(path)["rows"]
    assert [(row["name"], row["pass"]) for row in rows[:1]] == [(peers.OURS, "forward")]


def test_costs():
    """The costs of a row agree with a count by hand: 2 N D^2 for each D x D product of N rows."""
    shape = SHAPES["wan2.1-1.3b-480p"]
    rows, products = 32760 * 12, 2 * 128 * 128
    # logits of q and k, two halves of the state, and two of reading it
    assert peers.tflops(shape, "hedgehog", "forward") == pytest.approx(rows * products * (2 + 2 + 2) / 1e12)
    assert peers.tflops(shape, "softmax", "forward") == pytest.approx(rows * 2 * 2 * 32760 * 128 / 1e12)
    assert peers.gbytes(shape, "hedgehog", "forward", 2) == pytest.approx(4 * rows * 128 * 2 / 1e9)
    # 7 chunks of 3 of the 21 frames; the first and the last window are clipped to 4 frames
    share = (2 * 3 * 4 + 5 * 3 * 5) / 21**2
    assert peers.kept(shape, "window") == pytest.approx(share) and peers.kept(shape, "softmax") is None
    softmax, hedgehog, window = (peers.tflops(shape, cost, "backward") for cost in ("softmax", "hedgehog", "window"))
    assert window == pytest.approx(hedgehog + share * softmax)
    for cost in peers.COSTS:
        both = peers.tflops(shape, cost, "forward") + peers.tflops(shape, cost, "backward")
        assert peers.tflops(shape, cost, "forward+backward") == pytest.approx(both)


@pytest.mark.parametrize("shape", [SHAPES["tiny"], Shape(1, 75, 2, 16, frames=7, text=5)])
def test_windows_keep_the_pairs_that_are_counted(shape):
    tokens = torch.arange(shape.tokens)
    near = windows.near(tokens[:, None], tokens, shape)
    assert near.float().mean().item() == pytest.approx(windows.kept(shape))
    x = peers.Inputs.random(shape, torch.float32, "cpu")
    op.verify(peers.WINDOW, peers.PEERS[peers.WINDOW].build(x), x)


def test_the_plan_next_to_a_training_step(tmp_path):
    config = TrainConfig(output_dir=str(tmp_path), train_batch_size=1, mixed_precision="bf16")
    planned = {
        step: train_steps.planned_mib(step, WAN["1.3b-480p"], config)["planned_mib"] for step in train_steps.STEPS
    }
    # 16 bytes per parameter, 2 for the teacher's, and activations
    assert all(18 * 1.42e9 / 2**20 < size < 40_000 for size in planned.values())
    assert planned["selective transfer"] != planned["ADM"] and train_steps.planned_mib("ADM", TINY, config) == {}
