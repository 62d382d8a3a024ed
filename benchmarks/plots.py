"""Plots of results as PNG and SVG: time over the number of tokens, and speed-up over the number of linear layers."""

from collections import defaultdict
from pathlib import Path

from benchmarks.peers import OURS, SWEEP
from benchmarks.results import slug
from benchmarks.shapes import CPU, CPU_LONG, TOKENS, WINDOW
from benchmarks.tables import BACKENDS


def draw(device: str, pairs: list[tuple[dict, dict]], folder: Path) -> list[tuple[Path, str]]:
    """Draw each plot that the rows of one device allow; returns (file, title) of each. pairs: (row, environment)."""
    made = []
    for shapes in (TOKENS, CPU | CPU_LONG):
        sweep = [(row, env) for row, env in pairs if row["suite"] == "op" and row["shape"] in shapes and "ms" in row]
        for dtype in dict.fromkeys(row["dtype"] for row, _ in sweep):
            chosen = [(row, env) for row, env in sweep if row["dtype"] == dtype and row["name"] in SWEEP]
            made += _over_tokens(device, dtype, chosen, folder) if chosen else []
    models = [row for row, _ in pairs if row["suite"] == "model" and row["how"] == "composed"]
    for dtype in dict.fromkeys(row["dtype"] for row in models):
        made += _over_layers(device, dtype, [row for row in models if row["dtype"] == dtype], folder)
    return made


def _over_tokens(device: str, dtype: str, pairs: list, folder: Path) -> list[tuple[Path, str]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, which in zip(axes, ("forward", "forward+backward"), strict=True):
        lines, least = defaultdict(dict), {}
        for row, env in pairs:
            if row["pass"] == which:
                tokens = row["sizes"][1]
                lines[row["name"]][tokens] = row["ms"]
                if row["name"] == OURS:
                    rates = env["rates"][row["dtype"]]
                    bound = max(row["gbytes"] / rates["copy_gb_s"], row["tflops"] / rates["matmul_tflop_s"])
                    least[tokens] = 1000 * bound
        for name, points in lines.items():
            tokens = sorted(points)
            median, low, high = zip(*(points[n] for n in tokens), strict=True)
            style = {"linestyle": "--"} if name.startswith("softmax") else {}
            style |= {"linewidth": 2.6, "zorder": 3} if name == OURS else {"linewidth": 1.3}
            (line,) = axis.plot(
                tokens, median, marker="o", markersize=3, label=name, color=f"C{SWEEP.index(name)}", **style
            )
            axis.fill_between(tokens, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        if least:
            tokens = sorted(least)
            axis.plot(tokens, [least[n] for n in tokens], color="0.6", linestyle=":", label="roofline of hedgehog")
        axis.set(xscale="log", yscale="log", xlabel="tokens N", ylabel="ms", title=which)
        ticks = sorted({row["sizes"][1] for row, _ in pairs})
        axis.set_xticks(ticks, [f"{n // 1024}k" if n >= 1024 else str(n) for n in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    row = pairs[0][0]
    title = f"Attention on {device}: batch 1, {row['sizes'][2]} heads of {row['sizes'][3]}, {dtype}"
    figure.suptitle(title, fontsize=11)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    return save(figure, folder / f"{slug(device)}-{dtype}-time-over-tokens", title)


def _over_layers(device: str, dtype: str, rows: list[dict], folder: Path) -> list[tuple[Path, str]]:
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(4 * len(names) + 1.5, 4), layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False)
    found = {}  # the lines of all models: a backend may be missing for one of them
    for axis, name in zip(axes[0], names, strict=True):
        lines = defaultdict(dict)
        for row in rows:
            if row["model"] == name:
                lines[row["backend"], row["compiled"]][row["linear_layers"]] = row["ms"][0]
        for (backend, compiled), times in lines.items():
            counts = sorted(times)
            label = f"{BACKENDS.get(backend, backend)}, {'compiled' if compiled else 'eager'}"
            dense = lines[backend.removeprefix(WINDOW), compiled][0]
            speed = [dense / times[n] for n in counts]
            style = {"color": f"C{list(BACKENDS).index(backend)}", "linestyle": "-" if compiled else "--"}
            (found[label],) = axis.plot(counts, speed, marker="o", markersize=3, **style)
        axis.set(xlabel="linear layers", ylabel="speed-up of one forward", title=f"Wan {name}", ylim=(0, None))
        axis.grid(alpha=0.3)
    title = f"Forward of a Wan transformer on {device}, over the dense one with the same softmax; {dtype}"
    figure.suptitle(title, fontsize=11)
    figure.legend(found.values(), found, loc="outside right center", fontsize=8, frameon=False)
    return save(figure, folder / f"{slug(device)}-{dtype}-speed-up-over-layers", title)


def save(figure, stem: Path, title: str) -> list[tuple[Path, str]]:
    """Write the figure as PNG and SVG; the same figure gives the same bytes. Returns (file, title) of both."""
    from matplotlib import rc_context

    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    figure.savefig(paths[0], dpi=120, metadata={"Software": None})
    with rc_context({"svg.hashsalt": "linvideo"}):
        figure.savefig(paths[1], metadata={"Date": None})
    return [(path, title) for path in paths]
