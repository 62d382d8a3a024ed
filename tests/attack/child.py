"""A linvideo command in a forked child: imports happen only once, and the child can be killed, watched and limited."""

import os
import resource
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

TRACEBACK, KILLED, HANG = 70, 99, -1  # our own exit statuses


@dataclass
class Child:
    """A child process that runs a command line.

    Args:
        words: Words of the command line, after `linvideo`.
        place: Folder in which it runs.
        prepare: Function that the child calls first, for example to patch something.
        limit: Seconds after which the child is killed; its status is then HANG.
        memory: Bytes of address space in addition to those of this process; 0 means no limit.
    """

    words: list[str]
    place: Path
    prepare: Callable[[], None] = lambda: None
    limit: float = 300.0
    memory: int = 0
    status: int | None = field(default=None, init=False)
    said: str = field(default="", init=False)

    def __post_init__(self):
        self.output = self.place.parent / f"said-{time.monotonic_ns()}.txt"
        sys.stdout.flush()
        self.started = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(self._run())

    def _run(self) -> int:
        status = TRACEBACK
        try:
            os.setsid()  # so that an encoder that it has started can be killed with it
            for number in (1, 2):
                os.dup2(os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
            os.chdir(self.place)
            if self.memory:
                used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (used + self.memory,) * 2)
            self.prepare()
            from linvideo.commands import main as command_line

            status = command_line.main(self.words)
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        return status

    def wait(self) -> "Child":
        while (found := os.wait4(self.pid, os.WNOHANG))[0] == 0:
            if time.monotonic() - self.started > self.limit:
                os.killpg(self.pid, signal.SIGKILL)
                found = os.wait4(self.pid, 0)
                self.status = HANG
                break
            time.sleep(0.005)
        self.seconds, self.busy = time.monotonic() - self.started, found[2].ru_utime + found[2].ru_stime
        self.status = os.waitstatus_to_exitcode(found[1]) if self.status is None else self.status
        self.said = self.output.read_text(errors="replace") if self.output.exists() else ""
        self.output.unlink(missing_ok=True)
        return self

    @property
    def errors(self) -> list[str]:
        """The lines of a refusal."""
        return [line for line in self.said.splitlines() if "error: " in line]

    @property
    def refused(self) -> bool:
        """Whether the command ended with status 2 and one line that gives the reason."""
        return self.status == 2 and len(self.errors) == 1 and "Traceback" not in self.said

    def __str__(self) -> str:
        """The command to type, and how it ended."""
        last = next((line for line in reversed(self.said.splitlines()) if line.strip()), "")
        return f"linvideo {shlex.join(self.words)[-300:]}\n    status {self.status}: {last[:300]}"
