"""Charts inside a page: lines and bars, drawn by matplotlib as SVG."""

import io
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from linvideo.reports import html_page

CHOSEN, OTHER = "tab:green", "tab:gray"
Rules = Mapping[str, tuple[str, float]]  # label -> ("x" or "y", value) of a dashed line across a chart


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]],
    x: str,
    y: str,
    colours: Mapping[str, str] | None = None,
    marks: bool = False,
    notes: Sequence[tuple[float, float, str]] = (),
    rules: Rules | None = None,
    width: float = 5.2,
    **axes_options: Any,
) -> str:
    """Return a chart with a line for each series, or "" if there is nothing to draw.

    Args:
        series: Name -> points (x, y).
        x: Label of the horizontal axis.
        y: Label of the vertical axis.
        colours: Name -> colour of its line, at whose end the name then stands. None gives each series a colour of its
            own, and the chart a legend.
        marks: Whether each point gets a dot.
        notes: (x, y, text) of short texts at points.
        rules: Dashed lines across the chart.
        width: Width in inches; the height is 3.
        axes_options: Options of matplotlib's Axes.set, such as yscale="log".
    """
    kept = {name: points for name, points in series.items() if points}
    if not kept:
        return ""
    figure, axes = _figure(width)
    for name, points in kept.items():
        colour = None if colours is None else colours[name]
        axes.plot(*zip(*points, strict=True), label=name, color=colour, linewidth=1.2, marker="o" if marks else None)
    if colours is not None:
        for place, names in _ends(kept):
            axes.annotate(", ".join(names), place, (3, 0), textcoords="offset points", va="center", fontsize=8)
    for a, b, text in notes:
        axes.annotate(text, (a, b), (5, -10), textcoords="offset points", fontsize=9)
    if colours is None and len(kept) > 1:
        axes.legend(fontsize=9, frameon=False)
    return _finished(figure, x, y, rules, axes_options)


def bars(
    values: Mapping[int, float], x: str, y: str, chosen: Collection[int], rules: Rules | None = None, width: float = 5.2
) -> str:
    """Return a chart with a bar for each value on a logarithmic axis, those of `chosen` in green; "" without values
    above 0. The other arguments are those of `lines`."""
    shown = {name: value for name, value in values.items() if value > 0}
    if not shown:
        return ""
    figure, axes = _figure(width)
    axes.bar(list(shown), list(shown.values()), color=[CHOSEN if name in chosen else OTHER for name in shown])
    rules = {label: rule for label, rule in (rules or {}).items() if rule[1] > 0}
    return _finished(figure, x, y, rules, {"yscale": "log", "xticks": list(values)})


def _ends(series: Mapping[str, Sequence[tuple[float, float]]]) -> list[tuple[tuple[float, float], list[str]]]:
    """Return (end of a line, names): lines that end close to each other share a label."""
    heights = [y for points in series.values() for _, y in points]
    found: list[tuple[tuple[float, float], list[str]]] = []
    for name, points in sorted(series.items(), key=lambda item: item[1][-1][1]):
        if found and points[-1][1] - found[-1][0][1] <= 0.04 * (max(heights) - min(heights)):
            found[-1][1].append(name)
        else:
            found.append((points[-1], [name]))
    return found


def _figure(width: float):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 3.0), layout="constrained")
    return figure, figure.subplots()


def _finished(figure, x: str, y: str, rules: Rules | None, axes_options: Mapping[str, Any]) -> str:
    """Return the figure as an <img> with its SVG inside."""
    from matplotlib import rc_context

    axes = figure.axes[0]
    axes.set(xlabel=x, ylabel=y, **axes_options)
    for label, (axis, value) in (rules or {}).items():
        line = axes.axvline if axis == "x" else axes.axhline
        line(value, color="black", linestyle="--", linewidth=0.8)
        place = (value, 0.98) if axis == "x" else (0.01, value)
        at = axes.get_xaxis_transform() if axis == "x" else axes.get_yaxis_transform()
        axes.annotate(label, place, (3, -2 if axis == "x" else 3), at, "offset points", fontsize=8)
    file = io.BytesIO()
    with rc_context({"svg.fonttype": "none", "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"]}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return html_page.image_tag(file.getvalue(), "svg+xml", alt=f"{y} over {x}")
