"""The demo: convert half of the embedded teacher's layers to linear attention, and compare the result with the teacher.

Everything goes through the public API, as it would with a folder of Wan: load_pipeline, train, generate.
"""

import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import diffusers
import torch

from linvideo.demo import teacher
from linvideo.demo.demo_page import write_report
from linvideo.demo.evaluate import evaluate
from linvideo.demo.few_steps import distill_and_compare
from linvideo.demo.kernel_check import check_kernels
from linvideo.demo.world import WORLDS
from linvideo.evaluation.latency import attention_latency
from linvideo.models import load_pipeline, new_folder
from linvideo.models.video_file import check_output, save_video
from linvideo.reports.films import side_by_side
from linvideo.run import load_config
from linvideo.run.run_folder import REPORT
from linvideo.trajectories.devices import check_device, device_name
from linvideo.transfer import TrainConfig, train
from linvideo.transfer.trainer import warmed_up
from linvideo.workspace import remove_dead

WORLD = WORLDS["small"]
STAGES = ("transfer", "adm", "distill")
CONTENT = {"pipeline", "training", "distilled", "distillation", "metrics.json", "report.html"}
CONTENT |= {"side_by_side.mp4", "frames.png", "few_steps.png"}
SHOWN = 4  # videos in the side-by-side film
# Name in metrics.json's seconds -> what is done, and about how many seconds it takes on two idle cores of an AMD EPYC.
PARTS = {
    "training": ("trajectories, warm-up, choice of layers and fine-tuning", 210),
    "evaluation": ("videos of the teacher and three converted models, and their metrics", 150),
    "distillation": ("distillation to two steps", 300),
    "kernel_check": ("a training step through the Triton kernels", 30),
    "latency": ("timing of softmax and linear attention", 10),
}


def run_demo(
    output_dir: str | os.PathLike,
    overwrite: bool = False,
    device: str | None = None,
    seed: int = 0,
    videos: int = 48,
    stages: Sequence[str] = ("transfer",),
) -> dict:
    """Run the whole demo and return what it writes to metrics.json.

    Args:
        output_dir: The folder for pipeline/ (the converted model), training/ (the run), side_by_side.mp4, frames.png,
            metrics.json and report.html. It appears, complete, when the demo ends. Distillation adds distilled/ (the
            distilled model), distillation/ (its run) and few_steps.png.
        overwrite: Whether to replace what an earlier demo left in output_dir.
        device: "cpu" or "cuda"; None takes a GPU if there is one.
        seed: The seed of the training run. The videos that are judged always start from the same noise.
        videos: The number of videos of each model that metrics are computed from.
        stages: Names from STAGES. "transfer", which chooses layers and fine-tunes, must be one of them. With "adm",
            fine-tuning alternates with anytime distribution matching. With "distill", the converted model also learns
            to sample in two steps.

    Raises:
        ValueError: output_dir is in use, and overwrite is False or no demo made it; fewer videos than the film shows;
            unknown stages; or a device that does not exist.
    """
    if unknown := [stage for stage in stages if stage not in STAGES]:
        raise ValueError(f"stages must be of {', '.join(STAGES)}, got {', '.join(map(repr, unknown))}")
    if "transfer" not in stages:
        raise ValueError(f"stages must have transfer, which the others build on, got {', '.join(stages) or 'none'}")
    output_dir = Path(output_dir)
    if output_dir.is_file():
        raise ValueError(f"expected a folder to write to, got the file {output_dir}")
    remove_dead(output_dir.resolve().parent)  # a killed call may have moved the folder aside
    if output_dir.exists() and any(output_dir.iterdir()):
        if not overwrite:
            raise ValueError(f"{output_dir} exists; choose another --output_dir or pass --overwrite")
        if not (output_dir / "report.html").is_file():
            raise ValueError(
                f"refusing to overwrite {output_dir}: it has content but no report.html, so no demo made it"
            )
        if foreign := sorted({path.name for path in output_dir.iterdir()} - CONTENT):
            raise ValueError(f"refusing to overwrite {output_dir}: no demo made {foreign[0]}; move it elsewhere first")
    if videos < SHOWN:
        raise ValueError(f"videos must be at least {SHOWN}, got {videos}")
    check_device(device)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    started = time.time()
    announce(output_dir, stages)
    with new_folder(output_dir) as folder:
        outcome = write_demo(folder, device, seed, videos, stages)
    print(f"done in {time.time() - started:.0f} s: open {output_dir / 'report.html'}")
    return outcome


def write_demo(folder: Path, device: str, seed: int, videos: int, stages: Sequence[str]) -> dict:
    started = time.time()
    check_output(folder / "side_by_side.mp4")
    say("training", stages)
    pipeline = load_pipeline(teacher.FOLDER).to(device)
    pipeline.set_progress_bar_config(disable=True)
    config = demo_config(folder / "training", seed, adm="adm" in stages)
    result = train(config, pipeline, prompts=WORLD.training_captions())
    os.rename(result.pipeline_path, folder / "pipeline")
    print(f"linear layers: {result.layers_linear} of {len(pipeline.transformer.blocks)}")

    say("evaluation", stages)
    stage_started = time.time()
    alternate = list(range(1, len(pipeline.transformer.blocks), 2))
    transformers = {
        "teacher": pipeline.transformer,
        "same_layers_untrained": warmed_up(pipeline.transformer, config, result.layers_linear),
        "alternate_untrained": warmed_up(pipeline.transformer, config, alternate),
        "final": load_pipeline(folder / "pipeline").to(device).transformer,
    }
    outcome, films = evaluate(pipeline, transformers, videos, WORLD)
    seconds = result.seconds | {"evaluation": time.time() - stage_started}

    few_films = {}
    if "distill" in stages:
        say("distillation", stages)
        stage_started = time.time()
        models_and_reference = (pipeline, transformers["final"], films["teacher"])
        few_steps, few_films = distill_and_compare(folder, *models_and_reference, seed, WORLD)
        outcome["few_steps"] = few_steps
        seconds["distillation"] = time.time() - stage_started

    say("kernel_check", stages)
    stage_started = time.time()
    outcome["kernel_check"] = check_kernels(folder / "pipeline", device)
    print_kernel_check(outcome["kernel_check"])
    seconds["kernel_check"] = time.time() - stage_started

    say("latency", stages)
    stage_started = time.time()
    lengths = [256, 1024, 4096, 16384] if device.startswith("cpu") else [1024, 4096, 16384, 65536]
    outcome["latency_ms"] = attention_latency(device, lengths)
    seconds["latency"] = time.time() - stage_started

    outcome |= {
        "layers_linear": result.layers_linear,
        "sensitivity": {str(layer): error for layer, error in result.sensitivity.items()},
        "r": {str(layer): value for layer, value in result.r.items()},
        "videos": videos,
        "device": device,
        "seconds": seconds | {"total": time.time() - started},
        "environment": {
            "device": device_name(device),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
        },
    }
    # the runs' own reports name a temporary folder in their commands, and the demo's has what they say
    for name in ("training", "distillation"):
        (folder / name / REPORT).unlink(missing_ok=True)
    film = side_by_side([film[:SHOWN] for film in films.values()])
    save_video(film, folder / "side_by_side.mp4", fps=8, crf=5)
    (folder / "metrics.json").write_text(json.dumps(outcome, indent=1) + "\n", encoding="utf-8")
    write_report(folder, outcome, films, WORLD.evaluation_captions(videos), few_films)
    return outcome


def parts(stages: Sequence[str]) -> dict[str, tuple[str, int]]:
    """Return what of PARTS a demo with these stages has."""
    return {name: part for name, part in PARTS.items() if name != "distillation" or "distill" in stages}


def announce(output_dir: Path, stages: Sequence[str]) -> None:
    """Say where the demo writes and how long it takes."""
    listed = parts(stages)
    print(f"the demo writes to {output_dir.resolve()}, which appears when all is done; on two idle cores expect")
    for what, seconds in [*listed.values(), ("in total", sum(seconds for _, seconds in listed.values()))]:
        print(f"  {max(1, round(seconds / 60)):2d} min  {what}", flush=True)


def say(name: str, stages: Sequence[str]) -> None:
    """Say which part begins."""
    listed = parts(stages)
    print(f"part {list(listed).index(name) + 1} of {len(listed)}: {listed[name][0]}", flush=True)


def print_kernel_check(check: dict | None) -> None:
    if check is None:
        print("no training step through the kernels: Triton is not installed here")
        return
    loss_error = abs(check["loss_kernels"] - check["loss_reference"])
    print(
        f"one training step through the kernels ({check['kernels']}): loss differs by {loss_error:.1e}, gradients by"
        f" {check['gradient_error']:.1e} (relative) from the reference"
    )


def demo_config(output_dir: Path, seed: int, adm: bool = False) -> TrainConfig:
    """Return the recipe "demo" without validation, because the demo compares the models itself."""
    options = {"output_dir": output_dir, "seed": seed, "checkpoints_total_limit": 1, "validation.steps": 0}
    options |= {"objective.name": "hybrid"} if adm else {}
    words = (word for name, value in options.items() for word in (f"--{name}", str(value)))
    return load_config(["--config", "demo", *words], TrainConfig)
