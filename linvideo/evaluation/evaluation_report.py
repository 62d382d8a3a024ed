"""The report.html of `linvideo evaluate`, made from what is in its folder."""

import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from linvideo.evaluation import vbench
from linvideo.evaluation.fidelity import summary
from linvideo.reports import html_page
from linvideo.reports.films import linked_video
from linvideo.reports.run_report import MEANINGS
from linvideo.trajectories.atomic_files import read_json, write_text

SHOWN = 4  # videos of a VBench evaluation


def write_fidelity_report(folder: Path, student: str, teacher: str, options: Mapping[str, Any]) -> None:
    """Write report.html next to rows.json.

    Args:
        folder: The folder of the evaluation.
        student: The converted model, as it was named to the command.
        teacher: Its teacher, likewise.
        options: Options of the command that `linvideo generate` needs to make the same videos: name -> value.
    """
    rows = read_json(folder / "rows.json")
    means = summary(rows)
    (psnr, psnr_spread), (ssim, _) = means["psnr"], means["ssim"]
    verdict = (
        f"Over {len(rows)} prompt{'s' * (len(rows) > 1)} the converted model's videos have a PSNR of {psnr:.1f} dB and"
        f" an SSIM of {ssim:.2f} to its teacher's from the same noise."
    )
    if len(rows) > 1:
        error = psnr_spread / len(rows) ** 0.5
        verdict += f" The mean PSNR is uncertain by {error:.2g} dB (one standard error)."
    order = sorted(range(len(rows)), key=lambda number: (not math.isnan(rows[number]["psnr"]), rows[number]["psnr"]))
    chosen = {"lowest PSNR": order[0], "median": order[len(order) // 2], "highest PSNR": order[-1]}
    shown = {number: what for what, number in chosen.items()}
    films = []
    for number, what in shown.items():
        pair = {name: linked_video(folder, f"{number:04d}-{name}.mp4", name) for name in ("teacher", "student")}
        films.append(html_page.film_row(f"{what}, {rows[number]['psnr']:.1f} dB: “{rows[number]['prompt']}”", pair))
    names = list(means)
    table = [[name, mean, spread] for name, (mean, spread) in means.items()]
    details = [[row["prompt"], row["seed"], *(row[name] for name in names)] for row in rows]
    command = f"linvideo generate {shlex.quote(student)} --prompt {shlex.quote(rows[order[0]]['prompt'])}"
    command += f" --seed {rows[order[0]]['seed']} --compare {shlex.quote(teacher)} --output video.mp4"
    command += "".join(f" --{name} {shlex.quote(str(value))}" for name, value in options.items())
    sections = [
        (
            "Metrics",
            html_page.definitions({name: MEANINGS[name] for name in names})
            + html_page.table(["", "mean", "standard deviation over prompts"], table),
        ),
        ("Videos", html_page.note("A click opens the video file, which may be larger.") + "".join(films)),
        ("Every prompt", html_page.table(["prompt", "seed", *names], details)),
        (
            "Next",
            html_page.commands([("Make the video with the lowest PSNR again:", command)]),
        ),
    ]
    title = "linvideo evaluate: fidelity"
    write_text(folder / "report.html", html_page.page(title, f"{student} against {teacher}", sections, verdict))


def write_vbench_report(folder: Path, model: str, prompts: list[str], scores: dict[str, float] | None) -> None:
    """Write report.html next to videos/; scores: dimension -> per cent, None where the package vbench is missing."""
    films = [
        html_page.film_row(f"“{prompt}”", {"seed 0": linked_video(folder, f"videos/{prompt}-0.mp4", prompt)})
        for prompt in prompts[:SHOWN]
    ]
    sections = [("Videos", "".join(films))]
    if scores is None:
        verdict = "There are no scores yet, because the package vbench is not installed here."
    else:
        verdict = "VBench's scores of this model, next to those that the paper has for Wan 2.1 1.3B."
        paper = {name: vbench.PAPER.get(name, ("", "", "")) for name in scores}
        rows = [[name, score, *paper[name]] for name, score in scores.items()]
        columns = ["per cent, higher is better", "this model", "paper: dense", "paper: LinVideo", "paper: 4 steps"]
        sections.insert(0, ("Scores", html_page.table(columns, rows)))
    write_text(folder / "report.html", html_page.page("linvideo evaluate: VBench", model, sections, verdict))
