"""What the benchmarks on the demo's worlds share: their options, and running jobs in parallel processes."""

import argparse
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from linvideo.demo.teacher import FOLDER as SMALL_TEACHER

bench: Any = None  # the bench of a worker process


def add_options(parser: argparse.ArgumentParser, name: str, written: str) -> None:
    """Add the common options.

    Args:
        parser: Parser of the command.
        name: Beginning of the default output folder's name.
        written: Description of what --no_report leaves out.
    """
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, which are 0, 1, ... (default: 3)")
    parser.add_argument(
        "--teacher", type=Path, help="pipeline folder (default: the small world's, which is part of linvideo)"
    )
    parser.add_argument("--output_dir", type=Path, help=f"folder for the work (default: runs/{name}-WORLD)")
    parser.add_argument(
        "--processes", type=int, help="number of processes (default: one per CPU core, or one for a GPU)"
    )
    parser.add_argument("--no_report", action="store_true", help=f"measure only, without {written}")


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace, name: str, world: str) -> None:
    """Check the options and fill in the defaults that depend on the world and the device."""
    for option in ("seeds", "processes"):
        value = getattr(args, option)
        if value is not None and value < 1:
            parser.error(f"expected --{option} to be at least 1, got {value}")
    if args.teacher is None and world != "small":
        parser.error(
            f"expected --teacher for the world {world}, made by python -m linvideo.demo.train_teacher --world {world}"
        )
    cuda = torch.cuda.is_available()
    args.teacher = args.teacher or SMALL_TEACHER
    args.output_dir = args.output_dir or Path("runs") / f"{name}-{world}"
    args.processes = args.processes or (1 if cuda else os.cpu_count() or 1)
    if not cuda:
        torch.set_num_threads(1)  # as in the processes, because the result names the number of threads


def side_by_side(make: Callable, arguments: tuple, rounds: Iterable[list[tuple]], processes: int) -> Iterator[Any]:
    """Run jobs in processes and yield the result of each as it finishes.

    Args:
        make: Function that makes the bench of a process, called as make(*arguments, device).
        arguments: Arguments for `make`.
        rounds: Lists of jobs (name of the bench's method, its arguments); each begins when the one before has ended.
        processes: Number of processes.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _open, (make, (*arguments, device))) as pool:
        for jobs in rounds:
            try:
                for future in as_completed([pool.submit(_call, *job) for job in jobs]):
                    yield future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def _open(make: Callable, arguments: tuple) -> None:
    global bench
    if arguments[-1] == "cpu":
        torch.set_num_threads(1)  # one process per core is faster than one process with all cores
    bench = make(*arguments)


def _call(method: str, *arguments: Any) -> Any:
    return getattr(bench, method)(*arguments)
