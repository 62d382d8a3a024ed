"""Plots of an ablation result: quality over the number of linear layers, convergence, and the chosen layers."""

import statistics
from pathlib import Path

from benchmarks.ablations.settings import DEFAULT, SETTINGS
from benchmarks.plots import save
from benchmarks.results import slug


def draw(document: dict, folder: Path) -> list[tuple[Path, str]]:
    """Draw each plot that the rows allow; returns (file, title) of each."""
    rows = document["rows"]
    stem = slug(f"{document['suite']['world']} {document['environment']['device']}")
    made = []
    for name, draw_one in (("target", _target), ("convergence", _convergence), ("layers", _layers)):
        figure, title = draw_one(rows)
        if figure is not None:
            made += save(figure, folder / f"{stem}-{name}", title)
    return made


def _figure(columns: int, height: float = 3.8):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * columns, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _by_setting(rows: list[dict], group: str) -> dict[str, list[dict]]:
    """Return the rows of the default and of a group, by setting, in the order of SETTINGS."""
    chosen: dict[str, list[dict]] = {}
    for name, setting in SETTINGS.items():
        if (name == DEFAULT.name or group in setting.groups) and (
            found := [row for row in rows if row["setting"] == name]
        ):
            chosen[name] = found
    return chosen


def _target(rows: list[dict]):
    points: dict[int, list[dict]] = {}
    for found in _by_setting(rows, "target").values():
        for row in found:
            points.setdefault(len(row["layers_linear"]), []).append(row)
    if len(points) < 3:  # two make a line, but no curve
        return None, ""
    counts = sorted(points)
    shown = (("good", "good, %", 100), ("psnr_to_teacher", "PSNR to the teacher, dB", 1))
    shown += (("own_state_error", "velocity error on own states", 1),)
    figure, axes = _figure(len(shown))
    for axis, (key, label, by) in zip(axes, shown, strict=True):
        for row in (row for found in points.values() for row in found if row.get(key) is not None):
            axis.plot(len(row["layers_linear"]), by * row[key], ".", color="0.6")
        means = [statistics.fmean(by * row[key] for row in points[n] if row.get(key) is not None) for n in counts]
        axis.plot(counts, means, "o-")
        axis.set(xlabel="linear layers", ylabel=label, xticks=counts)
        axis.grid(alpha=0.3)
    axes[-1].set_yscale("log")
    title = "Quality over the number of linear layers: mean, and each seed"
    figure.suptitle(title, fontsize=11)
    return figure, title


def _convergence(rows: list[dict]):
    groups = [group for group in ("objective", "objective, every second layer") if len(_by_setting(rows, group)) > 1]
    if not groups:
        return None, ""
    figure, axes = _figure(len(groups), 6)
    for axis, group in zip(axes, groups, strict=True):
        chosen = {name: found for name, found in _by_setting(rows, group).items() if found[0]["steps"]}
        if group != "objective":
            chosen.pop(DEFAULT.name, None)
        for number, (name, found) in enumerate(chosen.items()):
            curves = [row["curve"] for row in found if len(row["curve"]) == len(found[0]["curve"])]
            shares = [point[0] for point in curves[0]]
            columns = [[curve[i][1] for curve in curves] for i in range(len(shares))]
            (line,) = axis.plot(
                shares,
                [statistics.median(column) for column in columns],
                "-" if number < 10 else "--",
                label=name.removeprefix("every second, "),
                color=f"C{number % 10}",
                linewidth=2.4 if name == DEFAULT.name else 1.4,
            )
            axis.fill_between(shares, *zip(*map(_ends, columns), strict=True), color=line.get_color(), alpha=0.12)
        axis.set(xlabel="share of the fine-tuning time", ylabel="velocity error on own states", yscale="log")
        axis.set_title("learned layers" if group == "objective" else "every second layer", fontsize=10)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    title = "Convergence: median over seeds, and their range"
    figure.suptitle(title, fontsize=11)
    return figure, title


def _ends(values: list[float]) -> tuple[float, float]:
    return min(values), max(values)


def _layers(rows: list[dict]):
    names = [DEFAULT.name, "lowest sensitivity", *_by_setting(rows, "selection")]
    names = [name for name in dict.fromkeys(names) if any(row["setting"] == name for row in rows)]
    if len(names) < 2:
        return None, ""
    found = {name: [set(row["layers_linear"]) for row in rows if row["setting"] == name] for name in names}
    num_layers = 1 + max(int(layer) for row in rows for layer in row.get("sensitivity", {}))
    share = [[sum(i in one for one in found[name]) / len(found[name]) for i in range(num_layers)] for name in names]
    figure, (axis,) = _figure(1, 1.4 + 0.3 * len(names))
    figure.set_figwidth(3.5 + 0.45 * num_layers)
    image = axis.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axis.set_xticks(range(num_layers))
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_xlabel("layer")
    figure.colorbar(image, ax=axis, label="share of seeds")
    title = "Layers that became linear"
    axis.set_title(title, fontsize=11)
    return figure, title
