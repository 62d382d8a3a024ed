"""All runs of a suite, each of which adds a row to a folder that can be continued."""

from contextlib import closing
from pathlib import Path

from benchmarks import results
from benchmarks.ablations import ablations_report
from benchmarks.ablations.bench import Bench
from benchmarks.ablations.settings import DEFAULT, SETTINGS, Suite
from benchmarks.worlds import side_by_side
from linvideo.evaluation.work_folder import WorkFolder, identity
from linvideo.models import load_pipeline

TEACHER = "teacher"  # the name of the teacher's own row
TEACHER_GOOD = 0.5  # least share of good videos of a teacher: below it, what a conversion loses can't be seen


def run(suite: Suite, settings: list[str], seeds: int, teacher: Path, folder: Path, processes: int) -> list[dict]:
    """Run what is missing in the folder and return all rows of the suite.

    Raises:
        ValueError: The folder has other work, or the teacher is too poor for its students to be compared.
    """
    work = WorkFolder(folder, {"suite": suite.scale, "teacher": identity(load_pipeline(teacher))})
    for row in work.rows:
        check_teacher(row)
    done = {(row["setting"], row["seed"]) for row in work.rows}
    # First the teacher, whose videos the others are compared with, then the default run, whose stages they share.
    names = [[TEACHER], [DEFAULT.name], [name for name in settings if name != DEFAULT.name]]
    rounds = [
        [job(name, seed) for seed in range(seeds) for name in group if (name, seed) not in done] for group in names
    ]
    total, commit = sum(map(len, rounds)), results.commit()
    with closing(side_by_side(Bench, (suite, teacher, folder), rounds, processes)) as rows:
        for finished, row in enumerate(rows, 1):
            work.add(row | {"commit": commit})
            print(f"[{finished}/{total}] {ablations_report.one_line(row)}", flush=True)
            check_teacher(row)
    return work.rows


def job(name: str, seed: int) -> tuple:
    """Return (name of Bench's method, arguments) of the run that makes a row."""
    return ("teacher_row", seed) if name == TEACHER else ("row", SETTINGS[name], seed)


def check_teacher(row: dict) -> None:
    """Raise ValueError if the row is that of a teacher that is too poor."""
    if row["setting"] == TEACHER and row["good"] < TEACHER_GOOD:
        raise ValueError(
            f"expected a teacher with at least {TEACHER_GOOD:.0%} good videos, got {row['good']:.0%}; train it longer"
        )
