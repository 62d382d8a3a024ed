"""SIGTERM and Ctrl-C, which end a run without losing work."""

import os
import signal
import threading
from typing import Any

from linvideo.run.parallel import Ranks


class TrainingStopped(RuntimeError):
    """The run was stopped by SIGTERM, which schedulers send before they take a machine away, or by Ctrl-C (SIGINT).

    Attributes:
        exit_status: Exit status of the command.
    """

    def __init__(self, when: str, number: int = signal.SIGTERM):
        name, self.exit_status = ("Ctrl-C", 130) if number == signal.SIGINT else ("SIGTERM", 1)
        super().__init__(f"stopped by {name} {when}; continue with --resume_from_checkpoint latest")


class StopSignals:
    """Context manager in which SIGTERM and Ctrl-C raise TrainingStopped.

    They do so at once, unless `unsaved` is true. In that case they are remembered until `came` is called. A second
    Ctrl-C doesn't wait.

    Args:
        ranks: The ranks of the run.

    Attributes:
        unsaved: Whether stopping now would lose work. The owner of the run sets it.
    """

    def __init__(self, ranks: Ranks):
        self.ranks, self.unsaved = ranks, False
        self._number: int | None = None  # the signal that came
        self._before: dict[int, Any] = {}

    def came(self) -> bool:
        """Return whether any rank has received a signal. All ranks call this together."""
        return self.ranks.any(self._number is not None)

    def stopped(self, when: str) -> TrainingStopped:
        """Return the error to raise for the signal, which another rank may have received."""
        return TrainingStopped(when, self._number or signal.SIGTERM)

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # Python sets handlers only there
            before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
            self._before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
            for number in self._before:
                signal.signal(number, self._hear)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _hear(self, number: int, _: Any) -> None:
        # under torchrun one Ctrl-C arrives twice, from the terminal and from torchrun
        if number == signal.SIGINT and self._number is not None and self.ranks.size == 1:
            raise KeyboardInterrupt
        self._number = number
        if not self.unsaved:
            raise self.stopped("between the steps")
        if number == signal.SIGINT and self.ranks.first:  # print is not reentrant
            os.write(2, b"\nstopping once this step is saved; Ctrl-C again stops at once and loses it\n")
