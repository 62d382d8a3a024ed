"""Results as Markdown tables, one section per suite. Rows are given as pairs (row, environment of its file)."""

from collections import defaultdict

from benchmarks import results
from benchmarks.peers import formulas, is_exact_softmax
from benchmarks.shapes import SHAPES, WINDOW, Shape

# From arXiv 2510.08318: seconds of the dense model, number of linear layers, seconds with these, seconds in 4 steps.
PAPER = {
    "1.3b-480p": (97.32, 16, 68.26, 6.11),
    "14b-720p": (1931.0, 22, 1127.0, 92.6),
}
BACKENDS = {
    "_native_flash": "SDPA flash (FlashAttention-2)",
    "_native_cudnn": "SDPA cuDNN",
    "_flash_3": "flash-attn 3",
    "sage": "SageAttention (8 bit)",
}
BACKENDS |= {f"{WINDOW}{name}": f"window, {label}" for name, label in BACKENDS.items()}
PARTS = BACKENDS | {"rest": "everything else, once per forward"}
OP_NOTE = """\
Each table compares one call of `linear_attn` ("linvideo", with each feature map) and of `window_attn` ("linvideo
window", with the default window) with other implementations of attention, for one size of q, k and v. "% of pairs" is
the share of all pairs of tokens for which softmax is computed. "Both" is a forward and a backward together. The last
three columns are ratios, forward / both: the time of the fastest exact softmax attention, of the formula in PyTorch's
eager operations and of the same compiled by PyTorch, each divided by the time of the row. Above 1, the row is faster.
The formula is that of elu for elu, and that of hedgehog for all other rows.
GB/s and TFLOP/s are of the forward."""
MODEL_NOTE = """\
Each table shows the forward of one Wan model with random weights, on which the time doesn't depend: with no linear
layer, with some, and with all. The other layers are softmax layers or, where it says "window", window layers with the
default window, whose near part uses the named softmax. "One forward" is the sum of parts that were timed alone (see
Blocks), and "whole" a forward that was timed as it is. The speed-up is over the same model with softmax in all layers.
The seconds are for denoising one video, calculated from one forward: 50 or 4 steps, each with two forwards (guidance)
or one, without the text encoder and the VAE."""
BLOCK_NOTE = """\
The time of one transformer block of each model, with each softmax attention over all tokens and in the default window
("window"), and with linear attention, and of everything outside the blocks. The forwards under Whole models are
composed of these."""
TRAIN_NOTE = """\
The time of one optimizer step with each objective, with the fused kernels and with linear attention in PyTorch's
eager operations, at batch size 1 with gradient checkpointing and AdamW over all weights. "MiB planned" is what
`linvideo plan` predicts."""
KERNEL_NOTE = """\
The kernels that one forward and backward launches, in order, with the time of each on the device, from PyTorch's
profiler."""
TILE_NOTE = """\
The shipped tile of each kernel and its rivals, written as rows / warps / stages (T: rows are read through TMA, R:
the state is read again for each tile, P: phi^T v is formed in place of (v^T phi)^T, Z: z is summed in registers).
The time is that of the function of passes.py that launches the kernel, including its other launches. The difference
is relative to the results of the shipped tile."""
FORWARD_AND_BOTH = ("forward", "forward+backward")


def sections(pairs: list[tuple[dict, dict]]) -> list[str]:
    """Return the lines of all suites that have rows."""
    lines = []
    tables = {"op": _op, "kernel": _kernel, "tile": _tile, "model": _model, "block": _block, "train": _train}
    for suite, table in tables.items():
        chosen = [(row, environment) for row, environment in pairs if row["suite"] == suite]
        lines += table(chosen) if chosen else []
    return lines


def _op(pairs: list) -> list[str]:
    lines = ["### Attention", "", OP_NOTE, ""]
    by_shape = defaultdict(list)
    for row, environment in pairs:
        by_shape[row["shape"], row["dtype"]].append((row, environment))
    order = {name: i for i, name in enumerate(SHAPES)}
    for shape, dtype in sorted(by_shape, key=lambda key: (order.get(key[0], len(order)), key)):
        chosen = by_shape[shape, dtype]
        lines += [f"**{shape}**: {Shape(*chosen[0][0]['sizes'])}, {dtype}", "", *_op_table(chosen), ""]
    return lines


def _op_table(pairs: list) -> list[str]:
    peers, absent = defaultdict(dict), {}  # name -> pass -> row; (name, pass) -> reason
    for row, environment in pairs:
        if "ms" in row:
            peers[row["name"]][row["pass"]] = row | {"rates": environment["rates"][row["dtype"]]}
        else:
            absent[row["name"], row["pass"]] = row["absent"]
    medians = {name: {which: row["ms"][0] for which, row in passes.items()} for name, passes in peers.items()}
    softmax = [times for name, times in medians.items() if is_exact_softmax(name)]
    fastest = {
        w: min(times[w] for times in softmax if w in times) for w in FORWARD_AND_BOTH if any(w in t for t in softmax)
    }
    memory = any("peak_mib" in row for passes in peers.values() for row in passes.values())
    columns = ["", "forward", "backward", "both", "GB/s", "TFLOP/s", *(["peak MiB", "host"] if memory else [])]
    lines = table_head([*columns, "fastest softmax", "eager", "compiled"], texts=1)
    for name, passes in peers.items():
        forward = passes.get("forward")
        share = next((f" ({row['kept']:.0%} of pairs)" for row in passes.values() if "kept" in row), "")
        cells = [name + share, _ms(forward), _ms(passes.get("backward")), _ms(passes.get("forward+backward"))]
        cells += [_rate(forward, "gbytes", "copy_gb_s"), _rate(forward, "tflops", "matmul_tflop_s")]
        if memory:
            shown = [passes[w] for w in FORWARD_AND_BOTH if w in passes]
            cells.append(" / ".join(f"{row['peak_mib']:,.0f}" for row in shown if "peak_mib" in row))
            cells.append(" / ".join(three_digits(row["host_ms"]) for row in shown if "host_ms" in row))
        for other in (fastest, *(medians.get(formula, {}) for formula in formulas(name))):
            shared = [w for w in FORWARD_AND_BOTH if w in passes and w in other]
            cells.append(" / ".join(f"{other[w] / medians[name][w]:.2f}" for w in shared))
        lines.append(table_line(cells))
    notes = [f"- absent: {name}, {which} ({why})" for (name, which), why in absent.items()]
    notes += _runs({row["name"]: environment for row, environment in pairs if "ms" in row})
    return [*lines, "", *notes] if notes else lines


def _runs(environments: dict[str, dict]) -> list[str]:
    """Say which row is from which run, if there are several runs."""
    by_run = defaultdict(list)
    for name, environment in environments.items():
        by_run[environment["time"], results.short_commit(environment)].append(name)
    if len(by_run) < 2:
        return []
    return [
        f"- measured {when}, commit {commit}: {', '.join(names)}" for (when, commit), names in sorted(by_run.items())
    ]


def _model(pairs: list) -> list[str]:
    lines = ["### Whole models", "", MODEL_NOTE, ""]
    by_model = defaultdict(list)
    for row, _ in pairs:
        if "ms" in row:
            by_model[row["model"], row["dtype"]].append(row)
    numbers = ["linear layers", "one forward, ms", "whole, ms", "speed-up", "50 x 2, s", "4 x 2, s", "4 x 1, s"]
    for (model, dtype), rows in by_model.items():
        lines += [f"**Wan {model}**: {rows[0]['layers']} layers, {rows[0]['tokens']:,} tokens, {dtype}", ""]
        lines += [*table_head(["softmax", "", *numbers], texts=2), *_model_rows(rows)]
        if model in PAPER:
            lines += _paper_rows(*PAPER[model])
        lines.append("")
    return lines


def _model_rows(rows: list[dict]) -> list[str]:
    forwards: dict[str, dict] = {"composed": {}, "whole": {}}
    for row in rows:
        forwards[row["how"]][row["compiled"], row["backend"], row["linear_layers"]] = row
    composed, whole = forwards["composed"], forwards["whole"]
    lines = []
    for setting in sorted({*composed, *whole}):
        compiled, backend, count = setting
        softmax = compiled, backend.removeprefix(WINDOW), 0
        row, dense = (composed.get(s) or whole.get(s) for s in (setting, softmax))
        cells = [BACKENDS.get(backend, backend), "compiled" if compiled else "eager", str(count), _ms(row)]
        cells += [_ms(whole.get(setting)), f"{dense['ms'][0] / row['ms'][0]:.2f}x" if dense else ""]
        lines.append(table_line(cells + [three_digits(forwards * row["ms"][0] / 1000) for forwards in (100, 8, 4)]))
    return lines


def _paper_rows(dense: float, count: int, linear: float, four_steps: float) -> list[str]:
    """Return the paper's own seconds, which are for an H100."""
    first = ["paper, FlashAttention-2", "", "0", "", "", "1.00x", f"{dense:,}", "", ""]
    second = [
        "paper, FlashAttention-2",
        "",
        str(count),
        "",
        "",
        f"{dense / linear:.2f}x",
        f"{linear:,}",
        f"{four_steps}",
        "",
    ]
    return [table_line(first), table_line(second)]


def _block(pairs: list) -> list[str]:
    lines = ["### Blocks", "", BLOCK_NOTE, "", *table_head(["model", "attention", "", "one block, ms", "MiB"], texts=3)]
    for row, _ in pairs:
        what, mode = PARTS.get(row["attention"], row["attention"]), "compiled" if row["compiled"] else "eager"
        lines.append(table_line([row["model"], what, mode, _ms(row), _memory(row)]))
    return [*lines, ""]


def _train(pairs: list) -> list[str]:
    header = table_head(["model", "step", "linear attention", "ms", "MiB", "MiB planned"], texts=3)
    lines = ["### Training steps", "", TRAIN_NOTE, "", *header]
    for row, _ in pairs:
        planned = f"{row['planned_mib']:,.0f}" if "planned_mib" in row else ""
        lines.append(table_line([row["model"], row["step"], row["attention"], _ms(row), _memory(row), planned]))
    return [*lines, ""]


def _kernel(pairs: list) -> list[str]:
    lines = ["### Kernels", "", KERNEL_NOTE, ""]
    calls = defaultdict(list)
    for row, _ in pairs:
        if "ms" in row:
            calls[row["name"], row["shape"], row["dtype"]].append(row)
    for (name, shape, dtype), rows in calls.items():
        lines += [f"**{name}**, {shape}, {dtype}", "", *table_head(["", "kernel", "ms"], texts=2)]
        for row in sorted(rows, key=lambda row: row["position"]):
            lines.append(table_line([str(row["position"] + 1), row["kernel"].split("(")[0][:80], _ms(row)]))
        lines.append(table_line(["", "together", f"{sum(row['ms'][0] for row in rows):.3f}"]) + "\n")
    return lines


def _tile(pairs: list) -> list[str]:
    columns = ["shape", "kernel", "tile", "", "the function that launches it, ms", "difference of the results"]
    lines = ["### Tiles", "", TILE_NOTE, "", *table_head(columns, texts=4)]
    for row, _ in pairs:
        shipped = "shipped" if row["shipped"] else ""
        difference = f"{row['difference']:.0e}" if "difference" in row else ""
        lines.append(table_line([row["shape"], row["kernel"], row["tile"], shipped, _ms(row), difference]))
    return [*lines, ""]


def _ms(row: dict | None) -> str:
    if row is None:
        return ""
    if "absent" in row:
        return f"absent ({row['absent']})"
    median, low, high = row["ms"]
    digits = 3 if median < 10 else 1
    return f"{median:,.{digits}f} ({low:,.{digits}f}–{high:,.{digits}f})"


def _rate(row: dict | None, amount: str, reference: str) -> str:
    if row is None:
        return ""
    rate = row[amount] / row["ms"][0] * 1000
    return f"{three_digits(rate)} ({100 * rate / row['rates'][reference]:.0f}%)"


def _memory(row: dict) -> str:
    return f"{row['held_mib']:,.0f} + {row['peak_mib']:,.0f}" if "peak_mib" in row else ""


def three_digits(x: float) -> str:
    """Format a number with three significant digits and without a power of ten."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def table_head(columns: list[str], texts: int) -> list[str]:
    """Return the first two lines of a table; the first `texts` columns are aligned left, numbers right."""
    return [table_line(columns), table_line(["---"] * texts + ["---:"] * (len(columns) - texts))]


def table_line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
