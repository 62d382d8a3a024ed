"""What the benchmarks on the demo's worlds share: their options, and jobs side by side in processes of their own."""

import argparse
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from linvideo.demo.teacher import FOLDER as SMALL_TEACHER

bench: Any = None  # of a worker process


def add_options(parser: argparse.ArgumentParser, name: str, written: str) -> None:
    """`name` begins the default output folder; `written` is what --no_report leaves out."""
    parser.add_argument("--seeds", type=int, default=3, help="how many; the seeds are 0, 1, ...")
    parser.add_argument("--teacher", type=Path, help="pipeline folder; the small world's is part of linvideo")
    parser.add_argument("--output_dir", type=Path, help=f"default: runs/{name}-WORLD")
    parser.add_argument("--processes", type=int, help="default: one a CPU core, or one for the GPU")
    parser.add_argument("--no_report", action="store_true", help=f"rows only: no {written}")


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace, name: str, world: str) -> None:
    """End with an error on wrong options; fill in the defaults that depend on the world and the device."""
    for option in ("seeds", "processes"):
        value = getattr(args, option)
        if value is not None and value < 1:
            parser.error(f"expected --{option} of at least 1, got {value}")
    if args.teacher is None and world != "small":
        parser.error(f"the world {world} needs --teacher, made by linvideo.demo.train_teacher --world {world}")
    cuda = torch.cuda.is_available()
    args.teacher = args.teacher or SMALL_TEACHER
    args.output_dir = args.output_dir or Path("runs") / f"{name}-{world}"
    args.processes = args.processes or (1 if cuda else os.cpu_count() or 1)
    if not cuda:
        torch.set_num_threads(1)  # as in the processes: the result names it


def side_by_side(make: Callable, arguments: tuple, rounds: Iterable[list[tuple]], processes: int) -> Iterator[Any]:
    """What each job (name of a method, its arguments) gives on a bench that every process makes for itself with
    make(*arguments, device), as it is finished. A round begins when the one before it has ended."""
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
        torch.set_num_threads(1)  # one process a core: faster than one process with all of them
    bench = make(*arguments)


def _call(method: str, *arguments: Any) -> Any:
    return getattr(bench, method)(*arguments)
