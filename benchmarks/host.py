"""Measure the host's time for one call of linear_attn: `python -m benchmarks.host [--shape NAME] [--against REV]`.

This is the CPU time of Python, PyTorch's dispatch and Triton's launches until the last kernel of a call is launched. No
GPU is needed: the tensors have no memory, and a launch does everything except start the kernel (host_calls.py). The
figures leave out the driver's launch, the encoding of TMA descriptors and CUDA's allocator, a few microseconds each. A
model whose kernels take less time than this waits for the host; CUDA graphs help there.

--against REV checks out another revision into a temporary worktree and times both alternately, each in its own process.
Compare only the two columns of one run: a busy machine can be twice as slow from one minute to the next.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from statistics import quantiles

from benchmarks.shapes import SHAPES

ROOT = Path(__file__).resolve().parents[1]
CALLS = Path(__file__).with_name("host_calls.py")


@contextmanager
def checked_out(revision: str) -> Iterator[Path]:
    """Make a temporary worktree of the revision."""
    git = ["git", "-C", str(ROOT)]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run([*git, "worktree", "add", "--quiet", "--detach", str(tree), revision], check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(tree)], check=True)


@contextmanager
def running(tree: Path, shape: tuple[int, ...]) -> Iterator[subprocess.Popen]:
    """Run host_calls.py on the code of `tree` until the block ends."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tree), str(tree / "kernels")])}
    environment.pop("TRITON_INTERPRET", None)  # the interpreter has another way of launching
    command = [sys.executable, "-P", str(CALLS), json.dumps(shape)]
    with tempfile.TemporaryFile("w+") as errors:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors, "text": True}
        process = subprocess.Popen(command, env=environment, cwd=tree, **pipes)
        try:
            yield process
        except EOFError as end:
            if end.args[0] is not process:
                raise
            errors.seek(0)
            raise RuntimeError(f"{tree} cannot be measured:\n{errors.read()}") from None
        finally:
            process.kill()
            process.communicate()


def answer(process: subprocess.Popen):
    line = process.stdout.readline()
    if not line:
        raise EOFError(process)
    return json.loads(line)


def measure(trees: dict[str, Path], shape: tuple[int, ...], rounds: int, calls: int) -> dict[str, dict[str, dict]]:
    """Time all cases on all trees, alternating between the trees.

    Returns:
        Label of the tree -> case -> {"launches": number per call, "microseconds": one for each call}.
    """
    found: dict[str, dict[str, dict]] = {label: {} for label in trees}
    with ExitStack() as stack:
        processes = {label: stack.enter_context(running(tree, shape)) for label, tree in trees.items()}
        cases = [answer(process) for process in processes.values()][-1]
        for case in cases * rounds:
            for label, process in processes.items():
                process.stdin.write(json.dumps([case, calls]) + "\n")
                process.stdin.flush()
                row = answer(process)
                found[label].setdefault(case, row | {"microseconds": []})["microseconds"] += row["microseconds"]
    return found


def summary(times: list[float]) -> tuple[float, float, float]:
    """Return the median, the 10th and the 90th percentile."""
    tenths = quantiles(times, n=10)
    return tenths[4], tenths[0], tenths[8]


def table(found: dict[str, dict[str, dict]]) -> str:
    """Format what `measure` returns."""
    lines = [f"{'microseconds':26}" + "".join(f"{label:>40}" for label in found)]
    for case in next(iter(found.values())):
        row, medians = f"{case:26}", []
        for cases in found.values():
            median, low, high = summary(cases[case]["microseconds"])
            medians.append(median)
            cell = f"{median:.0f} ({low:.0f} to {high:.0f}), {cases[case]['launches']} launches"
            row += f"{cell:>40}"
        lines.append(row + (f"   {medians[-1] / medians[0]:.2f} of it" if len(medians) == 2 else ""))
    return "\n".join(lines)


def commit_of(revision: str) -> str | None:
    command = ["git", "-C", str(ROOT), "rev-parse", "--verify", "--quiet", "--short", f"{revision}^{{commit}}"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", choices=SHAPES, default="wan2.1-1.3b-480p", help="name of the attention shape (default: %(default)s)"
    )
    parser.add_argument("--against", metavar="REV", help="git revision to compare this tree with")
    parser.add_argument("--rounds", type=int, default=50, help="rounds over all cases (default: 50)")
    parser.add_argument("--calls", type=int, default=10, help="timed calls of each case in a round (default: 10)")
    args = parser.parse_args()
    if args.rounds < 1 or args.calls < 1:
        parser.error(f"expected at least 1 round and 1 call, got {args.rounds} and {args.calls}")
    commit = args.against and commit_of(args.against)
    if args.against and not commit:
        parser.error(f"expected --against to be a commit of the git repository {ROOT}, got {args.against!r}")
    shape = SHAPES[args.shape]
    print(f"{args.shape}: {shape}; median (10% to 90%) of {args.rounds * args.calls} calls")
    with checked_out(commit) if commit else nullcontext() as other:
        trees = ({commit: other} if other else {}) | {"this tree": ROOT}
        found = measure(trees, tuple(shape), args.rounds, args.calls)
    print(table(found))


if __name__ == "__main__":
    main()
