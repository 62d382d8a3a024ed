"""A summary of `make evidence` on one screen: what passed, what failed and why, the ratios and the targets."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from benchmarks import results
from benchmarks.peers import OURS, is_exact_softmax
from benchmarks.shapes import WINDOW

FILE = "summary.md"
PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
PASSES = ("forward", "backward", "forward+backward")
# (label, shape and pass of the row, word in the card's name -> largest median in milliseconds)
LIMITS = [
    ("op forward, Wan 1.3B 480p", ("wan2.1-1.3b-480p", "forward"), {"H200": 0.20, "H100": 0.27}),
    ("op forward + backward, Wan 1.3B 480p", ("wan2.1-1.3b-480p", "forward+backward"), {"H200": 0.75, "H100": 1.0}),
]
RATIOS = [("wan2.1-1.3b-480p", 40), ("wan2.1-14b-720p", 90)]  # shape, speed-up over the fastest softmax, forward
# model, linear layers, whether the others are window layers, predicted speed-up over the fastest dense model. The
# predictions assume FlashAttention-3's rate and windows that keep 19% of the pairs; the default window keeps 22%.
MODELS = [
    ("1.3b-480p", 16, False, 1.28),
    ("14b-720p", 22, False, 1.45),
    ("1.3b-480p", 0, True, 1.50),
    ("14b-720p", 0, True, 1.84),
    ("1.3b-480p", 16, True, 1.61),
    ("14b-720p", 22, True, 2.06),
]


def write(folder: Path) -> Path:
    """Write summary.md from everything in the folder."""
    lines = ["# Evidence", ""]
    documents = results.load(folder)
    for document in documents:
        environment = document["environment"]
        rates = next(iter(environment["rates"].values()))
        lines.append(
            f"- {environment['device']}, {environment['time']}, commit {results.short_commit(environment)}: "
            f"{results.versions(environment)}; copy {rates['copy_gb_s']:,.0f} GB/s,"
            f" matmul {rates['matmul_tflop_s']:,.3g} TFLOP/s"
        )
    lines += ["", *_tests(folder)]
    pairs = [(row, document["environment"]) for document in documents for row in document["rows"]]
    rows = {results.key(row): row for row, _ in pairs if "ms" in row}
    by_suite = {suite: [row for row in rows.values() if row["suite"] == suite] for suite in results.COLUMNS}
    lines += _ops(by_suite["op"]) + _kernels(by_suite["kernel"]) + _tiles(by_suite["tile"])
    lines += _models(by_suite["block"], by_suite["model"]) + _training(by_suite["train"])
    lines += _targets(by_suite, documents[-1]["environment"]["device"] if documents else "")
    absent = {results.key(row): row["absent"] for row, _ in pairs if "absent" in row and results.key(row) not in rows}
    lines += [f"- absent: {' '.join(map(str, key[1:]))}: {why}" for key, why in absent.items()]
    path = folder / FILE
    path.write_text("\n".join(lines) + "\n")
    return path


def outcomes(folder: Path) -> dict[str, str]:
    """Return the outcome of each test, by pytest's name for it: PASSED if it ever passed, else its last one."""
    found: dict[str, str] = {}
    for test, outcome, _ in _cases(folder):
        if found.get(test) != PASSED:
            found[test] = outcome
    return found


def failures(folder: Path) -> int:
    """Return the number of tests that failed and never passed."""
    return sum(outcome == FAILED for outcome in outcomes(folder).values())


def _cases(folder: Path):
    """Yield (test, outcome, first line of the reason) of all runs, the oldest first."""
    paths = sorted(folder.glob("correct-*.xml"), key=lambda path: int(re.sub(r"\D", "", path.stem)))
    for path in paths:
        try:
            root = ElementTree.parse(path).getroot()
        except ElementTree.ParseError:  # the run was killed while writing it
            continue
        for case in root.iter("testcase"):
            test = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
            details = [child for child in case if child.tag in ("failure", "error", "skipped")]
            if not details:
                yield test, PASSED, ""
            else:
                why = (details[0].get("message") or details[0].text or "").strip().splitlines() or [""]
                yield test, SKIPPED if details[0].tag == "skipped" else FAILED, why[0][:160]


def _tests(folder: Path) -> list[str]:
    found, why = outcomes(folder), {test: reason for test, _, reason in _cases(folder)}
    counts = {kind: sum(outcome == kind for outcome in found.values()) for kind in (PASSED, FAILED, SKIPPED)}
    lines = [f"**Tests**: {', '.join(f'{count:,} {kind}' for kind, count in counts.items())}", ""]
    failed = [test for test, outcome in found.items() if outcome == FAILED]
    lines += [f"- FAILED {test}: {why[test]}" for test in failed[:20]]
    return [*lines, f"- and {len(failed) - 20} more", ""] if len(failed) > 20 else [*lines, ""]


def _ops(rows: list[dict]) -> list[str]:
    lines = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        times = {(row["name"], row["pass"]): row["ms"][0] for row in rows if row["shape"] == shape}
        lines += [f"**{shape}**, ms: forward / backward / both, and the forward over that of {OURS}", ""]
        shares = {row["name"]: row["kept"] for row in rows if row["shape"] == shape and "kept" in row}
        for name in dict.fromkeys(name for name, _ in times):
            shown = " / ".join(_digits(times[name, which]) for which in PASSES if (name, which) in times)
            ours, theirs = times.get((OURS, "forward")), times.get((name, "forward"))
            ratio = f", {theirs / ours:.2f}x" if ours and theirs and name != OURS else ""
            share = f" ({shares[name]:.0%} of pairs)" if name in shares else ""
            lines.append(f"- {name}{share}: {shown}{ratio}")
        lines.append("")
    return lines


def _kernels(rows: list[dict]) -> list[str]:
    lines = []
    for name in dict.fromkeys(row["name"] for row in rows):
        chosen = sorted((row for row in rows if row["name"] == name), key=lambda row: row["position"])
        launches = ", ".join(f"{row['kernel'][:40]} {1000 * row['ms'][0]:.1f}" for row in chosen)
        lines += [f"**Launches of {name}**, forward and backward at {chosen[0]['shape']}, us: {launches}", ""]
    return lines


def _tiles(rows: list[dict]) -> list[str]:
    lines = []
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        chosen = [row for row in rows if row["kernel"] == kernel]
        shown = ", ".join(f"{row['tile']}{' (shipped)' * row['shipped']} {_digits(row['ms'][0])}" for row in chosen)
        lines.append(f"- tiles of {kernel}, ms of the function that launches it: {shown}")
    return [*lines, ""] if lines else []


def _models(blocks: list[dict], models: list[dict]) -> list[str]:
    lines = []
    for row in blocks:
        mode = "compiled" if row["compiled"] else "eager"
        lines.append(f"- block of Wan {row['model']}, {row['attention']}, {mode}: {_digits(row['ms'][0])} ms")
    for row in models:
        dense = _dense(models, row)
        if row["how"] == "whole" and dense:
            mode = "compiled" if row["compiled"] else "eager"
            lines.append(
                f"- Wan {row['model']}, {row['linear_layers']} of {row['layers']} linear"
                f"{', the others window' * _has_windows(row)}, {mode}: "
                f"{_digits(row['ms'][0])} ms, {dense / row['ms'][0]:.2f}x"
            )
    return [*lines, ""] if lines else []


def _dense(models: list[dict], row: dict) -> float | None:
    """Return the time of the fastest dense forward of the same model, timed in the same way."""
    same = ("model", "dtype", "compiled", "how")
    chosen = [x for x in models if x["linear_layers"] == 0 and not _has_windows(x)]
    chosen = [x for x in chosen if all(x[key] == row[key] for key in same)]
    return min((x["ms"][0] for x in chosen if x["backend"] != "sage"), default=None)


def _has_windows(row: dict) -> bool:
    return row["backend"].startswith(WINDOW)


def _training(rows: list[dict]) -> list[str]:
    lines = []
    for row in rows:
        memory = f", {row['held_mib'] + row['peak_mib']:,.0f} MiB" if "peak_mib" in row else ""
        planned = f" (planned {row['planned_mib']:,.0f})" if "planned_mib" in row else ""
        lines.append(f"- {row['step']}, {row['attention']}: {_digits(row['ms'][0])} ms{memory}{planned}")
    return [*lines, ""] if lines else []


def _targets(by_suite: dict[str, list[dict]], device: str) -> list[str]:
    lines = []
    ops = {(row["shape"], row["name"], row["pass"]): row["ms"][0] for row in by_suite["op"]}
    for what, (shape, which), limits in LIMITS:
        limit = next((ms for word, ms in limits.items() if word in device), None)
        if limit and (ms := ops.get((shape, OURS, which))):
            lines.append(_target(what, f"{ms:.3f} ms", ms <= limit, f"<= {limit} ms"))
    for shape, factor in RATIOS:
        softmax = [
            ms for (where, name, which), ms in ops.items()
            if where == shape and which == "forward" and is_exact_softmax(name)
        ]  # fmt: skip
        if softmax and (ours := ops.get((shape, OURS, "forward"))):
            ratio = min(softmax) / ours
            lines.append(
                _target(f"op over the fastest softmax, {shape}", f"{ratio:.1f}x", ratio >= factor, f">= {factor}x")
            )
    for name, count, windows, factor in MODELS:
        chosen = [row for row in by_suite["model"] if row["model"] == name and row["linear_layers"] == count]
        chosen = [row for row in chosen if _has_windows(row) == windows]
        for row in chosen:
            # A partly linear model keeps the fastest backend for its softmax layers.
            dense = _dense(by_suite["model"], row)
            same = [x["ms"][0] for x in chosen if x["how"] == row["how"] and x["compiled"] == row["compiled"]]
            if dense and row["ms"][0] == min(same):
                mode = f"{row['how']}, {'compiled' if row['compiled'] else 'eager'}"
                what = f"Wan {name}, {count} linear layers{', the others window' * windows}, {mode}"
                lines.append(_target(what, f"{dense / min(same):.2f}x", dense / min(same) >= factor, f">= {factor}x"))
    return ["**Targets**", "", *lines, ""] if lines else []


def _target(what: str, value: str, is_met: bool, wanted: str) -> str:
    return f"- {'met' if is_met else 'MISSED'}: {what} {value} (target {wanted})"


def _digits(ms: float) -> str:
    return f"{ms:,.3f}" if ms < 10 else f"{ms:,.1f}"
