"""All committed results as tables and plots: `python -m benchmarks.report` writes docs/benchmarks.md and its plots.

Of a figure that was measured more than once on a device the newest counts, if there was one: a peer that was absent
later keeps its older figure, and the table says which run it is from. The same results give the same files, byte
for byte.
"""

import argparse
from collections import defaultdict
from pathlib import Path

from benchmarks import plots, results, tables

DOCS = Path(__file__).parents[1] / "docs"
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


def write(folder: Path = results.FOLDER, docs: Path = DOCS) -> list[Path]:
    """benchmarks.md and the plots of all results in `folder`; returns what was written."""
    devices: dict[str, dict] = defaultdict(dict)
    for document in results.load(folder):
        for row in document["rows"]:
            key = results.key(row)
            found = devices[document["environment"]["device"]]
            if "ms" in row or "ms" not in found.get(key, ({},))[0]:
                found[key] = (row, document["environment"])
    lines, written = [HEAD], []
    for device, found in devices.items():
        pairs = list(found.values())
        lines += [f"## {device}", "", *_measured(pairs), ""]
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


def _measured(pairs: list) -> list[str]:
    """When, at which commit and with which versions."""
    lines = set()
    for _, environment in pairs:
        commit = environment["commit"] or "unknown"
        driver = f", driver {environment['driver']}" if environment["driver"] else ""
        versions = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
        lines.add(f"- {environment['time']}, commit {commit[:12]}{commit[40:]}{driver}: {versions}")
    return sorted(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="default: benchmarks/results")
    parser.add_argument("--output", type=Path, default=DOCS, help="default: docs")
    args = parser.parse_args()
    print("\n".join(f"wrote {path}" for path in write(args.results, args.output)))


if __name__ == "__main__":
    main()
