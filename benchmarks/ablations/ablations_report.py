"""All committed ablations as tables and plots;
`python -m benchmarks.ablations.ablations_report` writes docs/results/ablations.md."""

import json
import statistics
from dataclasses import asdict
from pathlib import Path

from benchmarks import results
from benchmarks.ablations import ablations_plots
from benchmarks.ablations.settings import DEFAULT, GROUPS, SETTINGS, Suite

FOLDER = results.FOLDER / "ablations"
DOCS = Path(__file__).parents[2] / "docs" / "results"
# key, heading, format, factor
FIGURES = (
    ("good", "good, %", ".1f", 100),
    ("own_state_error", "velocity error x 1000", ".2f", 1000),
    ("psnr_to_teacher", "PSNR, dB", ".2f", 1),
    ("straightness_px", "straightness, px", ".3f", 1),
    ("flicker", "flicker", ".4f", 1),
    ("coverage", "coverage", ".2f", 1),
    ("distance", "distance x 1000", ".0f", 1000),
    ("device_seconds", "device-s", ".0f", 1),
    ("peak_mib", "peak MiB", ".0f", 1),
    ("steps", "steps", ".0f", 1),
)
HEAD = """# Ablations

Made by `python -m benchmarks.ablations.ablations_report` from benchmarks/results/ablations; what follows from it is in
[docs/results.md](../results.md). Every setting changes one thing of the default recipe and fine-tunes for the same
time: the column "steps" shows how many steps that were. Figures are the mean over seeds ± their standard deviation. A
seed decides everything drawn: trajectories, minibatches, the noise and captions of the judged videos.

- **good**, the primary metric, fixed before the runs: every word of the caption right, motion straight, shapes clean,
  judged exactly.
- velocity error: against the teacher on the student's own states (linvideo/evaluation/velocity.py).
- PSNR: to the teacher's video from the same noise. straightness, flicker, coverage: linvideo/demo/judge.py; lower is
  better.
- distance: kernel distance to the world's videos on features of a network trained on the world
  (benchmarks/ablations/distance.py). The judged captions are spread more evenly than random ones, which makes it
  negative for a perfect model: the teacher's value is the one to compare with.
- device-s, peak MiB: of fine-tuning; processor time and the process's memory on a CPU.
"""


def one_line(row: dict) -> str:
    """A row for the terminal."""
    shown = [f"{heading} {row[key] * by:{form}}" for key, heading, form, by in FIGURES[:3] if row.get(key) is not None]
    if "layers_linear" in row:
        shown.append(f"layers {' '.join(map(str, row['layers_linear'] or []))}")
    return f"{row['setting']}, seed {row['seed']}: {', '.join(shown)}{', DIVERGED' if 'diverged' in row else ''}"


def save(rows: list[dict], name: str, suite: Suite) -> Path:
    """A new file benchmarks/results/ablations/<device>-<date>-<suite>.json; the one that is there, if it holds the same
    rows."""
    scale = {"name": name, **asdict(suite)}
    document = {"format": 1, "environment": results.environment({}), "suite": scale, "rows": rows}
    return results.keep(document, FOLDER, name)


def load(folder: Path) -> list[dict]:
    """The newest result of each world and device."""
    documents = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    documents.sort(key=lambda document: document["environment"]["time"])
    newest = {(d["suite"]["world"], d["environment"]["device"]): d for d in documents}
    return list(newest.values())


def write(folder: Path, docs: Path) -> list[Path]:
    """ablations.md and its plots in ablations/, both in the folder `docs`; returns the files."""
    lines, files = [HEAD], []
    for document in load(folder):
        made = ablations_plots.draw(document, docs / "ablations")
        files += [path for path, _ in made]
        lines += section(document)
        lines += [f"![{title}](ablations/{path.name})\n" for path, title in made if path.suffix == ".png"]
    target = docs / "ablations.md"
    target.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return [target, *files]


def section(document: dict) -> list[str]:
    suite, environment, rows = document["suite"], document["environment"], document["rows"]
    seeds = sorted({row["seed"] for row in rows})
    lines = [
        f"## World {suite['world']}: {environment['device']}\n",
        f"{len(seeds)} seeds, {suite['videos']} videos each, fine-tuning for the time of {suite['budget']} MSE steps of"
        f" batch {suite['batch_size']}, {suite['selection_steps']} steps of selection. {environment['time'][:10]},"
        f" {results.versions(environment)}, commit {(environment['commit'] or 'unknown')[:12]}.\n",
    ]
    always = [row for row in rows if row["setting"] in ("teacher", DEFAULT.name)]
    for group in GROUPS:
        names = [name for name, setting in SETTINGS.items() if group in setting.groups]
        chosen = [row for row in rows if row["setting"] in names]
        if group != DEFAULT.groups[0] and chosen:
            lines += [f"### {group.capitalize()}\n", *table([*always, *chosen]), ""]
    return lines


def table(rows: list[dict]) -> list[str]:
    by_setting: dict[str, list[dict]] = {}
    for row in rows:
        by_setting.setdefault(row["setting"], []).append(row)
    order = ["teacher", *SETTINGS]
    lines = ["| | " + " | ".join(heading for _, heading, _, _ in FIGURES) + " | linear layers |"]
    lines.append("|---|" + "---:|" * len(FIGURES) + "---|")
    for name in sorted(by_setting, key=order.index):
        chosen = by_setting[name]
        cells = [spread([row.get(key) for row in chosen], form, by) for key, _, form, by in FIGURES]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {layers(chosen)} |")
    return lines


def spread(values: list[float | None], form: str, by: float) -> str:
    """Mean ± standard deviation of what is there."""
    there = [by * value for value in values if value is not None]
    if not there:
        return ""
    mean = f"{statistics.fmean(there):{form}}"
    return mean if len(set(there)) == 1 else f"{mean} ± {statistics.stdev(there):{form}}"


def layers(rows: list[dict]) -> str:
    """The chosen layers, once where the seeds agree; and what went wrong."""
    chosen = dict.fromkeys(" ".join(map(str, row["layers_linear"])) for row in rows if row.get("layers_linear"))
    diverged = sum("diverged" in row for row in rows)
    return "; ".join([*chosen, *([f"{diverged} of {len(rows)} diverged"] if diverged else [])])


if __name__ == "__main__":
    print("\n".join(f"wrote {path}" for path in write(FOLDER, DOCS)))
