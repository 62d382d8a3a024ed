"""Test and time the kernels on a GPU within ten minutes: `make evidence`.

`python -m benchmarks.evidence --minutes M --output_dir DIR` compiles the kernels on all cores, tests them against
float64, then times them, other implementations, Wan models and training steps, in this order, and stops after M
minutes. Each row is written as soon as it is measured. The same command run again continues with what is missing, also
on another machine with the same card. It needs PyTorch and Triton, and uses diffusers, hypothesis, pytest-xdist,
fa3-fwd and fla if they are installed.

DIR then has summary.md (one screen), evidence.log and, for each run, a file of results and a JUnit file of the tests.
To publish results, copy them to benchmarks/results and run `python -m benchmarks.report`.
"""

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from linvideo_kernels.linear_attn import configs
from linvideo_kernels.linear_attn.launch import target_of

from benchmarks.evidence import summary
from benchmarks.evidence.rows import LOST, TILES

ROOT = Path(__file__).parents[2]
KERNEL_TESTS = ROOT / "tests" / "kernels"
FIRST_TESTS = ("test_many_tiles.py", "test_options.py", "test_kernel_window.py", "test_edges.py")  # before all others
DRY_TESTS = (
    "test_many_tiles.py::test_both_orders_of_the_state_product",
    "test_kernel_window.py::test_against_float64[frames_5-frame_tokens_3-batch_1-fp32]",
)
COMPILE_SECONDS, TEST_SECONDS = 60, 150
KERNELS = "_state|_grad|merge_"  # regular expression of their names
METRICS = ("gpu__time_duration.sum", "dram__bytes_read.sum", "dram__bytes_write.sum", "sm__cycles_elapsed.max",
           "sm__inst_executed_pipe_tensor.sum", "sm__throughput.avg.pct_of_peak_sustained_elapsed")  # fmt: skip


class Drill:
    """One run, with its folder, its log and the time that is left."""

    def __init__(self, folder: Path, minutes: float, dry_run: bool):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.dry_run = folder, dry_run
        self.end = time.monotonic() + 60 * minutes
        self.log = folder / "evidence.log"

    @property
    def left(self) -> float:
        """Seconds until the run must end."""
        return max(0.0, self.end - time.monotonic())

    def say(self, line: str) -> None:
        """Print a line and add it to the log."""
        print(line, flush=True)
        with self.log.open("a") as file:
            file.write(line + "\n")

    def command(self, arguments: list[str], seconds: float, environment: dict[str, str] | None = None) -> int:
        """Run a command, with its output in the log, and return its exit status.

        After `seconds` it is interrupted, so that it can write what it has, and killed ten seconds later.
        """
        seconds = min(seconds, self.left)
        paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
        variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        variables |= {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"} | (environment or {})
        self.say(f"$ {' '.join(arguments[:8])}{' ...' * (len(arguments) > 8)}  ({seconds:.0f} s at most)")
        begun = time.monotonic()
        process = subprocess.Popen(
            arguments, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", start_new_session=True,
        )  # fmt: skip
        reader = threading.Thread(target=lambda: [self.say(line.rstrip("\n")) for line in process.stdout], daemon=True)
        reader.start()
        for patience, number in ((seconds, signal.SIGINT), (10, signal.SIGKILL)):
            try:
                process.wait(patience)
                break
            except subprocess.TimeoutExpired:
                self.say(f"stopped after {time.monotonic() - begun:.0f} s")
                _signal(process, number)
        process.wait()
        reader.join(5)
        self.say(f"exit status {process.returncode}, {time.monotonic() - begun:.0f} s")
        return process.returncode

    def compile(self) -> None:
        """Compile the shipped kernels on all cores, so that later launches find them in Triton's cache."""
        arch = "sm_90" if self.dry_run else configs.arch(target_of(torch.empty(0, device="cuda")).capability)
        only = ["--match", "reduce_state-hedgehog-d64-bf16-*"] if self.dry_run else []
        gates = [sys.executable, "-m", "benchmarks.static_gates", "--arch", arch, *only]
        self.command(gates, COMPILE_SECONDS, {"TRITON_INTERPRET": "0"})

    def test(self) -> None:
        """Run those of the kernels' tests that haven't passed in this folder yet."""
        if importlib.util.find_spec("pytest") is None:
            self.say("left out: the tests, pytest is not installed")
            return
        others = sorted(path.name for path in KERNEL_TESTS.glob("test_*.py") if path.name not in FIRST_TESTS)
        files = [str(KERNEL_TESTS.relative_to(ROOT) / name) for name in
                 (DRY_TESTS if self.dry_run else (*FIRST_TESTS, *others))]  # fmt: skip
        done = [name for name, outcome in summary.outcomes(self.folder).items() if outcome == summary.PASSED]
        number = 1 + len(list(self.folder.glob("correct-*.xml")))
        arguments = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "-m", "not full"]
        arguments += ["-o", "addopts="]  # the ones in pyproject.toml need pytest-benchmark
        if importlib.util.find_spec("xdist") and not self.dry_run:
            arguments += ["-n", str(min(16, os.cpu_count() or 1)), "--maxschedchunk", "1"]
        arguments += [f"--junitxml={self.folder / f'correct-{number}.xml'}", *files]
        arguments += [f"--deselect={name}" for name in done]
        variables = {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": str(int(self.dry_run))}
        self.command(arguments, TEST_SECONDS, variables)

    def measure(self) -> None:
        """Measure everything that is timed. If a process loses the GPU, another one follows, up to three times."""
        rows = [sys.executable, "-m", "benchmarks.evidence.rows", "--output_dir", str(self.folder)]
        if self.dry_run:  # Triton's interpreter is slow, so only the part that calls the kernels directly runs in it
            rows += ["--dry_run"]
            self.command([*rows, "--seconds", str(self.left), "--only", TILES], self.left, {"TRITON_INTERPRET": "1"})
        for tries in range(4):
            more = ["--skip_absent"] if tries else []
            status = self.command([*rows, "--seconds", str(self.left), *more], self.left + 20)
            if status != LOST and status >= 0 or self.left < 10:
                return

    def look_closer(self) -> None:
        """Read the kernels' hardware counters and check their memory, if NVIDIA's tools are installed; run the demo."""
        call = [sys.executable, "-m", "benchmarks.evidence.call", *(["--dry_run"] if self.dry_run else [])]
        ncu = ["ncu", "--clock-control", "none", "--csv", "--metrics", ",".join(METRICS), "-k", f"regex:{KERNELS}"]
        check = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
        if self.dry_run:
            self.command(call, 60)
            return
        for tool in (ncu, check):
            if shutil.which(tool[0]) is None:
                self.say(f"left out: {tool[0]} is not installed")
            elif self.left > 30:
                self.command([*tool, *call], 60, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        if self.left > 60 and importlib.util.find_spec("diffusers"):
            with tempfile.TemporaryDirectory() as folder:
                self.command([sys.executable, "-m", "linvideo", "demo", "--output_dir", f"{folder}/demo"], 120)


def _signal(process: subprocess.Popen, number: int) -> None:
    """Kill a process and its children, or interrupt the process alone, which then ends its children itself."""
    try:
        if number == signal.SIGINT:
            process.send_signal(number)
        else:
            os.killpg(process.pid, number)
    except ProcessLookupError:
        pass


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.evidence", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="time limit in minutes (default: 10)")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("runs/evidence"), help="folder for everything (default: runs/evidence)"
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="run every step at tiny sizes on the CPU, which takes three minutes"
    )
    args = parser.parse_args(arguments)
    if not args.minutes > 0:
        parser.error(f"expected --minutes to be above 0, got {args.minutes}")
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("expected a CUDA GPU, found none; --dry_run runs every step on a CPU")
    drill = Drill(args.output_dir.resolve(), args.minutes, args.dry_run)
    wanted = ("diffusers", "hypothesis", "xdist", "fa3_fwd_interface", "flash_attn_interface", "fla")
    if missing := [name for name in wanted if importlib.util.find_spec(name) is None]:
        drill.say(f"left out, not installed: {', '.join(missing)}")
    for step in (drill.compile, drill.test, drill.measure, drill.look_closer):
        if drill.left > 0:
            step()
            summary.write(drill.folder)
    print((drill.folder / summary.FILE).read_text())
    return int(summary.failures(drill.folder) > 0)


if __name__ == "__main__":
    sys.exit(main())
