"""The section of a report that shows which layers became linear, and why."""

from collections.abc import Mapping, Sequence

from linvideo.reports import charts, html_page

MEANING = (
    "Sensitivity: the velocity error with that layer alone converted, after the warm-up. r: the learned share of"
    " softmax attention in a layer's output while all layers are mixed, before it was rounded to softmax (1) or linear"
    " (0)."
)


def layer_choice(
    linear: Sequence[int], sensitivity: Mapping[int, float], r: Mapping[int, float], windows: Sequence[int] = ()
) -> str:
    """Return the section as HTML.

    Args:
        linear: The linear layers.
        sensitivity: Layer -> velocity error with it alone converted; empty in a run without that pass.
        r: Layer -> its value before rounding; empty where r was not learned.
        windows: The window layers.
    """
    columns = {"sensitivity": sensitivity, "r before rounding": r}
    columns = {name: values for name, values in columns.items() if values}
    layers = sorted({*linear, *windows, *sensitivity, *r})
    became = ["linear" if layer in linear else "window" if layer in windows else "softmax" for layer in layers]
    rows = [
        [layer, *(values.get(layer, "") for values in columns.values()), kind]
        for layer, kind in zip(layers, became, strict=True)
    ]
    chart = charts.bars(sensitivity, "layer (green: became linear)", "velocity error, that layer converted", linear)
    table = html_page.table(["layer", *columns, "became"], rows)
    if windows:
        why = "The layers were given, so that nothing was chosen."
    else:
        why = reason(linear, sensitivity, r)
    return html_page.note(MEANING) + chart + table + html_page.note(why)


def reason(linear: Sequence[int], sensitivity: Mapping[int, float], r: Mapping[int, float]) -> str:
    """Say how the layers were chosen, and where that differs from the order of sensitivity."""
    count = f"The {len(linear)} layers" if len(linear) > 1 else "The layer"
    how = f"{count} with the smallest r became linear." if r else f"{count} became linear without a learned r."
    if not sensitivity:
        return how
    least = set(sorted(sensitivity, key=lambda layer: (sensitivity[layer], layer))[: len(linear)])
    instead, passed_over = sorted({*linear} - least), sorted(least - {*linear})
    if not instead:
        return (
            f"{how} They are also the least sensitive ones." if len(linear) > 1 else f"{how} It is the least sensitive."
        )
    how += f" By sensitivity alone {named(passed_over, r)} would have been taken in place of {named(instead, r)}."
    if not r:
        return how
    return (
        f"{how} Sensitivity measures one layer at a time, and errors of several layers do not add. r is learned while"
        " all layers are mixed and all weights train, so that it also sees what layers do to each other, and how well"
        " the rest of the model makes up for a linear layer."
    )


def named(layers: Sequence[int], r: Mapping[int, float]) -> str:
    """Say "layer 3 (r 0.41)", or "layers 3 and 5" without a learned r."""
    words = [str(layer) if not r else f"{layer} (r {r[layer]:.2f})" for layer in layers]
    listed = " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
    return f"{'layer' if len(words) == 1 else 'layers'} {listed}"
