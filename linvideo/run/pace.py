"""The training speed of a stage."""

import time


class Pace:
    """Samples per second, as an exponentially weighted mean over the steps.

    Args:
        samples: Number of samples in a step, over all ranks.
        keep: Weight of a step relative to the one after it.
    """

    def __init__(self, samples: int, keep: float = 0.9):
        self.samples, self.keep = samples, keep
        self._steps = self._seconds = 0.0

    def start(self) -> None:
        self._started = time.perf_counter()

    def stop(self) -> float:
        """End the step and return the samples per second. Time between two steps (a checkpoint, say) is not counted."""
        self._steps = self.keep * self._steps + 1
        self._seconds = self.keep * self._seconds + time.perf_counter() - self._started
        return self.samples * self._steps / self._seconds
