"""All runs of a suite, each of which adds a row to a folder that can be continued."""

from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

from benchmarks import results
from benchmarks.ablations import ablations_report, tuning
from benchmarks.ablations.bench import Bench
from benchmarks.ablations.settings import DEFAULT, SETTINGS, TUNING_SEED, Suite
from benchmarks.worlds import side_by_side
from linvideo.evaluation.work_folder import WorkFolder, identity
from linvideo.models import load_pipeline

TEACHER = "teacher"  # the name of the teacher's own row
WORLD = "world"  # the name of the row of the world's own videos
TEACHER_GOOD = 0.5  # least share of good videos of a teacher: below it, what a conversion loses can't be seen


def run(suite: Suite, settings: list[str], seeds: int, teacher: Path, folder: Path, processes: int) -> list[dict]:
    """Run what is missing in the folder and return all rows of the suite.

    Raises:
        ValueError: The folder has other work, or the teacher is too poor for its students to be compared.
    """
    work = WorkFolder(folder, {"suite": suite.scale, "teacher": identity(load_pipeline(teacher))})
    for row in work.rows:
        check_teacher(row)

    def run_rounds(rounds: list[list[tuple]]) -> None:
        total, commit = sum(map(len, rounds)), results.commit()
        with closing(side_by_side(Bench, (suite, teacher, folder), rounds, processes)) as rows:
            for finished, row in enumerate(rows, 1):
                work.add(row | {"commit": commit})
                print(f"[{finished}/{total}] {ablations_report.one_line(row)}", flush=True)
                check_teacher(row)

    def missing(names: list[str], seeds: Iterable[int]) -> list[tuple]:
        done = {(row["setting"], row["seed"]) for row in work.rows}
        return [(name, seed) for seed in seeds for name in names if (name, seed) not in done]

    # First the teacher, whose videos the others are compared with, then the default run, whose stages they share.
    tuned = {SETTINGS[name].tuned: None for name in settings if SETTINGS[name].tuned is not None}
    numbers = [*range(seeds), *([TUNING_SEED] if tuned else [])]
    first = [("teacher_row", seed) for _, seed in missing([TEACHER], numbers)]
    worlds = [("world_row", seed) for _, seed in missing([WORLD], range(seeds) if suite.headroom else [])]
    defaults = [("row", DEFAULT, seed) for _, seed in missing([DEFAULT.name], numbers)]
    run_rounds([first, [*worlds, *defaults]])
    while trials := [
        (SETTINGS[name], factor) for name in tuned for factor in tuning.missing(work.rows, SETTINGS[name])
    ]:
        run_rounds([[("row", setting, TUNING_SEED, factor) for setting, factor in trials]])
    rest = [(SETTINGS[name], seed) for name, seed in missing(settings, range(seeds))]
    run_rounds([[("row", setting, seed, tuning.best(work.rows, setting)) for setting, seed in rest]])
    return work.rows


def check_teacher(row: dict) -> None:
    """Raise ValueError if the row is that of a teacher that is too poor."""
    if row["setting"] == TEACHER and row["good"] < TEACHER_GOOD:
        raise ValueError(
            f"expected a teacher with at least {TEACHER_GOOD:.0%} good videos, got {row['good']:.0%}; train it longer"
        )
