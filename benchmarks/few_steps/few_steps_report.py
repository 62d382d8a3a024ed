"""Show all committed few-step results as tables.

`python -m benchmarks.few_steps.few_steps_report` writes docs/results/few_steps.md.
"""

import json
from pathlib import Path

from benchmarks import results
from benchmarks.ablations.ablations_report import layers, spread
from benchmarks.few_steps.few_steps_bench import FULL, NOTES, STEPS, Scale

FOLDER = results.FOLDER / "few_steps"
DOCS = Path(__file__).parents[2] / "docs" / "results"
# key, heading, format, factor
FIGURES = (
    ("good", "good, %", ".1f", 100),
    ("all_right", "all words right, %", ".1f", 100),
    ("coverage", "coverage", ".2f", 1),
    ("straightness_px", "straightness, px", ".3f", 1),
    ("flicker", "flicker", ".4f", 1),
    ("rerender_error", "re-render error", ".4f", 1),
    ("distance", "distance x 1000", ".0f", 1000),
    ("psnr_to_teacher", "PSNR, dB", ".2f", 1),
)
HEAD = """# Few steps

This page is written by `python -m benchmarks.few_steps.few_steps_report` from the files in
[benchmarks/results/few_steps](../../benchmarks/results/few_steps). [docs/results.md](../results.md) says what follows
from it.

Each table compares models that sample in the same number of steps. A figure is the mean over seeds ± their standard
deviation. The seed determines all random draws.

[ablations.md](ablations.md) explains most of the columns. In short:

- **good** is the primary metric: the share of videos in which every word of the caption is right, the motion is
  straight and the shapes are clean. Higher is better.
- **all words right** is the share of videos in which every word of the caption is right. Higher is better.
- **coverage** shows whether a model still makes everything that its teacher makes. Lower is better.
- **straightness**, **flicker** and **distance** measure faults of the videos. Lower is better.
- **re-render error** is the squared error between a video and the scene found in it, rendered again. Lower is better.
- **PSNR** compares with the teacher's video at its full number of steps from the same noise. Higher is better.
  Students of more than one step draw noise of their own, which costs them PSNR.
- The last column has the linear layers of the converted model, which its students share.

The models are:
"""


def one_line(row: dict) -> str:
    """Describe a row in one line for the terminal."""
    shown = [f"{heading} {row[key] * by:{form}}" for key, heading, form, by in FIGURES[:3] if row.get(key) is not None]
    return f"{row['model']}, {row['steps']} steps, seed {row['seed']}: {', '.join(shown)}"


def save(rows: list[dict], world: str, scale: Scale) -> Path:
    """Write a new file to benchmarks/results/few_steps, unless one has the same rows; returns the file."""
    environment = results.environment({})
    document = {"format": 1, "environment": environment, "world": world, "scale": scale.numbers, "rows": rows}
    return results.keep(document, FOLDER, world)


def write(folder: Path, docs: Path) -> Path:
    """Write few_steps.md to the folder `docs` from the newest result of each world and device; returns the file."""
    documents = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    documents.sort(key=lambda document: document["environment"]["time"])
    newest = {(d["world"], d["environment"]["device"]): d for d in documents}
    lines = [HEAD, *(f"- **{name}**: {note}." for name, note in NOTES.items()), ""]
    for document in newest.values():
        lines += section(document)
    target = docs / "few_steps.md"
    target.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return target


def section(document: dict) -> list[str]:
    environment, scale, rows = document["environment"], document["scale"], document["rows"]
    lines = [
        f"## World {document['world']}: {environment['device']}\n",
        f"These are {len({row['seed'] for row in rows})} seeds with {scale['transfer']['videos']} videos each."
        f" Regression takes {scale['regression_steps']} steps, and distribution matching {scale['dmd_steps']}, of which"
        f" every fifth trains the student. The batch size is {scale['transfer']['batch_size']}."
        f" {results.measured(environment)}\n",
    ]
    for steps in (FULL, *STEPS):
        chosen = [row for row in rows if row["steps"] == steps]
        if chosen:
            heading = "full number of steps" if steps == FULL else f"{steps} step{'s' * (steps > 1)}"
            models = "The teacher and the converted model, sampled in the teacher's"
            note = f"{models if steps == FULL else 'All models, sampled in'} {heading}."
            lines += [f"### {heading.capitalize()}\n", f"{note}\n", *table(chosen), ""]
    return lines


def table(rows: list[dict]) -> list[str]:
    lines = ["| | " + " | ".join(heading for _, heading, _, _ in FIGURES) + " | |", "|---|" + "---:|" * len(FIGURES)]
    lines[1] += "---|"
    for name in (name for name in NOTES if any(row["model"] == name for row in rows)):
        chosen = [row for row in rows if row["model"] == name]
        cells = [spread([row.get(key) for row in chosen], form, by) for key, _, form, by in FIGURES]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {layers(chosen)} |")
    return lines


if __name__ == "__main__":
    print(f"wrote {write(FOLDER, DOCS)}")
