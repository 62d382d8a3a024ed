"""Result files, the report that is made from them, and the headline of README.md."""

import copy
import os

import pytest

from benchmarks import headline, report, results
from benchmarks.peers import COMPILED, EAGER, OURS
from benchmarks.peers import WINDOW as WINDOW_OP
from benchmarks.shapes import WINDOW

ENVIRONMENT = {
    "device": "NVIDIA H200",
    "driver": "1.2",
    "cuda": "13.0",
    "python": "3.12",
    "packages": {"torch": "2.13.0", "triton": "3.7.1"},
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "time": "2026-01-02T03:04:05Z",
    "rates": {"bfloat16": {"copy_gb_s": 4000.0, "matmul_tflop_s": 700.0}},
}


def op_row(name: str, ms: float, which: str = "forward", shape: str = "n1k", tokens: int = 1024) -> dict:
    row = {"suite": "op", "shape": shape, "dtype": "bfloat16", "name": name, "pass": which}
    return row | {
        "sizes": [1, tokens, 12, 128],
        "ms": [ms, ms, ms],
        "gbytes": 1.0,
        "tflops": 0.7,
        "host_ms": 0.25,
        "held_mib": 5.0,
        "peak_mib": 10.0,
    }


def model_row(count: int, ms: float, how: str = "composed", backend: str = "_native_flash") -> dict:
    row = {
        "suite": "model",
        "model": "1.3b-480p",
        "dtype": "bfloat16",
        "backend": backend,
        "linear_layers": count,
        "how": how,
    }
    return row | {"compiled": False, "tokens": 32760, "layers": 30, "ms": [ms, ms, ms]}


ROWS = [
    op_row(OURS, 1.0),
    op_row(OURS, 2.0, shape="n2k", tokens=2048),
    op_row(EAGER, 3.0),
    op_row(COMPILED, 2.0),
    op_row("softmax SDPA flash", 6.0),
    op_row("softmax SDPA cuDNN", 5.0),
    {k: v for k, v in op_row("softmax flash-attn 3", 1.0).items() if k != "ms"} | {"absent": "ModuleNotFoundError: x"},
    model_row(0, 900.0),
    model_row(16, 600.0),
    model_row(16, 610.0, "whole"),
    model_row(0, 500.0, backend=f"{WINDOW}_native_flash"),
    model_row(16, 450.0, backend=f"{WINDOW}_native_flash"),
    op_row(WINDOW_OP, 4.0) | {"kept": 0.2245},
]


def save(rows: list[dict], environment: dict, folder):
    """Write rows as a run does; returns the file of the first suite."""
    files = {}
    for row in rows:
        files.setdefault(row["suite"], results.ResultFile(environment, folder)).add(row)
    return next(iter(files.values())).path


@pytest.mark.parametrize("links", [True, False])
def test_saved_and_read_again(links, tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError("no hard links here")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / f".op.{os.getpid()}").symlink_to(victim)  # must not be followed: temporary names can't be guessed
    first, second = (save(ROWS[:7], ENVIRONMENT, tmp_path) for _ in range(2))
    assert first.name == "h200-2026-01-02-op.json" and second.name == "h200-2026-01-02-op-2.json"
    assert [document["rows"] for document in results.load(tmp_path)] == [ROWS[:7]] * 2
    assert victim.read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format=0), "expected format 1, got 0"),
        (lambda d: d["environment"].pop("commit"), "expected the environment to have commit"),
        (lambda d: d["rows"].clear(), "expected at least one row, got none"),
        (lambda d: d["rows"][0].update(suite="x"), "suite to be one of op, block, model, train, kernel, tile, got 'x'"),
        (lambda d: d["rows"][0].pop("ms"), "either ms or absent"),
        (lambda d: d["rows"][0].update(absent="why"), "either ms or absent"),
        (lambda d: d["rows"][0].pop("pass"), "expected the keys shape, dtype, name, pass"),
        (lambda d: d["rows"][0].update(colour="red"), "expected the keys shape, dtype, name, pass"),
        (lambda d: d["rows"][0].update(ms=[1.0, float("nan"), 1.0]), "expected ms to be three positive numbers"),
    ],
)
def test_schema(change, message):
    document = {"format": 1, "environment": copy.deepcopy(ENVIRONMENT), "rows": copy.deepcopy(ROWS)}
    results.check(document)
    change(document)
    with pytest.raises(ValueError, match=message):
        results.check(document)


def test_a_file_that_is_not_ours_is_named(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match="x.json"):
        results.load(tmp_path)


def test_committed_results_fit_the_schema():
    assert results.load()


def write(folder, docs):
    return report.write(report.newest_rows(folder), docs)


def line_of(text: str, *starts: str) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith("| " + " | ".join(starts) + " |")]
    return line


def test_tables_hold_the_figures(tmp_path):
    save(ROWS, ENVIRONMENT, tmp_path)
    written = write(tmp_path, tmp_path / "docs")
    text = written[0].read_text()
    ours = line_of(text.split("**n2k**")[0], OURS)
    assert "1.000 (1.000–1.000)" in ours and "1,000 (25%)" in ours and "700 (100%)" in ours
    assert ours.endswith(
        "| 10 | 0.25 | 5.00 | 3.00 | 2.00 |"
    )  # memory, host, ratios; cuDNN is the fastest softmax that ran
    assert "absent: softmax flash-attn 3, forward (ModuleNotFoundError: x)" in text
    linear = line_of(text, "SDPA flash (FlashAttention-2)", "eager", "16")
    assert "1.50x" in linear and "610.0" in linear and "| 60 |" in linear
    for count, speed_up in (("0", "1.80x"), ("16", "2.00x")):  # over softmax in all layers
        assert speed_up in line_of(text, "window, SDPA flash (FlashAttention-2)", "eager", count)
    assert line_of(text, f"{WINDOW_OP} (22% of pairs)").endswith("| 1.25 | 0.75 | 0.50 |")
    assert "paper" in text and "1.43x" in text
    assert "commit 0123456789ab, driver 1.2: torch 2.13.0, triton 3.7.1" in text


def test_the_newest_figure_counts(tmp_path):
    save(ROWS, ENVIRONMENT, tmp_path)
    save([op_row(OURS, 0.5)], ENVIRONMENT | {"time": "2026-01-03T03:04:05Z"}, tmp_path)
    text = write(tmp_path, tmp_path / "docs")[0].read_text()
    assert "0.500 (0.500–0.500)" in line_of(text.split("**n2k**")[0], OURS)


def test_an_older_figure_outlives_an_absence(tmp_path):
    later = ENVIRONMENT | {"time": "2026-01-03T03:04:05Z", "commit": "f" * 40}
    save(ROWS, ENVIRONMENT, tmp_path)
    absent = {k: v for k, v in op_row("softmax SDPA cuDNN", 1.0).items() if k != "ms"} | {"absent": "no cuDNN"}
    save([absent, op_row(OURS, 0.5)], later, tmp_path)
    table = write(tmp_path, tmp_path / "docs")[0].read_text().split("**n2k**")[0]
    assert "5.000 (5.000–5.000)" in line_of(table, "softmax SDPA cuDNN") and "no cuDNN" not in table
    assert line_of(table, OURS).endswith("| 10.00 | 6.00 | 4.00 |")
    assert f"measured 2026-01-03T03:04:05Z, commit {'f' * 12}: {OURS}" in table and "commit 0123456789ab: " in table


def test_runs_of_one_day_are_in_order(tmp_path):
    for hour in range(12):
        save([op_row(OURS, 1.0 + hour)], ENVIRONMENT | {"time": f"2026-01-02T{hour:02d}:00:00Z"}, tmp_path)
    assert [d["rows"][0]["ms"][0] for d in results.load(tmp_path)] == [1.0 + hour for hour in range(12)]


def test_the_same_results_give_the_same_files(tmp_path):
    save(ROWS, ENVIRONMENT, tmp_path)
    first = {path.name: path.read_bytes() for path in write(tmp_path, tmp_path / "a")}
    second = {path.name: path.read_bytes() for path in write(tmp_path, tmp_path / "b")}
    assert first == second
    assert {name.rpartition(".")[2] for name in first} == {"md", "png", "svg"} and len(first) == 5


def test_no_results_yet(tmp_path):
    assert "Nothing has been measured yet" in write(tmp_path, tmp_path / "docs")[0].read_text()


# The headline of README.md.

BEFORE, AFTER = "# Title\r\n\n", "\n\nThe rest.\n"
BLOCK = f"{headline.BEGIN}\nwhat a former run wrote\n{headline.END}"


@pytest.fixture
def readme(tmp_path, monkeypatch):
    path = tmp_path / "README.md"
    path.write_bytes(f"{BEFORE}{BLOCK}{AFTER}".encode())
    monkeypatch.setattr(report, "README", path)
    monkeypatch.setattr(report, "DOCS", tmp_path / "docs")
    return path


def block_of(readme) -> str:
    """Return what stands between the comments, after checking that the rest is unchanged."""
    text = readme.read_bytes().decode()
    assert text.startswith(f"{BEFORE}{headline.BEGIN}\n") and text.endswith(f"\n{headline.END}{AFTER}")
    return text.removeprefix(f"{BEFORE}{headline.BEGIN}\n").removesuffix(f"\n{headline.END}{AFTER}")


def test_the_headline_compares_with_the_fastest_exact_softmax(readme, tmp_path):
    rows, shape = [], "wan2.1-1.3b-480p"
    for name, ms in ((OURS, 0.25), ("softmax SDPA flash", 8.0), ("softmax SageAttention (8 bit, forward)", 1.0)):
        rows.append(op_row(name, ms, shape=shape))
    rows += [
        op_row(OURS, 1.0, "forward+backward", shape),
        op_row("softmax SDPA flash", 30.0, "forward+backward", shape),
    ]
    rows += [op_row("softmax flash-attn 3", 7.0, shape=shape), op_row(OURS, 1.0), op_row("softmax flash-attn 3", 2.0)]
    rows += [model_row(0, 900.0), model_row(16, 600.0), model_row(0, 910.0, "whole"), model_row(16, 650.0, "whole")]
    rows += [model_row(16, 1.0, "whole", "sage"), model_row(16, 500.0, "whole", f"{WINDOW}_native_flash")]
    rows += [model_row(0, 550.0, "whole", f"{WINDOW}_native_flash")]
    save(rows, ENVIRONMENT, tmp_path / "results")
    older = ENVIRONMENT | {"device": "NVIDIA H100", "time": "2026-01-01T00:00:00Z"}
    save([op_row(OURS, 0.5, shape=shape), op_row("softmax SDPA flash", 9.0, shape=shape)], older, tmp_path / "results")
    headline.fill(readme, report.newest_rows(tmp_path / "results"))
    lines = block_of(readme).splitlines()
    assert lines[2:-2] == [
        "| attention of Wan 1.3B at 480p, forward | 0.25 | 7 (flash-attn 3) | 28x |",
        "| attention of Wan 1.3B at 480p, forward+backward | 1 | 30 (SDPA flash) | 30x |",
        "| forward of Wan 1.3B at 480p, 16 of 30 layers linear | 650 | 910 (SDPA flash) | 1.4x |",
        "| forward of Wan 1.3B at 480p, 16 of 30 layers linear, the others window | 500 | 910 (SDPA flash) | 1.82x |",
    ]
    assert "one NVIDIA H200 in bfloat16" in lines[-1] and "driver 1.2: torch 2.13.0, triton 3.7.1" in lines[-1]
    assert "H100" not in block_of(readme)


def test_without_figures_of_a_gpu_the_headline_says_so(readme, tmp_path):
    on_cpu = ENVIRONMENT | {"device": "CPU", "cuda": None}
    save([op_row(OURS, 0.25), op_row("softmax SDPA flash", 8.0)], on_cpu, tmp_path / "results")
    headline.fill(readme, report.newest_rows(tmp_path / "results"))
    assert block_of(readme) == headline.NOT_YET


@pytest.mark.parametrize("text", ["", BLOCK.removesuffix(headline.END), BLOCK * 2, headline.END + headline.BEGIN])
def test_a_readme_without_a_place_for_the_headline_stays_as_it_is(text, readme, tmp_path, capsys):
    readme.write_text(text)
    with pytest.raises(SystemExit) as stop:
        report.main(["--results", str(tmp_path / "results")])
    assert stop.value.code == 2 and "expected the lines" in capsys.readouterr().err
    assert readme.read_text() == text and (tmp_path / "docs" / "benchmarks.md").is_file()


def test_the_report_fills_the_headline(readme, tmp_path):
    report.main(["--results", str(tmp_path / "none")])
    assert block_of(readme) == headline.NOT_YET


def test_the_headline_of_the_readme_is_that_of_the_committed_results():
    text = report.README.read_text()
    block = headline.block(report.newest_rows(results.FOLDER))
    assert f"{headline.BEGIN}\n{block}\n{headline.END}" in text, "run python -m benchmarks.report"
