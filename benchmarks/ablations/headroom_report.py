"""Compare the objectives over teachers that leave something to gain, and the rules that choose layers.

`python -m benchmarks.ablations.headroom_report` writes docs/results/headroom.md from the results of the suite headroom.
"""

import math
import statistics
from pathlib import Path

from benchmarks import results
from benchmarks.ablations import ablations_report
from benchmarks.ablations.settings import CHOICE, DEFAULT, LEARNING, LONGER, RATE, SETTINGS, in_groups
from benchmarks.ablations.tuning import FACTORS, LIMITS
from benchmarks.tables import table_head, table_line

OBJECTIVES = ("MSE, own states", "ADM, small step", "ADM, one sampler step", "hybrid")
LAYERS = ("well-chosen layers", "badly chosen layers")
# Tables of differences: their heading -> rows (label, setting, setting that it is compared with).
COMPARISONS = {
    "Objectives against MSE": [
        (f"{name}, {layers}", f"{name}, {layers}", f"MSE, {layers}") for layers in LAYERS for name in OBJECTIVES
    ],
    "ADM with a small step against MSE, both four times as long": [
        (layers, f"ADM, small step, {layers}, {LONGER}", f"MSE, {layers}, {LONGER}")
        for layers in (LAYERS[0], "first half")
    ],
    "Guidance and negative prompts against the default's, badly chosen layers": [
        (name, name, SETTINGS[name].tuned) for name in in_groups("guidance")
    ],
    "Choice of layers against the lowest sensitivities": [
        ("learned r", "default", "lowest sensitivity, longer"),
        ("learned r from 0.5", "r from 0.5", "lowest sensitivity, longer"),
        ("learned r, its learning rate x 3", "learning rate of r x 3", "lowest sensitivity, longer"),
        ("learned r from the sensitivity", "r from the sensitivity", "lowest sensitivity, longer"),
        ("learned r, three quarters linear", "75.0% linear", "75.0% linear, lowest sensitivity, longer"),
        (
            "learned r from the sensitivity, three quarters linear",
            "75.0% linear, r from the sensitivity",
            "75.0% linear, lowest sensitivity, longer",
        ),
    ],
    "Choice of layers against the first layers": [
        ("learned r", "default", "first half, longer"),
        ("learned r from the sensitivity", "r from the sensitivity", "first half, longer"),
        ("lowest sensitivities", "lowest sensitivity", "first half"),
        ("lowest sensitivities, three quarters", "75.0% linear, lowest sensitivity", "75.0% linear, first layers"),
    ],
    "Learning rate against the default's": [(name, name, DEFAULT.name) for name in in_groups(RATE)],
}
# the quantile 0.975 of Student's t by degrees of freedom
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228}
T |= {11: 2.201, 12: 2.179, 13: 2.160, 14: 2.145, 15: 2.131, 16: 2.120, 17: 2.110, 18: 2.101, 19: 2.093, 20: 2.086}
FIGURES = (
    ("learning_rate", "learning rate", ".1e", 1),
    ("good", "good, %", ".1f", 100),
    ("all_right", "all words right, %", ".1f", 100),
    ("straightness_px", "straightness, px", ".3f", 1),
    ("own_state_error", "velocity error x 1000", ".1f", 1000),
    ("psnr_to_teacher", "PSNR, dB", ".1f", 1),
    ("teacher_coverage", "coverage of the teacher's", ".2f", 1),
    ("coverage", "coverage of the world's", ".2f", 1),
    ("teacher_distance", "distance to the teacher's x 1000", ".0f", 1000),
    ("distance", "distance to the world's x 1000", ".0f", 1000),
    ("diversity", "diversity x 1000", ".1f", 1000),
    ("device_seconds", "device-s", ".0f", 1),
    ("steps", "steps", ".0f", 1),
)
RATES = ", ".join(f"{1e-3 * factor:g}" for factor in FACTORS)
HEAD = f"""# Teachers with headroom

This page is written by `python -m benchmarks.ablations.headroom_report` from the files in
[benchmarks/results/ablations](../../benchmarks/results/ablations). [docs/results.md](../results.md#the-objective) says
what follows from it.

On a teacher at 100% good, an objective can't show that it makes better videos than another. These teachers of the small
world leave something to gain. The tables of objectives compare settings that share all stages before fine-tuning and
are fine-tuned for the same time. Each objective has the learning rate that gave it the most good videos on a seed of
its own (TUNING_SEED in benchmarks/ablations/settings.py), which doesn't count; runs of four times the length and with
other trajectories have the same rate. The rates {RATES} were tried and, while the best was the
lowest or the highest one, its half or its double, from {1e-3 * LIMITS[0]:g} to {1e-3 * LIMITS[1]:g}. The choice of
layers is compared at the default rate. In well-chosen layers the half with the lowest sensitivities is linear, in badly
chosen layers every second one. A student whose videos have values that are not finite counts as 0% good and is left out
of the other columns.

In the tables with a row for each setting, a figure is the mean over seeds ± their standard deviation. Besides the
columns of [ablations.md](ablations.md), these tell matching a distribution from seeking its modes:

- **all words right**: a student with more than its teacher has left out what the teacher does wrong.
- **coverage** of the teacher's or the world's: the distance (Wasserstein-1) of positions and speeds to those of the
  teacher's videos from other noise, or to the world's own. Lower is better; the best to expect is in the rows of the
  teacher and of the world.
- **distance** to the teacher's or the world's: the kernel distance to the teacher's videos from other noise, or to the
  world's own. Lower is better; compare with the teacher's row.
- **diversity**: the mean squared difference between two videos with the same caption. A student that seeks modes has
  less than its teacher; so has one whose motion or shapes are blurred.
"""

DIFFERENCES = f"""\
The tables of differences show by how many points one setting has more good videos than another. Each figure is the mean
over seeds, which are paired (same captions, noise and earlier stages), with its 95% interval (Student's t). With three
seeds the spread of one cell says little, so its variance is that of all cells of the table together, each around its
own mean. The last two columns are the mean over teachers with two intervals. The one for these teachers has only the
spread over seeds. The one for other teachers like these comes from how much the teachers of that row differ, and needs
two of them or more. The intervals don't include the choice of the learning rate, and they aren't corrected for the
number of comparisons: of 20, one is expected to miss 0 by chance.

Learned layers are compared with layers chosen by a rule and fine-tuned {LEARNING} times as long, which takes the same
time as learning and then fine-tuning. Rows that compare two rules fine-tune both for the same number of steps. A
teacher named after a processor is made by the same commands as the one without; where a row has both, they count
as two.
"""


def with_interval(mean: float, error: float, freedom: int) -> str:
    """Return a mean of shares or of their differences with its 95% interval, in percent.

    Args:
        mean: Mean.
        error: Its standard error.
        freedom: Degrees of freedom of the standard error; without any there is no interval.
    """
    return f"{100 * mean:+.1f}" + (f" ± {100 * T[min(freedom, max(T))] * error:.1f}" if freedom else "")


def deviation(groups: list[list[float]]) -> tuple[float, int]:
    """Return the standard deviation within groups, from all of them together, and its degrees of freedom."""
    groups = [group for group in groups if group]
    freedom = sum(len(group) - 1 for group in groups)
    squares = sum((value - statistics.fmean(group)) ** 2 for group in groups for value in group)
    return math.sqrt(squares / max(freedom, 1)), freedom


def differences(document: dict, setting: str, base: str) -> list[float]:
    """Return, for each seed that has both settings, how much larger the share of good videos of `setting` is than that
    of `base`."""
    found = {(row["setting"], row["seed"]): row["good"] for row in document["rows"]}
    seeds = sorted({seed for _, seed in found})
    pairs = [((setting, seed), (base, seed)) for seed in seeds]
    return [found[a] - found[b] for a, b in pairs if a in found and b in found]


def difference_table(documents: list[dict], pairs: list[tuple[str, str, str]]) -> list[str]:
    """Return a table of differences of good videos, without teachers and rows that have none; empty if all have none.

    Args:
        documents: Results to compare, one per teacher.
        pairs: Rows of the table: (label, setting, setting that it is compared with).
    """
    documents = [document for document in documents if any(differences(document, *pair) for _, *pair in pairs)]
    if not documents:
        return []
    rows = {label: [differences(document, *pair) for document in documents] for label, *pair in pairs}
    rows = {label: cells for label, cells in rows.items() if any(cells)}
    means = {label: [statistics.fmean(cell) for cell in cells if cell] for label, cells in rows.items()}
    sd, freedom = deviation(sum(rows.values(), []))
    several = len(documents) > 1
    columns = [*map(teacher_name, documents), *(["mean, these teachers", "mean, others"] if several else [])]
    lines = table_head(["", *columns], texts=1)
    for label, cells in rows.items():
        line = [with_interval(statistics.fmean(c), sd / math.sqrt(len(c)), freedom) if c else "-" for c in cells]
        if several:
            mean, count = statistics.fmean(means[label]), len(means[label])
            error = sd * math.sqrt(sum(1 / len(cell) for cell in cells if cell)) / count
            line.append(with_interval(mean, error, freedom))
            if count > 1:
                line.append(with_interval(mean, statistics.stdev(means[label]) / math.sqrt(count), count - 1))
            else:
                line.append("-")
        lines.append(table_line([label, *line]))
    return lines


def guided(document: dict) -> bool:
    return document["suite"]["guidance_scale"] is None  # otherwise it is 1


def teacher_name(document: dict) -> str:
    """Return the name of the teacher and whether it was sampled without guidance."""
    return document["teacher"]["name"] + ("" if guided(document) else ", unguided")


def teachers(documents: list[dict]) -> list[str]:
    columns = ["teacher", "made with", "parameters", "good, %", "all words right, %", "minutes"]
    lines = table_head(columns, texts=2)
    for document in documents:
        made, judged = document["teacher"], [row for row in document["rows"] if row["setting"] == "teacher"]
        shares = [
            ablations_report.spread([row.get(key) for row in judged], ".1f", 100) for key in ("good", "all_right")
        ]
        millions = f"{made['parameters'] / 1e6:.1f} M"
        cycles = [made]
        while before := cycles[0].get("before"):
            cycles.insert(0, before)
        how, minutes = "; then ".join(describe(cycle["run"]) for cycle in cycles), sum(c["minutes"] for c in cycles)
        lines.append(table_line([teacher_name(document), how, millions, *shares, f"{minutes:.0f}"]))
    return lines


def describe(run: dict) -> str:
    """Return what a teacher's run had, as text."""
    left_out = ("world", "batch")
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in run.items() if name not in left_out)


def tables(document: dict) -> list[str]:
    """Return all tables of one teacher."""
    rows, suite, environment = document["rows"], document["suite"], document["environment"]
    seeds = len({row["seed"] for row in rows})
    lines = [
        f"## {teacher_name(document)}\n",
        f"These are {seeds} seeds with {suite['videos']} videos each, {suite['noises']} per caption. Fine-tuning takes"
        f" the time of {suite['budget']} MSE steps at batch size {suite['batch_size']}, on {environment['device']}."
        f" {results.measured(environment)}\n",
    ]
    always = [row for row in rows if row["setting"] in ("world", "teacher")]
    for group, heading in (
        ("tuned objective, well-chosen layers", "Objectives, well-chosen layers"),
        ("tuned objective, badly chosen layers", "Objectives, badly chosen layers"),
        (LONGER, "Four times as long"),
        ("guidance", "Guidance and negative prompts, badly chosen layers"),
        (CHOICE, "Choice of layers"),
        (RATE, "Learning rate, layers of the default"),
    ):
        names = in_groups(group)
        if chosen := [row for row in rows if row["setting"] in names]:
            with_default = [row for row in rows if row["setting"] == DEFAULT.name and group in (CHOICE, RATE)]
            lines += [f"### {heading}\n", *ablations_report.table([*always, *with_default, *chosen], FIGURES), ""]
    return lines


def write(folder: Path, docs: Path) -> list[Path]:
    """Write headroom.md to the folder `docs`; returns the file, none without results."""
    documents = [document for document in ablations_report.load(folder) if "teacher" in document]
    if not documents:
        return []
    lines = [HEAD, "## The teachers\n", *teachers(documents), "", "## Differences\n", DIFFERENCES]
    for with_guidance, how in ((True, ""), (False, ", without guidance")):
        chosen = [document for document in documents if guided(document) == with_guidance]
        for heading, pairs in COMPARISONS.items():
            if table := difference_table(chosen, pairs):
                lines += [f"### {heading}{how}\n", *table, ""]
    for document in documents:
        lines += tables(document)
    target = docs / "headroom.md"
    target.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return [target]


if __name__ == "__main__":
    print("\n".join(f"wrote {path}" for path in write(ablations_report.FOLDER, ablations_report.DOCS)))
