"""VBench (arXiv 2311.17982): its prompts, a pipeline's videos, and its package's scores next to those of the paper."""

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from linvideo.evaluation.sampling import check_inputs
from linvideo.evaluation.work_folder import WorkFolder, identity
from linvideo.models import default_fps
from linvideo.models.generate import generate_video
from linvideo.models.video_file import check_output, save_video
from linvideo.trajectories.atomic_files import crc32, read_json
from linvideo.trajectories.prompts import some_of, warn_of_unknown_words
from linvideo.workspace import locked

# Bytes of a prompt. File systems allow names of 255; a video's name is longer than its prompt, above all while it is
# being written.
LONGEST_NAME = 220
VIDEOS_PER_PROMPT = 5  # VBench's standard
# Per cent, from arXiv 2510.08318, Wan 1.3B: dense; LinVideo (16 of 30 layers linear); LinVideo distilled to 4 steps.
PAPER = {
    "imaging_quality": (66.25, 66.07, 65.62),
    "aesthetic_quality": (59.49, 59.41, 57.74),
    "motion_smoothness": (98.42, 98.19, 97.32),
    "dynamic_degree": (59.72, 59.67, 61.26),
    "background_consistency": (96.57, 96.72, 95.47),
    "subject_consistency": (95.28, 95.12, 93.74),
}


def full_info_path() -> Path:
    """Return the path of VBench_full_info.json in the installed package. ValueError if it is not installed."""
    found = importlib.util.find_spec("vbench")
    if found is None or found.origin is None:
        raise ValueError(
            "expected the package vbench, which holds the prompts, or --full_info with its VBench_full_info.json"
        )
    return Path(found.origin).with_name("VBench_full_info.json")


def prompts_of(full_info: str | Path, dimensions: list[str], most: int | None = None) -> list[str]:
    """Return the prompts on which these dimensions are measured, each once, in the order of the file.

    most: Maximum number of prompts per dimension, spread over the file; None means all.

    Raises:
        ValueError: The file is not VBench's, or has no prompt for a dimension.
    """
    of_prompt: dict[str, set[str]] = {}
    for entry in _entries(full_info):
        of_prompt.setdefault(entry["prompt_en"], set()).update(entry["dimension"])
    known = set().union(*of_prompt.values())
    if unknown := sorted(set(dimensions) - known):
        raise ValueError(f"expected dimensions among {', '.join(sorted(known))}, got {', '.join(unknown)}")
    measured = [[prompt for prompt, of in of_prompt.items() if name in of] for name in dimensions]
    chosen = {prompt for prompts in measured for prompt in some_of(prompts, most)}
    return [prompt for prompt in of_prompt if prompt in chosen]


def _entries(full_info: str | Path) -> list[dict[str, Any]]:
    entries = read_json(full_info)
    for entry in entries if isinstance(entries, list) else [entries]:
        prompt, of = (entry.get("prompt_en"), entry.get("dimension")) if isinstance(entry, dict) else (None, None)
        if not isinstance(prompt, str) or not isinstance(of, list) or not all(isinstance(name, str) for name in of):
            raise ValueError(f"expected a list of prompt_en and dimension in {full_info}, got {str(entry)[:200]}")
    return entries


def generate_videos(
    pipeline: Any,
    prompts: list[str],
    folder: str | Path,
    per_prompt: int = VIDEOS_PER_PROMPT,
    fps: int | None = None,
    **settings,
) -> Iterator[tuple[int, int]]:
    """Make the videos `{prompt}-{i}.mp4` in folder/videos, with VBench's file names.

    After each one, yield the number of finished videos and the total number. Videos whose checksum is in rows.json are
    kept. Video i of a prompt starts from noise of seed i.

    fps: Frame rate of the files; None means the pipeline's own. settings: Arguments of `generate_video`.

    Raises:
        ValueError: There are no prompts, sizes do not fit, or the folder holds other work or is in use.
        OSError: A video cannot be written; for the one with the longest name, this is checked first.
    """
    if not prompts or any({"/", "\0"} & set(prompt) for prompt in prompts):
        raise ValueError(f"expected prompts, none with a slash, because they name files, got {prompts[:3]}")
    for prompt in prompts:
        if len(prompt.encode()) > LONGEST_NAME:
            raise ValueError(
                f"expected prompts of at most {LONGEST_NAME} bytes, because they name files, got {prompt[:100]} ..."
            )
    check_inputs(pipeline)
    warn_of_unknown_words(pipeline.tokenizer, prompts)
    request = {
        "suite": "vbench",
        "prompts": prompts,
        "per_prompt": per_prompt,
        "fps": default_fps(pipeline) if fps is None else fps,
        **settings,
    }
    with locked(folder):
        work = WorkFolder(folder, request | {"model": identity(pipeline)})
        todo = [(prompt, seed) for prompt in prompts for seed in range(per_prompt)]
        paths = [work.path / "videos" / f"{prompt}-{seed}.mp4" for prompt, seed in todo]
        check_output(max(paths, key=lambda path: len(os.fsencode(path))), request["fps"])
        checksums = {row["video"]: row["checksum"] for row in work.rows}
        for finished, ((prompt, seed), path) in enumerate(zip(todo, paths, strict=True), 1):
            if not path.exists() or crc32(path) != checksums.get(path.name):
                if path.exists():
                    print(f"{path} is damaged, or was not recorded before a kill; it is made again", file=sys.stderr)
                generator = torch.Generator("cpu").manual_seed(seed)
                save_video(generate_video(pipeline, prompt, generator=generator, **settings), path, request["fps"])
                work.add({"video": path.name, "checksum": crc32(path)})
            yield finished, len(todo)


def score(folder: str | Path, dimensions: list[str], full_info: str | Path, device: str) -> dict[str, float]:
    """Return the package vbench's score of each dimension, in per cent, for the videos that `generate_videos` made.
    ImportError if it is not installed."""
    from vbench import VBench

    folder = Path(folder)
    judge = VBench(torch.device(device), str(full_info), str(folder))
    judge.evaluate(videos_path=str(folder / "videos"), name="vbench", dimension_list=dimensions)
    results = read_json(folder / "vbench_eval_results.json")
    return {dimension: 100 * results[dimension][0] for dimension in dimensions}


def table(scores: dict[str, float]) -> str:
    """Return a table of our scores next to the paper's, in per cent."""
    lines = [f"{'':24}{'ours':>8}{'dense':>8}{'LinVideo':>10}{'4 steps':>9}   (the last three: paper, Wan 1.3B)"]
    for dimension in {**PAPER, **scores}:
        ours = f"{scores[dimension]:.2f}" if dimension in scores else ""
        dense, linear, four = (f"{x:.2f}" for x in PAPER[dimension]) if dimension in PAPER else ("", "", "")
        lines.append(f"{dimension:24}{ours:>8}{dense:>8}{linear:>10}{four:>9}")
    return "\n".join(lines)
