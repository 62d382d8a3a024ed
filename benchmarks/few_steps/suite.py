"""All rows of a world, side by side in processes of their own, in a folder that can be continued."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import results
from benchmarks.few_steps import report
from benchmarks.few_steps.run import DISTILLED, FewStepBench, Scale
from linvideo.evaluation.work_folder import WorkFolder, identity
from linvideo.models import load_pipeline

bench: FewStepBench | None = None  # of a worker process


def open_bench(scale: Scale, teacher: Path, folder: Path, device: str) -> None:
    global bench
    if device == "cpu":
        torch.set_num_threads(1)  # one process a core: faster than one process with all of them
    bench = FewStepBench(scale, teacher, folder, device)


def do(name: str | None, steps: int, seed: int) -> list[dict]:
    assert bench is not None
    return bench.base_rows(seed) if name is None else bench.distilled_rows(name, steps, seed)


def run(scale: Scale, seeds: int, teacher: Path, folder: Path, processes: int) -> list[dict]:
    """All rows, those included that were there already."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    numbers = {key: value for key, value in asdict(scale).items() if key != "transfer"}
    numbers["transfer"] = {key: value for key, value in asdict(scale.transfer).items() if key != "settings"}
    work = WorkFolder(folder, {"scale": numbers, "teacher": identity(load_pipeline(teacher))})
    done = {(row["model"], row["steps"], row["seed"]) for row in work.rows}
    # the first seed's base also trains the network of the distance, for all
    bases = [[(None, 0, 0)], [(None, 0, seed) for seed in range(1, seeds)]]
    distilled = [(name, steps, seed) for name, counts in DISTILLED.items() for seed in range(seeds) for steps in counts]
    rounds = [[job for job in jobs if ("converted", "full", job[2]) not in done] for jobs in bases]
    rounds.append([job for job in distilled if job not in done])
    commit = results.commit()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, open_bench, (scale, teacher, folder, device)) as pool:
        for jobs in rounds:
            futures = [pool.submit(do, *job) for job in jobs]
            try:
                for future in as_completed(futures):
                    for row in future.result():
                        work.add(row | {"commit": commit})
                        print(report.one_line(row), flush=True)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return work.rows
