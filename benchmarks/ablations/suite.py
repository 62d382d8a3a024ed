"""A suite's runs, side by side in processes of their own, each to a row of a folder that can be continued."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import results
from benchmarks.ablations import report
from benchmarks.ablations.run import Bench
from benchmarks.ablations.settings import DEFAULT, SETTINGS, Suite
from linvideo.evaluation.work_folder import WorkFolder, identity
from linvideo.models import load_pipeline

TEACHER = "teacher"  # the name of the teacher's own row
TEACHER_GOOD = 0.5  # below this share of good videos, what a conversion loses cannot be seen
bench: Bench | None = None  # of a worker process


def open_bench(suite: Suite, teacher: Path, folder: Path, device: str) -> None:
    global bench
    if device == "cpu":
        torch.set_num_threads(1)  # one process a core: faster than one process with all of them
    bench = Bench(suite, teacher, folder, device)


def do(name: str, seed: int) -> dict:
    assert bench is not None
    return bench.teacher_row(seed) if name == TEACHER else bench.row(SETTINGS[name], seed)


def run(suite: Suite, settings: list[str], seeds: int, teacher: Path, folder: Path, processes: int) -> list[dict]:
    """All rows of the suite, those included that were there already.

    Raises:
        ValueError: the folder holds other work, or the teacher is too poor for its students to be compared.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scale = {key: value for key, value in asdict(suite).items() if key != "settings"}
    request = {"suite": scale, "teacher": identity(load_pipeline(teacher))}
    work = WorkFolder(folder, request)
    done = {(row["setting"], row["seed"]) for row in work.rows}
    # The teacher first, whose videos all are compared with, then the default run, whose stages the others share.
    rounds = [[TEACHER], [DEFAULT.name], [name for name in settings if name != DEFAULT.name]]
    todo = [[(name, seed) for seed in range(seeds) for name in names if (name, seed) not in done] for names in rounds]
    total, commit = sum(map(len, todo)), results.commit()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, open_bench, (suite, teacher, folder, device)) as pool:
        finished = 0
        for jobs in todo:
            futures = [pool.submit(do, *job) for job in jobs]
            try:
                for future in as_completed(futures):
                    row = future.result() | {"commit": commit}
                    work.add(row)
                    finished += 1
                    print(f"[{finished}/{total}] {report.one_line(row)}", flush=True)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            good = min((row["good"] for row in work.rows if row["setting"] == TEACHER), default=1.0)
            if good < TEACHER_GOOD:
                raise ValueError(
                    f"expected a teacher with at least {TEACHER_GOOD:.0%} good videos, got {good:.0%}: train it longer"
                )
    return work.rows
