"""The host's time for one call of linear_attn: `python -m benchmarks.host [--shape NAME] [--against REV]`.

This is what Python, PyTorch's dispatch and Triton's launches take until the last kernel of a call is launched. It needs
no GPU: tensors have no memory, and a launch does everything but start the kernel (host_calls.py). It leaves out the
driver's launch, the encoding of TMA descriptors and CUDA's allocator, a few microseconds each. A model whose kernels
take less than this waits for the host; CUDA graphs help there.

--against REV checks a revision out into a temporary worktree and times both in turn, in processes of their own. Compare
the two columns of one run only: a busy machine is twice as slow from one minute to the next.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import quantiles

from benchmarks.shapes import SHAPES

ROOT = Path(__file__).resolve().parents[1]
CALLS = Path(__file__).with_name("host_calls.py")


@contextmanager
def checked_out(revision: str) -> Iterator[Path]:
    """A worktree of the revision, removed in the end."""
    git = ["git", "-C", str(ROOT)]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run([*git, "worktree", "add", "--quiet", "--detach", str(tree), revision], check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(tree)], check=True)


def measure(tree: Path, shape: tuple[int, ...], calls: int) -> dict[str, dict]:
    """Case -> {"launches", "microseconds" of each call} of the tree."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tree), str(tree / "kernels")])}
    environment.pop("TRITON_INTERPRET", None)  # the interpreter launches in another way
    command = [sys.executable, "-P", str(CALLS), json.dumps({"shape": shape, "calls": calls})]
    done = subprocess.run(command, env=environment, cwd=tree, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{tree} cannot be measured:\n{done.stderr}")
    return json.loads(done.stdout)


def summary(times: list[float]) -> tuple[float, float, float]:
    """Median, 10th and 90th percentile."""
    tenths = quantiles(times, n=10)
    return tenths[4], tenths[0], tenths[8]


def table(found: dict[str, dict[str, dict]]) -> str:
    """found: label of a tree -> case -> what `measure` returns, the times of all rounds in one list."""
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
    parser.add_argument("--shape", choices=SHAPES, default="wan2.1-1.3b-480p", help="the rows of q, k and v")
    parser.add_argument("--against", metavar="REV", help="a git revision to time in turn with this tree")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each tree (default: 5)")
    parser.add_argument("--calls", type=int, default=100, help="timed calls of each case in a process (default: 100)")
    args = parser.parse_args()
    if args.rounds < 1 or args.calls < 10:
        parser.error(f"expected at least 1 round and 10 calls, got {args.rounds} and {args.calls}")
    commit = args.against and commit_of(args.against)
    if args.against and not commit:
        parser.error(f"expected --against to name a commit of the git repository {ROOT}, got {args.against!r}")
    shape = SHAPES[args.shape]
    print(f"{args.shape}: {shape}; median (10% to 90%) of {args.rounds * args.calls} calls")
    with checked_out(commit) if commit else nullcontext() as other:
        trees = ({commit: other} if other else {}) | {"this tree": ROOT}
        found: dict[str, dict[str, dict]] = {label: {} for label in trees}
        for _ in range(args.rounds):
            for label, tree in trees.items():
                for case, row in measure(tree, shape, args.calls).items():
                    found[label].setdefault(case, row | {"microseconds": []})["microseconds"] += row["microseconds"]
    print(table(found))


if __name__ == "__main__":
    main()
