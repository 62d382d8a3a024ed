"""The report.html of a training run, made from what is in its folder, so that it can be made again at any time."""

import shlex
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from linvideo.models.describe import ranges
from linvideo.reports import charts, films, html_page
from linvideo.reports.layer_choice import layer_choice
from linvideo.run import run_folder
from linvideo.run.data import Data
from linvideo.run.export import FOLDER
from linvideo.run.metrics_log import read_metrics
from linvideo.run.session import Run
from linvideo.trajectories.atomic_files import read_json, write_json, write_text
from linvideo.trajectories.devices import device_name, peak_memory
from linvideo.trajectories.prompts import spread

STAGES = {"warmup": "warm-up", "finetune": "fine-tuning", "dmd": "distribution matching"}  # in words
POINTS = 300  # of a curve, at most
SHOWN = 4  # videos of the last validation
MEANINGS = {
    "psnr": "peak signal-to-noise ratio to the teacher's video from the same noise, in dB; higher is closer",
    "ssim": "structural similarity to that video, 1 for equal ones; higher is closer",
    "lpips": "perceptual distance to that video; lower is closer",
    "flicker": "mean absolute difference of neighbouring frames, in [0, 1]",
    "teacher_flicker": "the same of the teacher's video",
}


def report(run: Run, data: Data) -> None:
    """Write summary.json and report.html into the folder of a run that is over; a failure is a warning."""
    if not run.ranks.first:
        return
    with html_page.if_possible():
        config, peak = run.config.validation, peak_memory(run.device)
        captions = config.prompts or data.source.captions
        summary = {
            "seconds": run.results["seconds"],
            "peak_memory_gib": None if peak is None else peak / 2**30,
            "device": device_name(run.device),
            "processes": run.ranks.size,
            "validation_captions": [captions[i] for i in spread(len(captions), config.num_videos)],
        }
        write_json(run.output_dir / run_folder.SUMMARY, summary)
        write_report(run.output_dir)


def write_report(folder: str | Path) -> None:
    """Write report.html into the folder of a run.

    Raises:
        ValueError: The folder holds no run.
    """
    folder = Path(folder)
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"expected the folder of a run, got {folder}, which has no config.yaml") from None
    rows, validations = (_rows(folder / name) for name in ("metrics.jsonl", run_folder.VALIDATION_ROWS))
    rows = [row for row in rows if "loss" in row]  # a step that was skipped has none
    selection, summary = (_values(folder / name) for name in (run_folder.SELECTION, run_folder.SUMMARY))
    linear, windows = (selection.get(name, []) for name in ("linear_layers", "window_layers"))
    sections = []
    if validations:
        sections.append(("Validation", validation(folder, validations, summary.get("validation_captions", []))))
    if linear or windows:
        by_layer = ({int(layer): x for layer, x in selection.get(name, {}).items()} for name in ("sensitivity", "r"))
        sections.append(("Which layers were converted", layer_choice(linear, *by_layer, windows)))
    sections.append(("Training", training(rows, linear)))
    if summary:
        sections.append(("Memory and time", costs(summary)))
    sections.append(("Next", html_page.commands(next_steps(folder, config))))
    title = "linvideo distill" if "student_model_name_or_path" in config else "linvideo train"
    video = config["trajectories"]
    about = (
        f"{config['pretrained_model_name_or_path'] or 'A model in memory'}, videos of {video['height']} x"
        f" {video['width']} with {video['num_frames']} frames. Folder: {folder}"
    )
    document = html_page.page(title, about, sections, verdict(linear, windows, rows, validations))
    write_text(folder / run_folder.REPORT, document)


def verdict(
    linear: list[int], windows: list[int], rows: list[dict[str, Any]], validations: list[dict[str, Any]]
) -> str:
    """Say what the run has reached."""
    parts = []
    if linear:
        parts.append(f"{len(linear)} layers are linear ({ranges(linear)})")
    if windows:
        parts.append(f"{len(windows)} layers are window layers ({ranges(windows)})")
    if rows:
        stage = rows[-1]["stage"]
        losses = [row["loss"] for row in rows if row["stage"] == stage]
        if len(losses) >= 2:
            tenth = max(1, len(losses) // 10)
            first, last = mean(losses[:tenth]), mean(losses[-tenth:])
            change = "fell" if last < first else "did not fall: it went"
            change += f" from {first:.4g} to {last:.4g} over {len(losses):,} steps"
            parts.append(f"the loss of {trained(stage)} {change}")
    if validations:
        last = validations[-1]
        parts.append(
            f"in the validation after step {last['step']:,} the student's videos have a PSNR of {last['psnr']:.1f} dB"
            f" and an SSIM of {last['ssim']:.2f} to the teacher's from the same noise"
        )
    else:
        parts.append("there was no validation, so look at videos before you trust the model")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def training(rows: list[dict[str, Any]], linear: list[int]) -> str:
    """Return the charts of loss and r; rows: of metrics.jsonl."""
    stages = dict.fromkeys(row["stage"] for row in rows)
    losses = {
        trained(stage): thinned([(row["step"], row["loss"]) for row in rows if row["stage"] == stage])
        for stage in stages
    }
    learned = [row for row in rows if row.get("r")]
    layers = learned[-1]["r"] if learned else {}
    r = {layer: thinned([(row["stage_step"], row["r"][layer]) for row in learned]) for layer in layers}
    colours = {layer: charts.CHOSEN if int(layer) in linear else charts.OTHER for layer in layers}
    selection = charts.lines(
        r,
        "step of the selection (green: became linear)",
        "r (1: softmax, 0: linear)",
        ylim=(-0.05, 1.05),
        colours=colours,
    )
    return charts.lines(losses, "step of the run", "loss of the stage", yscale="log") + selection


def thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most POINTS points: means over equal parts of the curve."""
    size = -(-len(points) // POINTS) or 1
    parts = (points[start : start + size] for start in range(0, len(points), size))
    return [(part[-1][0], mean(y for _, y in part)) for part in parts]


def validation(folder: Path, rows: list[dict[str, Any]], captions: list[str]) -> str:
    """Return the last validation's videos next to the teacher's, and the metrics of all validations."""
    names = [name for name in MEANINGS if name in rows[-1]]
    last = f"step-{rows[-1]['step']}"
    shown = []
    for number in range(SHOWN):
        pair = {"teacher": f"teacher/{number}.mp4", f"student, {last.replace('-', ' ')}": f"{last}/{number}.mp4"}
        paths = {name: f"{run_folder.VALIDATION}/{path}" for name, path in pair.items()}
        if all((folder / path).is_file() for path in paths.values()):
            caption = f"“{captions[number]}”" if number < len(captions) else f"video {number}"
            linked = {name: films.linked_video(folder, path, name) for name, path in paths.items()}
            shown.append(html_page.film_row(caption, linked))
    table = [[f"{row['step']:,}", in_words(row["stage"]), *(row[name] for name in names)] for row in rows]
    return (
        html_page.note("From the same prompt and noise. A click opens the video file, which may be larger.")
        + "".join(shown)
        + html_page.definitions({name: MEANINGS[name] for name in names})
        + html_page.table(["step", "stage", *names], table)
    )


def costs(summary: dict[str, Any]) -> str:
    seconds = summary["seconds"]
    rows = [[in_words(stage), duration(x)] for stage, x in seconds.items()]
    rows.append(["in total", duration(sum(seconds.values()))])
    peak = summary["peak_memory_gib"]
    memory = "" if peak is None else f" Peak memory of one process in its last call: {peak:.2f} GiB."
    processes = f", {summary['processes']} processes" if summary["processes"] > 1 else ""
    note = f"On {summary['device']}{processes}, over all calls that the run took.{memory}"
    return html_page.table(["stage", "time"], rows) + html_page.note(note)


def in_words(stage: str) -> str:
    return STAGES.get(stage, stage)


def trained(stage: str) -> str:
    """Name a stage whose loss is shown; in distribution matching it is the critic's, in every step."""
    return f"{in_words(stage)}{' (the critic)' * (stage == 'dmd')}"


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def next_steps(folder: Path, config: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (what for, command line) of what one does with the model of this run."""
    pipeline = shlex.quote(str(folder / FOLDER))
    teacher = shlex.quote(config["pretrained_model_name_or_path"] or "TEACHER")
    results = shlex.quote(f"{folder}-fidelity")
    steps = [
        (
            "Make a video, next to the teacher's:",
            f'linvideo generate {pipeline} --prompt "your prompt" --compare {teacher} --output video.mp4',
        ),
        (
            "Measure how close its videos are to the teacher's:",
            f"linvideo evaluate {pipeline} --suite fidelity --teacher {teacher} --output_dir {results}",
        ),
    ]
    if "student_model_name_or_path" not in config:
        distilled = shlex.quote(f"{folder}-distilled")
        steps.append(
            (
                "Distil it to few steps (RECIPE: one whose name begins with distill):",
                f"linvideo distill {pipeline} --config RECIPE --output_dir {distilled}",
            )
        )
    return steps


def _rows(path: Path) -> list[dict[str, Any]]:
    return read_metrics(path) if path.is_file() else []


def _values(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
