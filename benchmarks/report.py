"""All committed results as tables and plots: `python -m benchmarks.report` writes docs/benchmarks.md and its plots.

Of a figure that was measured more than once on a device the newest counts, if there was one: a peer that was absent
later keeps its older figure, and the table says which run it is from. The same results give the same files, byte
for byte.
"""

import argparse
from collections import defaultdict
from pathlib import Path

from benchmarks import headline, plots, results, tables

DOCS = Path(__file__).parents[1] / "docs"
README = Path(__file__).parents[1] / "README.md"
HEAD = """# Benchmarks

Written by `python -m benchmarks.report` from [benchmarks/results](../benchmarks/results); `make bench` measures. Times
are medians in milliseconds with the 20th to 80th percentile behind; on CUDA the device's, by events, the L2 cache
flushed before each run. GB/s counts the bytes that must move (q, k, v, o; in a backward 7 rows), TFLOP/s the useful
operations (hedgehog: 12 D² a row and head, 28 D² in a backward; softmax: 4 N D and 10 N D); per cent are of a plain
copy and a plain matrix product on the same device. Memory is the peak beside the inputs (and, in a backward, beside
what the forward saved); for blocks, models and training steps it is written as held + peak, weights and optimizer being
held. "host" is how long the host takes to launch a call's kernels. A model's host runs ahead of its GPU; of a call on
its own the larger of the two times counts.
"""


def write(devices: dict[str, list[tuple[dict, dict]]], docs: Path) -> list[Path]:
    """Write benchmarks.md and its plots into `docs`, from what `newest_rows` gives; returns the files."""
    lines, written = [HEAD], []
    for device, pairs in devices.items():
        lines += [f"## {device}", "", *(f"- {run}" for run in results.runs(pairs)), ""]
        for path, title in plots.draw(device, pairs, docs / "benchmarks"):
            written.append(path)
            if path.suffix == ".png":
                lines += [f"![{title}](benchmarks/{path.name})", ""]
        lines += tables.sections(pairs)
    if not devices:
        lines.append("Nothing has been measured yet.")
    docs.mkdir(parents=True, exist_ok=True)
    path = docs / "benchmarks.md"
    path.write_text("\n".join(lines).rstrip() + "\n")
    return [path, *written]


def newest_rows(folder: Path) -> dict[str, list[tuple[dict, dict]]]:
    """For each device that `folder` has results of, the pairs (row, environment of its file) that count."""
    devices: dict[str, dict] = defaultdict(dict)
    for document in results.load(folder):
        for row in document["rows"]:
            key = results.key(row)
            found = devices[document["environment"]["device"]]
            if "ms" in row or "ms" not in found.get(key, ({},))[0]:
                found[key] = (row, document["environment"])
    return {device: list(found.values()) for device, found in devices.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="default: benchmarks/results")
    parser.add_argument("--output", type=Path, default=DOCS, help="default: docs")
    args = parser.parse_args(arguments)
    try:
        devices = newest_rows(args.results)
        print("\n".join(f"wrote {path}" for path in write(devices, args.output)))
        if args.output == DOCS:
            headline.fill(README, devices)
            print(f"wrote the headline of {README}")
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
