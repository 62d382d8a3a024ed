"""Compare the objectives over teachers that leave something to gain, and the rules that choose layers.

`python -m benchmarks.ablations.headroom_report` writes docs/results/headroom.md from the results of the suite headroom.
"""

import math
import statistics
from pathlib import Path

from benchmarks.ablations import ablations_report
from benchmarks.ablations.settings import CHOICE, LONGER, RATE, SETTINGS
from benchmarks.ablations.tuning import LIMITS
from benchmarks.tables import table_line

OBJECTIVES = ("MSE, own states", "ADM, small step", "ADM, one sampler step", "hybrid")
LAYERS = ("well-chosen layers", "badly chosen layers")
# pairs of settings whose difference in good videos is shown
RULES = (
    ("learned r", "default", "lowest sensitivity, longer"),
    ("learned r from 0.5", "r from 0.5", "lowest sensitivity, longer"),
    ("learned r, its learning rate x 3", "learning rate of r x 3", "lowest sensitivity, longer"),
    ("first half", "first half", "lowest sensitivity"),
    ("learned r, three quarters linear", "75.0% linear", "75.0% linear, lowest sensitivity, longer"),
    ("first three quarters", "75.0% linear, first layers", "75.0% linear, lowest sensitivity"),
)
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
HEAD = f"""# Teachers with headroom

This page is written by `python -m benchmarks.ablations.headroom_report` from the files in
[benchmarks/results/ablations](../../benchmarks/results/ablations). [docs/results.md](../results.md#the-objective) says
what follows from it.

On a teacher at 100% good, an objective can't show that it makes better videos than another. These teachers of the small
world leave something to gain. Each table compares settings that share all stages before fine-tuning and are fine-tuned
for the same time. Each objective has the learning rate that gave it the most good videos on a seed of its own
(TUNING_SEED in benchmarks/ablations/settings.py), which doesn't count; runs of four times the length and with other
trajectories have the same rate. Rates from {1e-3 * LIMITS[0]:.1e} to {1e-3 * LIMITS[1]:.1e} were tried, so that beyond
these two there may be a better one. The choice of layers is compared at the default rate. In well-chosen layers the
half with the lowest sensitivities is linear, in badly chosen layers every second one. A student whose videos have
values that are not finite counts as 0% good and is left out of the other columns.

Besides the columns of [ablations.md](ablations.md), these tell matching a distribution from seeking its modes:

- **all words right**: a student with more than its teacher has left out what the teacher does wrong.
- **coverage** of the teacher's or the world's: the distance (Wasserstein-1) of positions and speeds to those of the
  teacher's videos from other noise, or to the world's own. Lower is better; the best to expect is in the rows of the
  teacher and of the world.
- **distance** to the teacher's or the world's: the kernel distance to the teacher's videos from other noise, or to the
  world's own. Lower is better; compare with the teacher's row.
- **diversity**: the mean squared difference between two videos with the same caption. A student that seeks modes has
  less than its teacher; so has one whose motion or shapes are blurred.
"""

AGAINST = """\
By how many points each has more good videos than MSE: the mean over seeds with its 95% interval (Student's t over the
differences of the seeds, which are paired: same captions, noise and earlier stages). The last two columns are the mean
over teachers. The first interval says how sure it is for these teachers, the second what to expect of others. Neither
includes the choice of the learning rate.
"""


def interval(differences: list[float]) -> str:
    """Return the mean of differences of shares with its 95% interval, in percent; "-" without any."""
    return pooled([differences])


def pooled(groups: list[list[float]]) -> str:
    """Return the mean of the groups' means with its 95% interval, from the variance within groups; "-" without any.

    This is the interval for these groups. That for others would take the variance of the groups' means.
    """
    groups = [[100 * value for value in group] for group in groups if group]
    if not groups:
        return "-"
    means = [statistics.fmean(group) for group in groups]
    mean, freedom = statistics.fmean(means), sum(len(group) - 1 for group in groups)
    if not freedom:
        return f"{mean:+.1f}"
    squares = sum((value - m) ** 2 for group, m in zip(groups, means, strict=True) for value in group)
    error = math.sqrt(squares / freedom * sum(1 / len(group) for group in groups)) / len(groups)
    return f"{mean:+.1f} ± {T[min(freedom, max(T))] * error:.1f}"


def differences(document: dict, setting: str, base: str) -> list[float]:
    """Return, for each seed that has both settings, how much larger the share of good videos of `setting` is than that
    of `base`."""
    found = {(row["setting"], row["seed"]): row["good"] for row in document["rows"]}
    seeds = sorted({seed for _, seed in found})
    pairs = [((setting, seed), (base, seed)) for seed in seeds]
    return [found[a] - found[b] for a, b in pairs if a in found and b in found]


def difference_table(documents: list[dict], pairs: list[tuple[str, str, str]]) -> list[str]:
    """Return a table of differences of good videos, without the teachers that have none; empty if all have none.

    Args:
        documents: Results to compare, one per teacher.
        pairs: Rows of the table: (label, setting, setting that it is compared with).
    """
    documents = [document for document in documents if any(differences(document, *pair) for _, *pair in pairs)]
    if not documents:
        return []
    lines = [table_line(["", *map(teacher_name, documents), "mean, over seeds", "mean, over teachers"])]
    lines.append("|---|" + "---:|" * (len(documents) + 2))
    for label, setting, base in pairs:
        each = [differences(document, setting, base) for document in documents]
        over = interval([statistics.fmean(values) for values in each if values])
        lines.append(table_line([label, *map(interval, each), pooled(each), over]))
    return lines


def guided(document: dict) -> bool:
    return document["suite"]["guidance_scale"] is None  # otherwise it is 1


def teacher_name(document: dict) -> str:
    """Return the name of the teacher and whether it was sampled without guidance."""
    return document["teacher"]["name"] + ("" if guided(document) else ", unguided")


def teachers(documents: list[dict]) -> list[str]:
    lines = [table_line(["teacher", "made with", "parameters", "good, %", "all words right, %", "minutes"])]
    lines.append("|---|---|---:|---:|---:|---:|")
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
    rows, suite = document["rows"], document["suite"]
    seeds = len({row["seed"] for row in rows})
    lines = [
        f"## {teacher_name(document)}\n",
        f"These are {seeds} seeds with {suite['videos']} videos each, {suite['noises']} per caption. Fine-tuning takes"
        f" the time of {suite['budget']} MSE steps at batch size {suite['batch_size']}."
        f" {ablations_report.measured(document['environment'])}\n",
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
        names = [setting.name for setting in SETTINGS.values() if group in setting.groups]
        if group == CHOICE:
            names = [setting for _, *pair in RULES for setting in pair]
        chosen = [row for row in rows if row["setting"] in names]
        if chosen:
            lines += [f"### {heading}\n", *ablations_report.table([*always, *chosen], FIGURES), ""]
    return lines


def write(folder: Path, docs: Path) -> list[Path]:
    """Write headroom.md to the folder `docs`; returns the file, none without results."""
    documents = [document for document in ablations_report.load(folder) if "teacher" in document]
    if not documents:
        return []
    pairs = [
        (f"{objective}, {layers}", f"{objective}, {layers}", f"MSE, {layers}")
        for layers in LAYERS
        for objective in OBJECTIVES
    ]
    lines = [HEAD, "## The teachers\n", *teachers(documents), ""]
    for with_guidance, how in ((True, ""), (False, ", without guidance")):
        chosen = [document for document in documents if guided(document) == with_guidance]
        if table := difference_table(chosen, pairs):
            lines += [f"## Objectives against MSE{how}\n", AGAINST, *table, ""]
        if table := difference_table(chosen, list(RULES)):
            lines += [f"## Choice of layers against the lowest sensitivities{how}\n", *table, ""]
    for document in documents:
        lines += tables(document)
    target = docs / "headroom.md"
    target.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return [target]


if __name__ == "__main__":
    print("\n".join(f"wrote {path}" for path in write(ablations_report.FOLDER, ablations_report.DOCS)))
