"""An analysis as text for the terminal, and as report.html, a single file with its plots inside."""

import shlex
from pathlib import Path

from linvideo.evaluation.analyze import MAPS, Analysis, LayerSet
from linvideo.models.describe import ranges
from linvideo.nn import Window
from linvideo.reports import charts, html_page
from linvideo.trajectories.atomic_files import write_text

LAYER_COLUMNS = ["attention output", "velocity error", "of the velocity"]
SET_COLUMNS = ["velocity error", "of the velocity", "ms (p20 - p80)", "speedup", "layers"]
PATH = (  # with several kinds
    "Each set changes one more layer to a faster kind: the one whose error by itself rises least for the milliseconds"
    " saved. If no such set has all layers of a kind, that one comes last."
)


def text(analysis: Analysis, folder: str | Path) -> str:
    """Return the analysis as text for the terminal. `folder` is its output_dir."""
    one = len(analysis.kinds) == 1
    files = ["analysis.json", "report.html", *(MAPS[kind] for kind in analysis.kinds)]
    return "\n".join(
        [
            heading(analysis),
            "",
            f"each layer {_kinds(analysis)} by itself, after the fit of its feature maps",
            *_columns([layer_columns(analysis), *layer_rows(analysis)]),
            "",
            f"the n least sensitive layers {_kinds(analysis)} together" if one else PATH,
            *_columns([set_columns(analysis), *set_rows(analysis)]),
            "",
            *conclusion(analysis),
            *(line for pair in commands(analysis, folder) for line in pair),
            f"{', '.join(files[:-1])} and {files[-1]} are in {folder}",
        ]
    )


def write_report(analysis: Analysis, folder: str | Path) -> None:
    """Write report.html into the analysis's output_dir."""
    one = len(analysis.kinds) == 1
    order = f"The least sensitive layers, in the order of the ranks above, are {_kinds(analysis)} together."
    sections = [
        (
            "Proposal",
            "".join(map(html_page.note, conclusion(analysis))) + html_page.commands(commands(analysis, folder)),
        ),
        (
            f"Each layer {_kinds(analysis)} by itself",
            draw_layers(analysis)
            + html_page.table(layer_columns(analysis), layer_rows(analysis))
            + html_page.note(
                f"attention output: |{_kinds(analysis)} - softmax|² / |softmax|² after the fit of the feature maps."
                f" velocity error: mean |u - u_teacher|² over {analysis.states} states of the teacher. of the velocity:"
                f" share of the mean |u_teacher|², {analysis.velocity_square:.4g}. Without {_kinds(analysis)} layers"
                f" the error is {analysis.floor:.2g}."
            ),
        ),
        (
            "Sets of layers",
            draw_sets(analysis)
            + html_page.table(set_columns(analysis), set_rows(analysis))
            + html_page.note(
                f"{order if one else PATH} Errors of layers do not add, so each set is measured. The times are those of"
                " one whole forward with batch 1, without gradients; speedups are over the stock model. With guidance a"
                " step takes two such forwards."
            ),
        ),
    ]
    write_text(Path(folder) / "report.html", html_page.page("linvideo analyze", heading(analysis), sections))


def heading(analysis: Analysis) -> str:
    height, width, frames = analysis.size
    environment = analysis.environment
    saved = " and ".join(f"each {kind} layer saves {analysis.saved(kind):.3g} ms" for kind in analysis.kinds)
    window = ""
    if analysis.window is not None:
        window = (
            f"; window layers have {Window.of(analysis.window)} and keep {100 * analysis.softmax_pairs:.0f}% of the"
            " pairs of tokens in softmax"
        )
    return (
        f"{analysis.model}: {analysis.num_layers} layers; one forward of {height} x {width}, {frames} frames"
        f" ({analysis.tokens:,} tokens) takes {analysis.milliseconds.median:.4g} ms, of which {saved}{window}"
        f" ({environment['device']}, {environment['dtype']}, PyTorch {environment['torch']}, diffusers"
        f" {environment['diffusers']})"
    )


def conclusion(analysis: Analysis) -> list[str]:
    """Return the proposal in words, or why there is none, and which kind of layer is slower than softmax."""
    slow = [kind for kind in analysis.kinds if analysis.saved(kind) <= 0]
    if len(slow) == len(analysis.kinds):  # the proposal says so
        slow = []
    return _proposal(analysis) + [
        f"{kind.capitalize()} layers are slower than softmax layers at this size on this device: with all layers"
        f" {kind}, the speedup is {analysis.whole(kind).speedup:.2f}."
        for kind in slow
    ]


def _proposal(analysis: Analysis) -> list[str]:
    wanted, proposal = analysis.wanted_speedup, analysis.proposal
    fastest = max(analysis.sets, key=lambda chosen: chosen.speedup)
    if fastest.speedup <= 1:
        return [
            "No set of layers is faster at this size on this device: the best has"
            f" {fastest.speedup:.2f} times the speed of the stock model. {_kinds(analysis).capitalize()} attention pays"
            f" off for longer videos or larger frames: these are {analysis.tokens:,} tokens."
        ]
    if wanted is None:
        return ["No speedup was requested, so no set of layers is proposed."]
    if proposal is None:
        return [
            f"No set of layers reaches a speedup of {wanted:g} at this size on this device: the fastest,"
            f" {' and '.join(f'{len(own)} {kind} layers' for kind, own in fastest.by_kind.items())}, has"
            f" {fastest.speedup:.2f}."
        ]
    return [
        f"Proposed for a speedup of {wanted:g}: layers {_listed(proposal)}, with a measured speedup of"
        f" {proposal.speedup:.2f} and an error of {_share(analysis, proposal.velocity_error)} of the velocity."
    ]


def commands(analysis: Analysis, folder: str | Path) -> list[tuple[str, str]]:
    """Return the next steps of the proposal, each with its purpose and its command line; [] without a proposal."""
    if analysis.proposal is None:
        return []
    layers, window_layers = analysis.proposal.layers, analysis.proposal.window_layers
    model, kinds = shlex.quote(analysis.model), analysis.proposal.by_kind
    found, source = [], model
    for place, (kind, own) in enumerate(kinds.items(), 1):
        maps = shlex.quote(str(Path(folder) / MAPS[kind]))
        mode = f" --mode window {_window_options(analysis)}" if kind == "window" else ""
        target = "converted" if place == len(kinds) else f"converted-{kind}"
        found.append(
            (
                "To convert without training, with the fitted feature maps:" if place == 1 else "and then:",
                f"linvideo convert {source} --dtype {analysis.environment['dtype']}"
                f" --layers {' '.join(map(str, own))}{mode} --fitted_maps {maps} --output_dir {target}",
            )
        )
        source = target
    selection = f'--selection.layers "{layers}" --selection.num_linear_layers {len(layers) or "null"}'
    if window_layers:
        selection += f' --selection.window_layers "{window_layers}" {_window_options(analysis, yaml=True)}'
    purpose = f"To train with these layers {' and '.join(kinds)}, which is better (docs/training.md lists the recipes):"
    train = f"linvideo train {model} --config RECIPE --selection.method layers {selection} --output_dir run"
    return [*found, (purpose, train)]


def _window_options(analysis: Analysis, yaml: bool = False) -> str:
    """Return the window's settings as options of `linvideo convert`, or as those of `linvideo train`, in YAML."""
    window = Window.of(analysis.window)
    options = [f"--window.chunk {window.chunk} --window.overlap {window.overlap}"]
    if window.anchors:
        options.append("--window.anchors " + (f'"[{", ".join(window.anchors)}]"' if yaml else " ".join(window.anchors)))
    if window.causal:
        options.append("--window.causal" + (" true" if yaml else ""))
    return " ".join(options)


def layer_columns(analysis: Analysis) -> list[str]:
    """Return the columns of `layer_rows`. With several kinds, each figure has a column per kind, but no rank."""
    if len(analysis.kinds) == 1:
        return ["layer", *LAYER_COLUMNS, "rank"]
    first, *others = analysis.kinds
    return ["layer", *(title for column in LAYER_COLUMNS for title in (f"{column}: {first}", *others))]


def layer_rows(analysis: Analysis) -> list[list]:
    rows: list[list] = []
    for layer in range(analysis.num_layers):
        outputs = [output_errors[layer] for output_errors, _ in analysis.kinds.values()]
        errors = [sensitivity[layer] for _, sensitivity in analysis.kinds.values()]
        rows.append([layer, *outputs, *errors, *(_share(analysis, error) for error in errors)])
    if len(analysis.kinds) == 1:
        (_, alone), *_ = analysis.kinds.values()
        for rank, layer in enumerate(sorted(alone, key=alone.get), 1):
            rows[layer].append(rank)
    return rows


def set_columns(analysis: Analysis) -> list[str]:
    return [*analysis.kinds, *SET_COLUMNS]


def set_rows(analysis: Analysis) -> list[list]:
    none = [0] * len(analysis.kinds)
    rows = [[*none, analysis.floor, _share(analysis, analysis.floor), _milliseconds(analysis), "1.00", "none"]]
    for chosen in analysis.sets:
        error, own = chosen.velocity_error, chosen.by_kind
        row = [*(len(own.get(kind, [])) for kind in analysis.kinds), error, _share(analysis, error)]
        listed = _listed(chosen) if len(analysis.kinds) > 1 else ranges(sorted(sum(own.values(), [])))
        rows.append([*row, _milliseconds(chosen), f"{chosen.speedup:.2f}", listed])
    return rows


def draw_layers(analysis: Analysis) -> str:
    return "".join(_draw_kind(analysis, kind) for kind in analysis.kinds)


def _draw_kind(analysis: Analysis, kind: str) -> str:
    proposed = [] if analysis.proposal is None else analysis.proposal.by_kind.get(kind, [])
    label = "layer, counted from 0" + (" (green: proposed)" if proposed else "")
    what, rules = f"velocity error with this layer {kind}", {f"no {kind} layer": ("y", analysis.floor)}
    return charts.bars(analysis.kinds[kind][1], label, what, proposed, rules=rules, width=9)


def draw_sets(analysis: Analysis) -> str:
    points = [(chosen.speedup, chosen.velocity_error) for chosen in analysis.sets]
    names = list(analysis.kinds)
    numbers = [" + ".join(str(len(chosen.by_kind.get(kind, []))) for kind in names) for chosen in analysis.sets]
    series = {"sets": points if len(names) == 1 else sorted(points)}
    if analysis.proposal is not None:
        series["proposed"] = [(analysis.proposal.speedup, analysis.proposal.velocity_error)]
    return charts.lines(
        series,
        f"speedup of one forward over the stock model (labels: number of {' + '.join(names)} layers)",
        "velocity error of the set",
        yscale="log",
        marks=True,
        notes=[(*point, number) for point, number in zip(points, numbers, strict=True)],
        rules={} if analysis.wanted_speedup is None else {"wanted": ("x", analysis.wanted_speedup)},
        width=9,
    )


def _kinds(analysis: Analysis) -> str:
    return " or ".join(analysis.kinds)


def _listed(chosen: LayerSet) -> str:
    """Return the layers of a set by kind, such as "0-2, 5 linear and 3-4 window"."""
    return " and ".join(f"{ranges(own)} {kind}" for kind, own in chosen.by_kind.items())


def _columns(rows: list[list]) -> list[str]:
    """Return the rows as lines of text in which all columns except the last are right-aligned."""
    cells = [[f"{x:.4g}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join([*(x.rjust(w) for x, w in zip(row[:-1], widths, strict=False)), row[-1]]).rstrip() for row in cells
    ]


def _share(analysis: Analysis, error: float) -> str:
    return f"{100 * error / analysis.velocity_square:.2g}%"


def _milliseconds(measured: Analysis | LayerSet) -> str:
    median, p20, p80 = measured.milliseconds
    return f"{median:.4g} ({p20:.4g} - {p80:.4g})"
