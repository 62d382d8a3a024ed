"""Few steps: `python -m benchmarks.few_steps --world small --seeds 3`.

Converts the world's teacher as the ablations' default run does, distils it to 1, 2 and 4 steps, and sets the results
beside teacher and converted model at as many steps. Every model leaves a row in OUTPUT_DIR/rows.json: work that was
interrupted goes on where it stopped. At the end the rows go to benchmarks/results/few_steps and docs/few_steps.md is
made of all results.

small takes about an hour on two CPU cores; middle and large need a GPU and a teacher of
`python -m linvideo.demo.train_teacher --world middle`.
"""

import argparse
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import results
from benchmarks.few_steps import report
from benchmarks.few_steps.run import DISTILLED, SCALES, FewStepBench, Scale
from linvideo.demo.teacher import FOLDER as SMALL_TEACHER
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
    distilled = [(name, steps, seed) for seed in range(seeds) for name, counts in DISTILLED.items() for steps in counts]
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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.few_steps", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--world", choices=SCALES, default="small")
    parser.add_argument("--seeds", type=int, default=3, help="how many; the seeds are 0, 1, ...")
    parser.add_argument("--teacher", type=Path, help="pipeline folder; the small world's is part of linvideo")
    parser.add_argument("--output_dir", type=Path, help="default: runs/few-steps-WORLD")
    parser.add_argument("--processes", type=int, help="default: one a CPU core, or one for the GPU")
    parser.add_argument("--no_report", action="store_true", help="rows only: no result file and tables")
    args = parser.parse_args(arguments)
    cuda = torch.cuda.is_available()
    for name in ("seeds", "processes"):
        if (getattr(args, name) or 1) < 1 or getattr(args, name) == 0:
            parser.error(f"expected --{name} of at least 1, got {getattr(args, name)}")
    if args.teacher is None and args.world != "small":
        parser.error(f"--world {args.world} needs --teacher, made by linvideo.demo.train_teacher --world {args.world}")
    folder = args.output_dir or Path("runs") / f"few-steps-{args.world}"
    processes = args.processes or (1 if cuda else os.cpu_count() or 1)
    if not cuda:
        torch.set_num_threads(1)  # as in the runs: the result names it
    scale = SCALES[args.world]
    try:
        rows = run(scale, args.seeds, args.teacher or SMALL_TEACHER, folder, processes)
    except ValueError as error:
        parser.error(str(error))
    if not args.no_report:
        path = report.save(rows, args.world, scale)
        print("\n".join(f"wrote {x}" for x in [path, report.write(report.FOLDER, report.DOCS)]))


if __name__ == "__main__":
    main()
