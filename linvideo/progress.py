"""Progress bars: on a terminal a bar that moves, in a log file a line a minute."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm

SECONDS = 60  # between two lines in a log file
CURSOR_UP = "\x1b[A"


def bar(iterable: Iterable | None = None, show: bool = True, **options: Any) -> tqdm:
    """Return a tqdm over `iterable`. In a log file it has a first and a last line, too."""
    return tqdm(iterable, disable=not show, **(options | _stream()))


def show_steps(pipeline: Any, **options: Any) -> None:
    """Let a diffusers pipeline show its sampler steps. In a log file only a video of more than a minute has lines."""
    stream = _stream()
    pipeline.set_progress_bar_config(**stream, **options, **({"delay": SECONDS} if stream else {}))


def _stream() -> dict[str, Any]:
    """What tqdm has to know about standard error."""
    if (sys.stderr is not None and sys.stderr.isatty()) or "ipykernel" in sys.modules:  # notebooks draw bars as HTML
        return {}
    return {"file": _Lines(), "mininterval": SECONDS, "maxinterval": SECONDS, "position": 0}


class _Lines:
    """Standard error for tqdm: each state of a bar becomes a line of its own instead of replacing the one before."""

    def write(self, text: str) -> None:
        if line := text.replace(CURSOR_UP, "").strip():
            print(line, file=sys.stderr, flush=True)

    def flush(self) -> None:
        pass
