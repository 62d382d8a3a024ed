"""Show all committed ablations as tables and plots.

`python -m benchmarks.ablations.ablations_report` writes docs/results/ablations.md.
"""

import json
import statistics
from dataclasses import asdict
from pathlib import Path

from benchmarks import results
from benchmarks.ablations import ablations_plots
from benchmarks.ablations.settings import (
    CHOICE,
    DEFAULT,
    GROUPS,
    LEARNING,
    RATE,
    SETTINGS,
    TUNING_SEED,
    Suite,
    in_groups,
)
from linvideo.demo.judge import STRAIGHT

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
    ("softmax_pairs", "softmax pairs, %", ".0f", 100),
)
HEAD = f"""# Ablations

This page is written by `python -m benchmarks.ablations.ablations_report` from the files in
[benchmarks/results/ablations](../../benchmarks/results/ablations). [docs/results.md](../results.md) says what follows
from it.

Every setting changes one thing in the default recipe and fine-tunes for the same time. Each table compares the settings
of one group with the teacher and the default. A figure is the mean over seeds ± their standard deviation. The seed
determines all random draws: the trajectories, the minibatches, and the noise and captions of the judged videos.

The columns are:

- **good**, the primary metric, which was fixed before the runs: the share of videos in which every word of the caption
  is right, the motion is straight (within {STRAIGHT} pixels) and the shapes are clean (close to the scene rendered
  again). linvideo/demo/judge.py decides this exactly, by geometry. Higher is better.
- **velocity error**: the mean squared difference between the student's and the teacher's velocities on the student's
  own states (linvideo/evaluation/velocity.py). Lower is better.
- **PSNR**: similarity to the teacher's video from the same noise. Higher is better.
- **straightness**: the distance of the shapes' centres from straight paths. Lower is better.
- **flicker**: the variation of a shape's size and colour over the frames. Lower is better.
- **coverage**: the distance (Wasserstein-1) between the distributions of the shapes' positions and speeds and those of
  the world. It shows lost variety. Lower is better.
- **distance**: the kernel distance to the world's videos, on features of a network trained on the world
  (benchmarks/ablations/distance.py). Lower is better. The judged captions are spread more evenly than random ones, so
  the distance of a perfect model is negative: compare with the teacher's.
- **device-s** and **peak MiB**: the time and memory of fine-tuning; on a CPU these are processor time and the memory of
  the process.
- **steps**: the number of training steps in the fine-tuning.
- **softmax pairs**: the share of all pairs of tokens for which the model still computes softmax attention: 100% in a
  softmax layer, none in a linear layer, and those in the window of a window layer.
- **linear layers**: the layers that became linear, listed once if all seeds agree.
"""
NOTES = {
    "objective": "The objective of fine-tuning, with the layers of the default run. The default is the mean squared"
    " error (MSE) to the teacher's velocities on stored states of the teacher; own states are those of the student's"
    " rollouts. ADM is the paper's objective, DMD is distribution matching with a score network, and a hybrid begins"
    " with MSE and then alternates with ADM.",
    "objective, every second layer": "The same with every second layer linear, which is harder: fine-tuning can't fully"
    ' repair it. The row "every second" has the default\'s objective.',
    "layers": "Which half of the layers becomes linear. The default learns this. The lowest sensitivities are those of"
    " the layers that add the least velocity error when they alone are linear.",
    "selection": "How the layers are learned: the penalties on r, its start and its learning rate.",
    "target": "The share of the layers that becomes linear. The default's share is 50%.",
    "linear branch": "The feature map of linear attention. The default's is hedgehog with a warm-up.",
    "window": "Window layers, which attend with softmax to near frames and linearly to the others (docs/window.md),"
    " and the same layers as linear ones. The name says which layers, the number of frames in a chunk, and the overlap"
    " on either side. All other layers keep softmax. A video has 8 frames, so that a window covers more of it than of a"
    " real video.",
    "t law": "How much each time t counts in training. The default draws t from the sampler's grid.",
    "weights": "Which weights are trained. The default trains all of them.",
    RATE: "The learning rate of fine-tuning. The default's is constant.",
    CHOICE: "Learned layers against those with the lowest sensitivities and the first ones, at half and at three"
    f" quarters of the layers. Longer settings fine-tune {LEARNING} times as long, which takes as long as learning the"
    " layers and then fine-tuning.",
}


def one_line(row: dict) -> str:
    """Describe a row in one line for the terminal."""
    shown = [f"{heading} {row[key] * by:{form}}" for key, heading, form, by in FIGURES[:3] if row.get(key) is not None]
    if "layers_linear" in row:
        shown.append(f"layers {' '.join(map(str, row['layers_linear'] or []))}")
    return f"{row['setting']}, seed {row['seed']}: {', '.join(shown)}{', DIVERGED' if 'diverged' in row else ''}"


def save(rows: list[dict], name: str, suite: Suite, teacher: dict | None = None) -> Path:
    """Write a new file to benchmarks/results/ablations, unless one has the same rows; returns the file.

    Args:
        rows: Rows of the suite.
        name: Name of the suite.
        suite: The suite.
        teacher: Description of the teacher, from `describe_teacher`; None for a suite without headroom.
    """
    document = {"format": 1, "environment": results.environment({}), "suite": {"name": name, **asdict(suite)}}
    if teacher is not None:
        document["teacher"] = teacher
        name = f"{name}-{results.slug(teacher['name'])}"
    return results.keep(document | {"rows": rows}, FOLDER, name)


def load(folder: Path) -> list[dict]:
    """Return the newest result of each world, teacher and device, without the rows of the tuning."""
    documents = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    documents.sort(key=lambda document: document["environment"]["time"])

    def key(document: dict) -> tuple:
        made, suite = document.get("teacher", {}), document["suite"]
        which = suite["world"], suite.get("guidance_scale"), made.get("name"), made.get("weights")
        return *which, document["environment"]["device"]

    newest = {key(document): document for document in documents}.values()
    return [d | {"rows": [row for row in d["rows"] if row["seed"] != TUNING_SEED]} for d in newest]


def write(folder: Path, docs: Path) -> list[Path]:
    """Write ablations.md and its plots, in ablations/, to the folder `docs`; returns the files."""
    lines, files = [HEAD], []
    for document in load(folder):
        if "teacher" in document:  # see headroom_report
            continue
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
        f"These are {len(seeds)} seeds with {suite['videos']} videos each. Selection takes {suite['selection_steps']}"
        f" steps, and fine-tuning the time of {suite['budget']} MSE steps at batch size {suite['batch_size']}."
        f" {results.measured(environment)}\n",
    ]
    always = [row for row in rows if row["setting"] in ("teacher", DEFAULT.name)]
    for group in (group for group in GROUPS if group in NOTES):
        names = in_groups(group)
        chosen = [row for row in rows if row["setting"] in names]
        if chosen:
            lines += [f"### {group.capitalize()}\n", f"{NOTES[group]}\n", *table([*always, *chosen]), ""]
    return lines


def table(rows: list[dict], figures: tuple = FIGURES) -> list[str]:
    by_setting: dict[str, list[dict]] = {}
    for row in rows:
        by_setting.setdefault(row["setting"], []).append(row | {"softmax_pairs": softmax_pairs(row)})
    order = ["world", "teacher", *SETTINGS]
    windows = any(row.get("layers_window") for row in rows)
    figures = [figure for figure in figures if windows or figure[0] != "softmax_pairs"]
    lines = ["| | " + " | ".join(heading for _, heading, _, _ in figures) + " | linear layers |"]
    lines.append("|---|" + "---:|" * len(figures) + "---|")
    for name in sorted(by_setting, key=order.index):
        chosen = by_setting[name]
        cells = [spread([row.get(key) for row in chosen], form, by) for key, _, form, by in figures]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {layers(chosen)} |")
    return lines


def softmax_pairs(row: dict) -> float | None:
    """Return the share of softmax pairs; rows from before window layers have only linear and softmax ones."""
    if "softmax_pairs" in row or not row.get("sensitivity"):
        return row.get("softmax_pairs")
    return 1 - len(row["layers_linear"]) / len(row["sensitivity"])


def spread(values: list[float | None], form: str, by: float) -> str:
    """Return the mean ± standard deviation of the values that aren't None."""
    there = [by * value for value in values if value is not None]
    if not there:
        return ""
    mean = f"{statistics.fmean(there):{form}}"
    return mean if len(set(there)) == 1 else f"{mean} ± {statistics.stdev(there):{form}}"


def layers(rows: list[dict]) -> str:
    """Return the linear layers, once if the seeds agree, and the number of runs that diverged."""
    chosen = dict.fromkeys(" ".join(map(str, row["layers_linear"])) for row in rows if row.get("layers_linear"))
    diverged = sum("diverged" in row for row in rows)
    return "; ".join([*chosen, *([f"{diverged} of {len(rows)} diverged"] if diverged else [])])


if __name__ == "__main__":
    print("\n".join(f"wrote {path}" for path in write(FOLDER, DOCS)))
