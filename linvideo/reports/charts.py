"""Charts as SVG: lines and bars, drawn here so that a page and a training run need no plotting library."""

import html
import math
from collections.abc import Collection
from dataclasses import dataclass

COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#bcbd22", "#7f7f7f")
CHOSEN, OTHER = "#2ca02c", "#9a9a9a"
HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 300, 66, 26, 26, 46  # pixels


@dataclass
class Axis:
    """An axis from `low` to `high`.

    Args:
        label: The name of the quantity along it.
        low: The value at its start.
        high: The value at its end.
        log: Whether it is logarithmic; then both are positive.
    """

    label: str
    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        """Return where the value is: 0 at the start, 1 at the end."""
        scale = math.log if self.log else float
        return (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))

    def ticks(self) -> list[float]:
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            every = max(1, len(decades) // 5)
            digits = (1, 2, 5) if self.high < 300 * self.low else (1,)
            found = [digit * 10.0**decade for decade in decades[::every] for digit in digits]
        else:
            rough = (self.high - self.low) / 6
            power = 10.0 ** math.floor(math.log10(rough))
            step = next(power * digit for digit in (1, 2, 5, 10) if power * digit >= 0.999 * rough)
            found = [step * number for number in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        return [value for value in found if self.low <= value * (1 + 1e-9) and value <= self.high * (1 + 1e-9)]


def fitting(label: str, values: Collection[float], log: bool = False) -> Axis:
    """Return an axis that holds these values, with some space around them."""
    low, high = min(values), max(values)
    if log:
        margin = max((high / low) ** 0.06, 1.1)
        return Axis(label, low / margin, high * margin, True)
    margin = 0.04 * (high - low) or 0.5
    return Axis(label, low - margin, high + margin)


def lines(
    series: dict[str, list[tuple[float, float]]],
    x: str,
    y: str,
    log_x: bool = False,
    log_y: bool = False,
    y_range: tuple[float, float] | None = None,
    colours: dict[str, str] | None = None,
    marks: bool = False,
    notes: list[tuple[float, float, str]] = (),
    rules: dict[str, tuple[str, float]] | None = None,
    width: int = 520,
) -> str:
    """Return a chart with a line for each series; "" where there is nothing to draw.

    Args:
        series: Name -> points (x, y). On a logarithmic axis those that are not positive are left out.
        x: The label of the horizontal axis.
        y: The label of the vertical axis.
        log_x: Whether the horizontal axis is logarithmic.
        log_y: Whether the vertical axis is logarithmic.
        y_range: The range of the vertical axis; None fits it to the points.
        colours: Name -> colour of its line, whose name then stands at its end; None gives each series its own colour,
            and the chart a legend.
        marks: Whether each point gets a dot.
        notes: (x, y, text) of short texts at points.
        rules: Label -> ("x" or "y", value) of dashed lines across the chart.
        width: Pixels.
    """
    rules = rules or {}
    kept = {
        name: [(a, b) for a, b in points if (a > 0 or not log_x) and (b > 0 or not log_y)]
        for name, points in series.items()
    }
    kept = {name: points for name, points in kept.items() if points}
    if not kept:
        return ""
    across, up = zip(*(point for points in kept.values() for point in points), strict=True)
    ruled = {axis: [value for where, value in rules.values() if where == axis] for axis in "xy"}
    x_axis = fitting(x, [*across, *ruled["x"]], log_x)
    y_axis = fitting(y, [*up, *ruled["y"]], log_y) if y_range is None else Axis(y, *y_range, log_y)
    chart = _Chart(x_axis, y_axis, width)
    for label, (where, value) in rules.items():
        chart.rule(label, where, value)
    taken: list[float] = []
    for number, (name, points) in enumerate(kept.items()):
        colour = COLOURS[number % len(COLOURS)] if colours is None else colours[name]
        chart.line(points, colour, marks)
        if colours is None and len(series) > 1:
            chart.legend(name, colour)
        elif colours is not None and (end := chart.at(*points[-1])[1]) not in taken:
            if all(abs(end - other) > 9 for other in taken):  # else they would cover each other
                chart.text(chart.at(*points[-1])[0] + 4, end + 4, name, "start", 10)
                taken.append(end)
    for a, b, text in notes:
        place = chart.at(a, b)
        chart.text(place[0] + 6, place[1] + 14, text, "start")
    return chart.svg()


def bars(
    values: dict[int, float],
    x: str,
    y: str,
    chosen: Collection[int] = (),
    rules: dict[str, tuple[str, float]] | None = None,
    width: int = 520,
) -> str:
    """Return a chart with a bar for each value, on a logarithmic axis; those of `chosen` are green. "" without values
    above 0. The other arguments are those of `lines`."""
    shown = {name: value for name, value in values.items() if value > 0}
    if not shown:
        return ""
    rules = {label: rule for label, rule in (rules or {}).items() if rule[1] > 0}
    y_axis = fitting(y, [*shown.values(), *(value for _, value in rules.values())], log=True)
    y_axis.low /= 1.5  # the smallest one has a bar, too
    numbers = list(values)
    chart = _Chart(Axis(x, min(numbers) - 0.6, max(numbers) + 0.6), y_axis, width, x_ticks=numbers)
    for name, value in shown.items():
        chart.bar(name, value, CHOSEN if name in chosen else OTHER)
    for label, (where, value) in rules.items():
        chart.rule(label, where, value)
    return chart.svg()


class _Chart:
    """Axes, and what is drawn between them."""

    def __init__(self, x: Axis, y: Axis, width: int, x_ticks: list[int] | None = None):
        self.x, self.y, self.width, self.parts = x, y, width, []
        self.legend_end = float(LEFT)
        bottom, right = HEIGHT - BOTTOM, width - RIGHT
        for value in x.ticks() if x_ticks is None else x_ticks:
            place = self.at(value, y.low)[0]
            self.parts.append(f"<path d='M{place:.1f} {TOP}V{bottom}' stroke='#eee'/>")
            self.text(place, bottom + 16, f"{value:g}", "middle")
        for value in y.ticks():
            place = self.at(x.low, value)[1]
            self.parts.append(f"<path d='M{LEFT} {place:.1f}H{right}' stroke='#eee'/>")
            self.text(LEFT - 6, place + 4, f"{value:g}", "end")
        self.parts.append(f"<path d='M{LEFT} {TOP}V{bottom}H{right}' stroke='#888' fill='none'/>")
        self.text((LEFT + right) / 2, HEIGHT - 8, x.label, "middle")
        middle = (TOP + bottom) / 2
        self.parts.append(
            f"<text x='14' y='{middle}' transform='rotate(-90 14 {middle})' text-anchor='middle' font-size='12'>"
            f"{html.escape(y.label)}</text>"
        )

    def at(self, x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + self.x.place(x) * (self.width - LEFT - RIGHT),
            HEIGHT - BOTTOM - self.y.place(y) * (HEIGHT - TOP - BOTTOM),
        )

    def text(self, x: float, y: float, text: str, anchor: str, size: int = 11) -> None:
        place = f"x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' font-size='{size}'"
        self.parts.append(f"<text {place}>{html.escape(text)}</text>")

    def line(self, points: list[tuple[float, float]], colour: str, marks: bool) -> None:
        places = [self.at(*point) for point in points]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        self.parts.append(f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='1.5'/>")
        if marks:
            self.parts += [f"<circle cx='{a:.1f}' cy='{b:.1f}' r='3.5' fill='{colour}'/>" for a, b in places]

    def bar(self, x: float, y: float, colour: str) -> None:
        (left, top), (right, bottom) = self.at(x - 0.38, y), self.at(x + 0.38, self.y.low)
        place = f"x='{left:.1f}' y='{top:.1f}' width='{right - left:.1f}' height='{bottom - top:.1f}'"
        self.parts.append(f"<rect {place} fill='{colour}'/>")

    def rule(self, label: str, where: str, value: float) -> None:
        a, b = self.at(value, self.y.low) if where == "x" else self.at(self.x.low, value)
        path = f"M{a:.1f} {TOP}V{HEIGHT - BOTTOM}" if where == "x" else f"M{LEFT} {b:.1f}H{self.width - RIGHT}"
        self.parts.append(f"<path d='{path}' stroke='#333' stroke-dasharray='4 3'/>")
        place = (a + 4, TOP + 10) if where == "x" else (LEFT + 6, b - 4)
        self.text(*place, label, "start", 10)

    def legend(self, name: str, colour: str) -> None:
        start = self.legend_end
        self.parts.append(f"<path d='M{start} 12h16' stroke='{colour}' stroke-width='3'/>")
        self.text(start + 20, 16, name, "start")
        self.legend_end = start + 36 + 6.5 * len(name)

    def svg(self) -> str:
        label = html.escape(f"{self.y.label} over {self.x.label}")
        size = f"width='{self.width}' height='{HEIGHT}' viewBox='0 0 {self.width} {HEIGHT}'"
        look = f"role='img' aria-label='{label}' font-family='system-ui, sans-serif'"
        return f"<svg {size} {look}>{''.join(self.parts)}</svg>"
