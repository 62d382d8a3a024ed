"""An analysis as text for the terminal, and as report.html, a single file with its plots inside."""

import shlex
from pathlib import Path

from linvideo.evaluation.analyze import Analysis, LayerSet
from linvideo.models.describe import ranges
from linvideo.reports import charts, html_page
from linvideo.run.run_folder import FEATURE_MAPS
from linvideo.trajectories.atomic_files import write_text

LAYER_COLUMNS = ["layer", "attention output", "velocity error", "of the velocity", "rank"]
SET_COLUMNS = ["linear", "velocity error", "of the velocity", "ms (p20 - p80)", "speedup", "layers"]


def text(analysis: Analysis, folder: str | Path) -> str:
    """Return the analysis as text for the terminal. `folder` is its output_dir."""
    return "\n".join(
        [
            heading(analysis),
            "",
            "each layer linear by itself, after the fit of its feature maps",
            *_columns([LAYER_COLUMNS, *layer_rows(analysis)]),
            "",
            "the n least sensitive layers linear together",
            *_columns([SET_COLUMNS, *set_rows(analysis)]),
            "",
            *conclusion(analysis),
            *(line for pair in commands(analysis, folder) for line in pair),
            f"analysis.json, report.html and {FEATURE_MAPS} are in {folder}",
        ]
    )


def write_report(analysis: Analysis, folder: str | Path) -> None:
    """Write report.html into the analysis's output_dir."""
    sections = [
        (
            "Proposal",
            "".join(map(html_page.note, conclusion(analysis))) + html_page.commands(commands(analysis, folder)),
        ),
        (
            "Each layer linear by itself",
            draw_layers(analysis)
            + html_page.table(LAYER_COLUMNS, layer_rows(analysis))
            + html_page.note(
                "attention output: |linear - softmax|² / |softmax|² after the fit of the feature maps. velocity error:"
                f" mean |u - u_teacher|² over {analysis.states} states of the teacher. of the velocity: share of the"
                f" mean |u_teacher|², {analysis.velocity_square:.4g}. Without linear layers the error is"
                f" {analysis.floor:.2g}."
            ),
        ),
        (
            "Sets of layers",
            draw_sets(analysis)
            + html_page.table(SET_COLUMNS, set_rows(analysis))
            + html_page.note(
                "The least sensitive layers, in the order of the ranks above, are linear together. Errors of layers do"
                " not add, so each set is measured. The times are those of one whole forward with batch 1, without"
                " gradients; speedups are over the stock model. With guidance a step takes two such forwards."
            ),
        ),
    ]
    write_text(Path(folder) / "report.html", html_page.page("linvideo analyze", heading(analysis), sections))


def heading(analysis: Analysis) -> str:
    height, width, frames = analysis.size
    environment = analysis.environment
    return (
        f"{analysis.model}: {len(analysis.sensitivity)} layers; one forward of {height} x {width}, {frames} frames"
        f" ({analysis.tokens:,} tokens) takes {analysis.milliseconds.median:.4g} ms, of which each linear layer saves"
        f" {analysis.milliseconds_saved:.3g} ms ({environment['device']}, {environment['dtype']}, PyTorch"
        f" {environment['torch']}, diffusers {environment['diffusers']})"
    )


def conclusion(analysis: Analysis) -> list[str]:
    """Return the proposal in words, or why there is none."""
    wanted, proposal = analysis.wanted_speedup, analysis.proposal
    fastest = max(analysis.sets, key=lambda chosen: chosen.speedup)
    if fastest.speedup <= 1:
        return [
            "No set of layers is faster at this size on this device: the best has"
            f" {fastest.speedup:.2f} times the speed of the stock model. Linear attention pays off for longer videos"
            f" or larger frames: these are {analysis.tokens:,} tokens."
        ]
    if wanted is None:
        return ["No speedup was requested, so no set of layers is proposed."]
    if proposal is None:
        return [
            f"No set of layers reaches a speedup of {wanted:g} at this size on this device: the fastest,"
            f" {len(fastest.layers)} linear layers, has {fastest.speedup:.2f}."
        ]
    return [
        f"Proposed for a speedup of {wanted:g}: layers {ranges(proposal.layers)} linear, with a measured speedup of"
        f" {proposal.speedup:.2f} and an error of {_share(analysis, proposal.velocity_error)} of the velocity."
    ]


def commands(analysis: Analysis, folder: str | Path) -> list[tuple[str, str]]:
    """Return the next steps of the proposal, each with its purpose and its command line; [] without a proposal."""
    if analysis.proposal is None:
        return []
    layers, model = analysis.proposal.layers, shlex.quote(analysis.model)
    maps = shlex.quote(str(Path(folder) / FEATURE_MAPS))
    return [
        (
            "To convert without training, with the fitted feature maps:",
            f"linvideo convert {model} --dtype {analysis.environment['dtype']}"
            f" --layers {' '.join(map(str, layers))} --fitted_maps {maps} --output_dir converted",
        ),
        (
            "To train with these layers linear, which is better (docs/training.md lists the recipes):",
            f"linvideo train {model} --config RECIPE --selection.method layers"
            f' --selection.layers "{layers}" --selection.num_linear_layers {len(layers)} --output_dir run',
        ),
    ]


def layer_rows(analysis: Analysis) -> list[list]:
    ranks = {layer: rank for rank, layer in enumerate(sorted(analysis.sensitivity, key=analysis.sensitivity.get), 1)}
    return [
        [layer, analysis.attention_output_errors[layer], error, _share(analysis, error), ranks[layer]]
        for layer, error in analysis.sensitivity.items()
    ]


def set_rows(analysis: Analysis) -> list[list]:
    rows = [[0, analysis.floor, _share(analysis, analysis.floor), _milliseconds(analysis), "1.00", "none"]]
    for chosen in analysis.sets:
        error = chosen.velocity_error
        row = [len(chosen.layers), error, _share(analysis, error), _milliseconds(chosen)]
        rows.append([*row, f"{chosen.speedup:.2f}", ranges(chosen.layers)])
    return rows


def draw_layers(analysis: Analysis) -> str:
    proposed = [] if analysis.proposal is None else analysis.proposal.layers
    label = "layer, counted from 0" + (" (green: proposed)" if proposed else "")
    rules = {"no linear layer": ("y", analysis.floor)}
    return charts.bars(
        analysis.sensitivity, label, "velocity error with this layer linear", proposed, rules=rules, width=9
    )


def draw_sets(analysis: Analysis) -> str:
    points = [(chosen.speedup, chosen.velocity_error) for chosen in analysis.sets]
    series = {"sets": points}
    if analysis.proposal is not None:
        series["proposed"] = [(analysis.proposal.speedup, analysis.proposal.velocity_error)]
    return charts.lines(
        series,
        "speedup of one forward over the stock model (labels: number of linear layers)",
        "velocity error of the set",
        yscale="log",
        marks=True,
        notes=[(*point, str(len(chosen.layers))) for point, chosen in zip(points, analysis.sets, strict=True)],
        rules={} if analysis.wanted_speedup is None else {"wanted": ("x", analysis.wanted_speedup)},
        width=9,
    )


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
