"""The demo's report.html: one file, nothing loaded from elsewhere."""

from pathlib import Path

import torch

from linvideo.evaluation import html_page
from linvideo.run.metrics_log import read_metrics

NAMES = {
    "teacher": "teacher (softmax)",
    "same_layers_untrained": "same layers, warmed up only",
    "alternate_untrained": "every second layer, untrained",
    "final": "converted and fine-tuned",
}
FILM_NOTE = "Time runs to the right. side_by_side.mp4 shows more, the models from left to right in the same order."
COLUMNS = {
    "colour": "colour",
    "shape": "shape",
    "direction": "direction",
    "all_right": "all right",
    "good": "good",
    "straightness_px": "straightness (px)",
    "flicker": "flicker",
    "rerender_error": "re-render error",
    "coverage": "coverage (W1)",
    "psnr_to_teacher": "PSNR to teacher (dB)",
    "own_state_error": "velocity error, own states",
    "teacher_state_error": "velocity error, teacher states",
}


def write_report(
    folder: Path,
    outcome: dict,
    films: dict[str, torch.Tensor],
    captions: list[str],
    few_films: dict[str, torch.Tensor],
) -> None:
    """Write report.html and its first picture, frames.png, into `folder`, from what metrics.json holds, the videos with
    their captions, and training/metrics.jsonl; of a distillation, if there was one, also few_steps.png."""
    picture = html_page.film_picture({NAMES[name]: film for name, film in films.items()}, captions[:3])
    (folder / "frames.png").write_bytes(picture)
    rows = read_metrics(folder / "training" / "metrics.jsonl")
    environment = outcome["environment"]
    linear = outcome["layers_linear"]
    total = len(outcome["sensitivity"])
    summary = (
        f"A small pretrained video diffusion transformer ({total} layers, 128 tokens) with {len(linear)} of its"
        f" self-attention layers turned from softmax (quadratic in the number of tokens) to linear: layers"
        f" {', '.join(map(str, linear))} (counted from 0). Device: {environment['device']}; PyTorch"
        f" {environment['torch']}, diffusers {environment['diffusers']}, Python {environment['python']}."
    )
    sections = [
        ("The same prompt and noise, four models", html_page.image_tag(picture) + html_page.note(FILM_NOTE)),
        ("Metrics", metric_table(outcome)),
        ("Which layers became linear", layer_choice(outcome)),
        (
            "Training",
            html_page.plot(lambda axes: draw_losses(axes, rows)) + html_page.plot(lambda axes: draw_r(axes, rows)),
        ),
        *([("Few steps", few_steps(folder, outcome["few_steps"], few_films, captions))] if few_films else []),
        ("Speed of one attention layer", speed(outcome)),
        ("Kernels", kernels(outcome["kernel_check"])),
        ("Time per stage", html_page.table(["stage", "seconds"], [[k, v] for k, v in outcome["seconds"].items()])),
    ]
    document = html_page.page("linvideo demo: half of the layers linear", summary, sections)
    (folder / "report.html").write_text(document, encoding="utf-8")


def metric_table(outcome: dict) -> str:
    rows = [
        [label] + ["" if outcome[name][key] is None else outcome[name][key] for name in NAMES]
        for key, label in COLUMNS.items()
    ]
    return html_page.table(["", *NAMES.values()], rows) + html_page.note(
        f"Over {outcome['videos']} videos per model, so a percentage has a standard error of up to"
        f" {50 / outcome['videos'] ** 0.5:.0f} points. good: all three words right, straight and clean. Up to and"
        " including 'good' higher is better, below it lower is, except PSNR."
    )


def few_steps(folder: Path, outcome: dict, films: dict[str, torch.Tensor], captions: list[str]) -> str:
    steps = len(outcome["timesteps"])
    names = {"teacher": "teacher", "converted": "converted", "distilled": "converted and distilled"}
    picture = html_page.film_picture({names[name]: film for name, film in films.items()}, captions[:3])
    (folder / "few_steps.png").write_bytes(picture)
    rows = [
        [label, *(outcome["models"][name][key] for name in names)]
        for key, label in COLUMNS.items()
        if key in outcome["models"]["teacher"]
    ]
    note = html_page.note(
        f"All three sample in {steps} steps: the first two as they are, with guidance, which is two forwards a step,"
        " the distilled one with a single forward a step. PSNR is to the teacher's videos at its full number of steps."
    )
    return html_page.image_tag(picture) + html_page.table(["", *names.values()], rows) + note


def layer_choice(outcome: dict) -> str:
    linear = set(outcome["layers_linear"])
    layers = sorted(outcome["sensitivity"], key=int)

    def draw(axes):
        colours = ["tab:green" if int(layer) in linear else "tab:gray" for layer in layers]
        axes.bar(layers, [outcome["sensitivity"][layer] for layer in layers], color=colours)
        axes.set(xlabel="layer (green: became linear)", ylabel="velocity error, that layer alone linear", yscale="log")

    rows = [
        [
            layer,
            outcome["sensitivity"][layer],
            outcome["r"].get(layer, ""),
            "linear" if int(layer) in linear else "softmax",
        ]
        for layer in layers
    ]
    return html_page.plot(draw) + html_page.table(["layer", "sensitivity", "r before rounding", "became"], rows)


def draw_losses(axes, rows: list[dict]) -> None:
    for stage in ("warmup", "selection", "finetune"):
        points = [(row["step"], row["loss"]) for row in rows if row["stage"] == stage and "loss" in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=stage, linewidth=1)
    axes.set(xlabel="step of the run", ylabel="loss of the stage", yscale="log")
    axes.legend()


def draw_r(axes, rows: list[dict]) -> None:
    selection = [row for row in rows if row.get("r")]
    for layer in selection[0]["r"] if selection else ():
        axes.plot([row["stage_step"] for row in selection], [row["r"][layer] for row in selection], label=layer)
    axes.axhline(0.5, color="black", linewidth=0.5)
    axes.set(xlabel="step of the selection", ylabel="r (1: softmax, 0: linear)", ylim=(-0.05, 1.05))
    if selection:
        axes.legend(title="layer", ncols=2, fontsize="small")


def speed(outcome: dict) -> str:
    rows = outcome["latency_ms"]

    def draw(axes):
        for name in ("softmax", "linear"):
            axes.plot([row["tokens"] for row in rows], [row[name][0] for row in rows], marker="o", label=name)
        axes.set(xlabel="tokens", ylabel="milliseconds, forward", xscale="log", yscale="log")
        axes.legend()

    table = [[row["tokens"], row["softmax"][0], row["linear"][0], row["softmax"][0] / row["linear"][0]] for row in rows]
    return (
        html_page.plot(draw)
        + html_page.table(["tokens", "softmax (ms)", "linear (ms)", "softmax / linear"], table)
        + html_page.note(
            f"4 heads of 24, fp32, median, on {outcome['environment']['device']}. The embedded model has only 128"
            " tokens, where softmax attention is the faster one; Wan 2.1 at 480p has 32,760."
        )
    )


def kernels(check: dict | None) -> str:
    if check is None:
        return html_page.note("Not run: Triton is not installed here.")
    return html_page.note(
        f"One training step of the converted model through the Triton kernels ({check['kernels']}): loss"
        f" {check['loss_kernels']:.6f} against {check['loss_reference']:.6f} by the reference; all gradients differ by"
        f" {check['gradient_error']:.1e}, relative."
    )
