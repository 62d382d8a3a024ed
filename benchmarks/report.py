"""Show all committed results: `python -m benchmarks.report` writes docs/benchmarks.md, its plots and README's headline.

Where a device has several measurements of the same thing, the newest counts. A peer that was absent later keeps its
older figure, and the table says which run each figure is from. The same results give the same files, byte for byte.
"""

import argparse
from collections import defaultdict
from pathlib import Path

from benchmarks import headline, plots, results, tables

DOCS = Path(__file__).parents[1] / "docs"
README = Path(__file__).parents[1] / "README.md"
HEAD = """# Benchmarks

This page is written by `python -m benchmarks.report` from the files in [benchmarks/results](../benchmarks/results).

## How to measure

| command | what it measures | what it needs |
| --- | --- | --- |
| `make bench` | the ops and what they can be compared with, over the number of tokens | a CPU or a CUDA GPU |
| `make bench ARGS="--suite op,block,model,train"` | also blocks, models and training steps | a CUDA GPU, an hour |
| `make evidence` | the kernels' tests and the most important figures | a CUDA GPU, ten minutes |
| `python -m benchmarks.host` | how long the CPU works to launch one call of `linear_attn` | Triton, no GPU |
| `python -m benchmarks.attention_distance MODEL` | how far the softmax attention of each layer reaches | the model |

The first two write their results into benchmarks/results and then this page. `make evidence` writes its results into
runs/evidence; copy them to benchmarks/results and run `python -m benchmarks.report`.

The ops are compared with eager and compiled PyTorch, every softmax backend of PyTorch, FlashAttention 2 to 4,
SageAttention, a block-sparse FlexAttention, FlexAttention over the windows alone, SLA, flash-linear-attention (causal)
and flash-bidirectional-linear-attention, where they are installed; `--peers WORD` runs only some. Where time is short,
`--part 1/8` to `8/8` divide the work, and `--time_limit SECONDS` starts no new row after that time.

Window attention has a row for each softmax backend that can compute its near part; the row without a backend's name is
the default one. `--peers window` runs these rows and FlexAttention over the same windows, which leaves the far frames
out, and `--peers window SDPA --shapes cpu-wan-n4095 cpu-wan-n8190` is a comparison for a CPU, with Wan's 21 frames and
heads of 128. All rows use the default window of converted models, chunks of 3 latent frames with an overlap of 1.
Shapes that are no model's are divided into 16 frames. The block and model suites also have rows in which all layers, or
all that are not linear, are window layers.

`python -m benchmarks.host` times Python, PyTorch's dispatch and Triton's launches until the last kernel of a call is
launched, on tensors without memory and with launches that start nothing. A model whose kernels take less time than this
waits for the host; CUDA graphs help there. `--shape` selects one of the attention shapes, and `--against REV` times
another git revision alternately with this tree. Compare only the two columns of one run: a busy machine can be twice as
slow from one minute to the next. The command prints its table and writes no file;
[kernels/README.md](../kernels/README.md) has figures.

## How to read the tables

N is the number of tokens and D the size of a head.

- **Times** are medians in milliseconds, followed by the 20th to 80th percentile in brackets. On a GPU they are measured
  on the device, with the L2 cache flushed before each run.
- **GB/s** counts the bytes that must be read or written: the rows of q, k, v and the output in a forward, and seven
  rows in a backward. The percentage in brackets is relative to a plain copy on the same device.
- **% of pairs** is the share of all pairs of tokens for which a row computes softmax: 22% for windows in the 21 latent
  frames of a Wan video. The fewer frames, the larger it is. Window attention covers the other pairs, too, but linearly.
- **TFLOP/s** counts the useful operations. Per row and head these are 12 D² in a forward and 28 D² in a backward for
  hedgehog, and 4 N D and 10 N D for softmax. Windows count both, with softmax for the pairs that they keep. The
  percentage is relative to a plain matrix product on the same device.
- **MiB** is the peak memory on top of the inputs and, in a backward, of what the forward saved. For blocks, models and
  training steps it is written as held + peak, where the weights and the optimizer's state are held.
- **host** is how long the CPU takes to launch the kernels of a call. In a model the CPU runs ahead of the GPU, so that
  this time is hidden; for a single call the larger of the two times counts.
"""


def write(devices: dict[str, list[tuple[dict, dict]]], docs: Path) -> list[Path]:
    """Write benchmarks.md and its plots into `docs`; returns the files. devices: see `newest_rows`."""
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
    """Return the pairs (row, environment of its file) that count, for each device that `folder` has results of."""
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
    parser.add_argument(
        "--results", type=Path, default=results.FOLDER, help="folder of result files (default: benchmarks/results)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=DOCS,
        help="folder for benchmarks.md; README.md is only filled with the default (docs)",
    )
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
