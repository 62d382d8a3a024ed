"""All committed few-step results as tables;
`python -m benchmarks.few_steps.few_steps_report` writes docs/results/few_steps.md."""

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

Made by `python -m benchmarks.few_steps.few_steps_report` from benchmarks/results/few_steps; what follows from it is in
[docs/results.md](../results.md). Figures are the mean over seeds ± their standard deviation; a seed decides everything
drawn.
**good**, every word of the caption right, motion straight, shapes clean, is the primary metric; coverage (W1 distance
of positions and speeds to the world's, lower is better) shows whether a model still makes everything that its teacher
makes. The other columns are those of [ablations.md](ablations.md). PSNR is to the teacher's video at its full number of
steps from the same noise; students of more than one step draw noise of their own, which it counts against them.
"""


def one_line(row: dict) -> str:
    """A row for the terminal."""
    shown = [f"{heading} {row[key] * by:{form}}" for key, heading, form, by in FIGURES[:3] if row.get(key) is not None]
    return f"{row['model']}, {row['steps']} steps, seed {row['seed']}: {', '.join(shown)}"


def save(rows: list[dict], world: str, scale: Scale) -> Path:
    """A new file benchmarks/results/few_steps/<device>-<date>-<world>.json; the one that is there, if it holds the same
    rows."""
    environment = results.environment({})
    document = {"format": 1, "environment": environment, "world": world, "scale": scale.numbers, "rows": rows}
    return results.keep(document, FOLDER, world)


def write(folder: Path, docs: Path) -> Path:
    """few_steps.md in the folder `docs`, of the newest result of each world and device."""
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
        f"{len({row['seed'] for row in rows})} seeds, {scale['transfer']['videos']} videos each; regression of"
        f" {scale['regression_steps']} steps, distribution matching of {scale['dmd_steps']}, every fifth the student's"
        f" turn; batch {scale['transfer']['batch_size']}. {environment['time'][:10]}, {results.versions(environment)},"
        f" commit {(environment['commit'] or 'unknown')[:12]}.\n",
    ]
    for steps in (FULL, *STEPS):
        chosen = [row for row in rows if row["steps"] == steps]
        if chosen:
            heading = "full number of steps" if steps == FULL else f"{steps} step{'s' * (steps > 1)}"
            lines += [f"### {heading.capitalize()}\n", *table(chosen), ""]
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
