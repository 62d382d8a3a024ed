"""The demo's report.html: one file, nothing loaded from elsewhere."""

from pathlib import Path

import torch

from linvideo.demo.verdict import MEANINGS, counted, verdict
from linvideo.evaluation.latency import doubts, unstable
from linvideo.reports import charts, films, html_page
from linvideo.reports.layer_choice import layer_choice
from linvideo.reports.run_report import training
from linvideo.run.metrics_log import read_metrics

NAMES = {
    "teacher": "teacher (softmax)",
    "same_layers_untrained": "same layers, warmed up only",
    "alternate_untrained": "every second layer, warmed up only",
    "final": "converted and fine-tuned",
}
FEW_STEP_NAMES = {"teacher": "teacher", "converted": "converted", "distilled": "converted and distilled"}
SHARES = {name: name.replace("_", " ") for name in ("good", "all_right", "colour", "shape", "direction")}
MEANS = {
    "straightness_px": "straightness (px)",
    "flicker": "flicker",
    "rerender_error": "re-render error",
    "coverage": "coverage (W1)",
    "psnr_to_teacher": "PSNR to teacher (dB)",
    "own_state_error": "velocity error, own states",
    "teacher_state_error": "velocity error, teacher states",
}
FPS = 8
PLAYED, PLAYED_FEW_STEPS, PICTURED = 4, 2, 2  # numbers of captions: of playing videos, and of the filmstrip picture
MODEL = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
NEXT = [
    ("Try every part of a run once with the real weights, in minutes:", f"linvideo check {MODEL}"),
    (
        "Measure which layers can become linear and what that saves on this machine:",
        f"linvideo analyze {MODEL} --speedup 1.3 --output_dir analysis",
    ),
    ("See what a run needs, in memory and hours:", "linvideo plan --config wan2.1-1.3b-480p-1gpu"),
    (
        "Train; --resume_from_checkpoint latest continues a run that was interrupted:",
        "linvideo train --config wan2.1-1.3b-480p-1gpu --output_dir run",
    ),
    ("Make a video:", 'linvideo generate run/pipeline --prompt "a red kite over a grey sea" --output kite.mp4'),
]


def write_report(
    folder: Path,
    outcome: dict,
    videos: dict[str, torch.Tensor],
    captions: list[str],
    few_step_videos: dict[str, torch.Tensor],
) -> None:
    """Write report.html and the filmstrip frames.png into the demo's folder, and few_steps.png of a distillation.

    Args:
        folder: The demo's folder, with training/metrics.jsonl.
        outcome: The content of metrics.json.
        videos: Model -> videos, as `evaluate` returns them.
        captions: The caption of each video.
        few_step_videos: The same of the models that sample in few steps; empty without a distillation.
    """
    write_filmstrip(folder / "frames.png", videos, NAMES, captions)
    environment, linear = outcome["environment"], outcome["layers_linear"]
    layers = len(outcome["sensitivity"])
    summary = (
        f"The model is a small video diffusion transformer that comes with linvideo ({layers} layers, 128 tokens)."
        f" Self-attention is linear in the layers {', '.join(map(str, linear))} (counted from 0) and softmax in the"
        f" others. Device: {environment['device']}; PyTorch {environment['torch']}, diffusers"
        f" {environment['diffusers']}, Python {environment['python']}."
    )
    choice = layer_choice(linear, *(numbered(outcome[name]) for name in ("sensitivity", "r")))
    sections = [
        ("Videos from the same prompt and noise", playing(videos, NAMES, captions)),
        ("Metrics", html_page.definitions(MEANINGS) + metric_table(outcome, NAMES, outcome["videos"])),
        ("Which layers became linear", choice),
        ("Training", training(read_metrics(folder / "training" / "metrics.jsonl"), linear)),
    ]
    if few_step_videos:
        write_filmstrip(folder / "few_steps.png", few_step_videos, FEW_STEP_NAMES, captions)
        sections.append(("Few steps", few_steps(outcome, few_step_videos, captions)))
    sections += [
        ("Speed of one attention layer", speed(outcome)),
        ("Kernels", kernels(outcome["kernel_check"])),
        ("Time", html_page.table(["stage", "seconds"], [[k, v] for k, v in outcome["seconds"].items()])),
        ("Next: your own model", html_page.commands(NEXT)),
    ]
    document = html_page.page("linvideo demo", summary, sections, verdict(outcome))
    (folder / "report.html").write_text(document, encoding="utf-8")


def numbered(values: dict[str, float]) -> dict[int, float]:
    """Return values by layer number, as they were before they were JSON."""
    return {int(layer): value for layer, value in values.items()}


def write_filmstrip(path: Path, videos: dict[str, torch.Tensor], names: dict[str, str], captions: list[str]) -> None:
    strips = {names[name]: film for name, film in videos.items()}
    path.write_bytes(films.film_picture(strips, captions[:PICTURED]))


def playing(videos: dict[str, torch.Tensor], names: dict[str, str], captions: list[str], most: int = PLAYED) -> str:
    """Return the first videos, each model's next to the others' under their prompt."""
    rows = []
    for number, caption in enumerate(captions[:most]):
        shown = {
            names[name]: films.moving_picture(films.to_pixels(film[number : number + 1])[0], FPS, names[name])
            for name, film in videos.items()
        }
        rows.append(html_page.film_row(f"“{caption}”", shown))
    return "".join(rows)


def metric_table(metrics: dict[str, dict], names: dict[str, str], videos: int) -> str:
    """Return the metrics of each model in a column."""
    labels = {key: label for key, label in (SHARES | MEANS).items() if key in metrics["teacher"]}
    rows = []
    for key, label in labels.items():
        values = ["" if metrics[name][key] is None else metrics[name][key] for name in names]
        rows.append([label, *(counted(value, videos) if key in SHARES else value for value in values)])
    note = f"Shares are of {videos} videos of each model, with the 95% interval for that number of videos (Wilson's)."
    return html_page.table(["", *names.values()], rows) + html_page.note(note)


def few_steps(outcome: dict, videos: dict[str, torch.Tensor], captions: list[str]) -> str:
    found = outcome["few_steps"]
    note = (
        f"All three sample in {len(found['timesteps'])} steps: the first two as they are, with guidance, which takes"
        " two forwards a step, and the distilled one with a single forward a step. PSNR is to the teacher's videos at"
        " its full number of steps."
    )
    table = metric_table(found["models"], FEW_STEP_NAMES, outcome["videos"])
    return html_page.note(note) + playing(videos, FEW_STEP_NAMES, captions, PLAYED_FEW_STEPS) + table


def speed(outcome: dict) -> str:
    """Return the timings, or why they are not to be trusted."""
    rows, device = outcome["latency_ms"], outcome["environment"]["device"]
    spread = [[row["tokens"], *(timing(row[name]) for name in ("softmax", "linear"))] for row in rows]
    columns = ["tokens", "softmax, ms (p20 to p80)", "linear, ms (p20 to p80)"]
    note = f"One forward of 4 heads of 24, fp32, on {device}: the median, and the 20th and 80th percentile."
    if reasons := doubts(rows):
        lengths = [row["tokens"] for row in rows]
        again = (
            'python -c "from linvideo.evaluation.latency import attention_latency;'
            f" print(*attention_latency('{outcome['device']}', {lengths}), sep='\\n')\""
        )
        return (
            html_page.paragraph(f"Do not trust these timings: the machine was busy. {'; '.join(reasons)}.", "warning")
            + html_page.table(columns, spread)
            + html_page.note(note)
            + html_page.commands([("Measure again, with nothing else running:", again)])
        )
    series = {name: [(row["tokens"], row[name][0]) for row in rows] for name in ("softmax", "linear")}
    ratios = [row["softmax"][0] / row["linear"][0] for row in rows]
    table = [[*row, f"{ratio:.2f}"] for row, ratio in zip(spread, ratios, strict=True)]
    return (
        html_page.note(f"{faster(rows)} The embedded model has 128 tokens; Wan 2.1 at 480p has 32,760.")
        + charts.lines(series, "tokens", "milliseconds", xscale="log", yscale="log", marks=True)
        + html_page.table([*columns, "softmax / linear"], table)
        + html_page.note(note)
    )


def timing(values: list[float]) -> str:
    median, p20, p80 = (f"{value:.3g}" if value < 100 else f"{value:,.0f}" for value in values)
    return f"{median} ({p20} to {p80}{', unstable' if unstable(values) else ''})"


def faster(rows: list[dict]) -> str:
    """Say from which number of tokens on linear attention was faster here."""
    wins = [row["linear"][0] < row["softmax"][0] for row in rows]
    if not wins[-1]:
        return f"Softmax attention was faster here, up to {rows[-1]['tokens']:,} tokens."
    first = len(wins) - next((number for number, won in enumerate(reversed(wins)) if not won), len(wins))
    return f"Linear attention was faster here from {rows[first]['tokens']:,} tokens on."


def kernels(check: dict | None) -> str:
    if check is None:
        return html_page.note("Not run: Triton is not installed here.")
    return html_page.note(
        f"One training step of the converted model through the Triton kernels ({check['kernels']}): the loss is"
        f" {check['loss_kernels']:.6f}, and {check['loss_reference']:.6f} by the reference; all gradients together"
        f" differ by {check['gradient_error']:.1e}, relative."
    )
