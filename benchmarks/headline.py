"""The speed table of README.md: the op and whole models on one GPU, compared with softmax attention.

It stands between the comments BEGIN and END and is filled from the results; the rest of the file is left alone.
"""

from pathlib import Path

from benchmarks import marked, results, tables
from benchmarks.peers import OURS, is_exact_softmax
from benchmarks.shapes import WAN, WINDOW

BEGIN, END = "<!-- headline: begin -->", "<!-- headline: end -->"
SIZES = {"1.3b-480p": "Wan 1.3B at 480p", "14b-720p": "Wan 14B at 720p"}
DTYPE = "bfloat16"
NOT_YET = (
    "No speed at the sizes of Wan's models has been measured on a GPU yet: [kernels/README.md](kernels/README.md) has a"
    " clock model of what to expect, and [docs/benchmarks.md](docs/benchmarks.md) has the figures of a CPU."
)
Pairs = list[tuple[dict, dict]]  # (row, environment of its file)


def fill(readme: Path, devices: dict[str, Pairs]) -> None:
    """Write the block between the two comments of `readme`; raises ValueError where it doesn't have them."""
    marked.fill(readme, BEGIN, END, f"\n{block(devices)}\n")


def block(devices: dict[str, Pairs]) -> str:
    """Return a table for the GPU that was measured last, with a line on how; NOT_YET where there are no GPU results.

    Args:
        devices: Newest results of each device, as pairs (row, environment).
    """
    found = {device: rows for device, pairs in devices.items() if (rows := _rows(_on_gpu(pairs)))}
    if not found:
        return NOT_YET

    def newest(device: str) -> str:
        return max(environment["time"] for _, ours, theirs, _ in found[device] for _, environment in (ours, theirs))

    device = max(found, key=newest)
    lines = tables.table_head(["", "linvideo, ms", "softmax, ms", "softmax / linvideo"], texts=1)
    for label, (ours, _), (theirs, _), name in found[device]:
        shown = tables.three_digits(ours["ms"][0]), f"{tables.three_digits(theirs['ms'][0])} ({name})"
        lines.append(tables.table_line([label, *shown, f"{tables.three_digits(theirs['ms'][0] / ours['ms'][0])}x"]))
    runs = results.runs([pair for _, ours, theirs, _ in found[device] for pair in (ours, theirs)])
    lines += [
        "",
        f"Median times on one {device} in {DTYPE}, batch 1. The softmax column has the fastest exact implementation"
        f" that was measured. Measured {'; '.join(runs)}. All figures: [docs/benchmarks.md](docs/benchmarks.md).",
    ]
    return "\n".join(lines)


def _on_gpu(pairs: Pairs) -> Pairs:
    return [(row, env) for row, env in pairs if env["cuda"] and row["dtype"] == DTYPE and "ms" in row]


def _rows(pairs: Pairs) -> list[tuple]:
    """Return (label, our pair, the pair of softmax, name of the softmax) for every row that the results allow."""
    made = []
    for size, label in SIZES.items():
        for which in tables.FORWARD_AND_BOTH:
            here = [p for p in pairs if p[0]["suite"] == "op" and p[0]["shape"] == f"wan2.1-{size}"]
            here = [p for p in here if p[0]["pass"] == which]
            ours = _fastest([p for p in here if p[0]["name"] == OURS])
            theirs = _fastest([p for p in here if is_exact_softmax(p[0]["name"])])
            if ours and theirs:
                name = theirs[0]["name"].removeprefix("softmax ")
                made.append((f"attention of {label}, {which}", ours, theirs, name))
    kinds = [(size, windows) for size in SIZES for windows in (False, True)]
    return made + [row for size, windows in kinds if (row := _model_row(pairs, size, windows))]


def _model_row(pairs: Pairs, size: str, windows: bool) -> tuple | None:
    """Return the row of a model's forward, in the first of four modes that has both the stock and the converted one.

    windows: whether the layers that aren't linear are window layers.
    """
    count = WAN[size].linear_layers[1]

    def fastest(pairs: Pairs, linear: int, windows: bool):
        chosen = [p for p in pairs if p[0]["linear_layers"] == linear]
        return _fastest([p for p in chosen if p[0]["backend"].startswith(WINDOW) == windows])

    for how in ("whole", "composed"):
        for compiled in (True, False):
            here = [p for p in pairs if p[0]["suite"] == "model" and p[0]["model"] == size and p[0]["how"] == how]
            here = [p for p in here if p[0]["compiled"] == compiled and p[0]["backend"] != "sage"]
            ours, theirs = fastest(here, count, windows), fastest(here, 0, False)
            if ours and theirs:
                label = f"forward of {SIZES[size]}, {count} of {WAN[size].layers} layers linear"
                label += ", the others window" * windows
                label += f"{', compiled' * compiled}{', the sum of its parts' * (how == 'composed')}"
                return label, ours, theirs, tables.BACKENDS[theirs[0]["backend"]].partition(" (")[0]
    return None


def _fastest(pairs: Pairs) -> tuple[dict, dict] | None:
    return min(pairs, key=lambda pair: pair[0]["ms"][0], default=None)
