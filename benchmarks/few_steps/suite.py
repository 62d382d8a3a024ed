"""All runs of a world, which add rows to a folder that can be continued."""

from contextlib import closing
from pathlib import Path

from benchmarks import results
from benchmarks.few_steps import few_steps_report
from benchmarks.few_steps.few_steps_bench import DISTILLED, FewStepBench, Scale
from benchmarks.worlds import side_by_side
from linvideo.evaluation.work_folder import WorkFolder, identity
from linvideo.models import load_pipeline


def run(scale: Scale, seeds: int, teacher: Path, folder: Path, processes: int) -> list[dict]:
    """Run what is missing in the folder and return all rows."""
    work = WorkFolder(folder, {"scale": scale.numbers, "teacher": identity(load_pipeline(teacher))})
    done = {(row["model"], row["steps"], row["seed"]) for row in work.rows}
    bases = [("base_rows", seed) for seed in range(seeds) if ("converted", "full", seed) not in done]
    distilled = [(name, steps, seed) for name, counts in DISTILLED.items() for seed in range(seeds) for steps in counts]
    first = 0 if work.rows else 1  # the first job also trains the network of the distance, for all jobs
    rounds = [bases[:first], bases[first:], [("distilled_rows", *job) for job in distilled if job not in done]]
    commit = results.commit()
    with closing(side_by_side(FewStepBench, (scale, teacher, folder), rounds, processes)) as groups:
        for group in groups:
            for row in group:
                work.add(row | {"commit": commit})
                print(few_steps_report.one_line(row), flush=True)
    return work.rows
