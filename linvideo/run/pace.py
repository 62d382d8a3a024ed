"""How fast a stage trains."""

import time


class Pace:
    """Samples per second, a mean that forgets: a step weighs `keep` times as much as the one after it.

    Args:
        samples: of a step, over all ranks.
    """

    def __init__(self, samples: int, keep: float = 0.9):
        self.samples, self.keep = samples, keep
        self._steps = self._seconds = 0.0

    def start(self) -> None:
        self._started = time.perf_counter()

    def stop(self) -> float:
        """The step that was started is over; what lies between two steps, a checkpoint say, is not counted."""
        self._steps = self.keep * self._steps + 1
        self._seconds = self.keep * self._seconds + time.perf_counter() - self._started
        return self.samples * self._steps / self._seconds
