"""Videos of many prompts and seeds by one pipeline, with their time and memory, alone or next to a teacher's."""

import inspect
import itertools
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from linvideo.models import default_fps, video_transformers
from linvideo.models.generate import generate_video
from linvideo.models.video_file import check_output, save_video
from linvideo.progress import show_steps
from linvideo.run.video_metrics import compare
from linvideo.trajectories.atomic_files import write_text
from linvideo.trajectories.devices import peak_memory
from linvideo.trajectories.images import read_image
from linvideo.trajectories.prompts import Prompt, warn_of_unknown_words
from linvideo.workspace import in_turn

INDEX = "videos.jsonl"  # in a folder of numbered videos: the caption, seed and image of each
_MEDIA = {"image", "video", "pose_video", "face_video"}  # arguments of pipelines


@dataclass(frozen=True)
class Job:
    """A video to be made: its prompt, the seed of its noise, and its .mp4 file."""

    prompt: Prompt
    seed: int
    path: Path


@dataclass
class Cost:
    """The time and memory of one call of a pipeline.

    Args:
        seconds: Time of the whole call, with text encoder and VAE.
        sampler_seconds: Time of the sampler alone.
        steps: Number of sampling steps.
        peak_memory: Peak memory in bytes: on a GPU, of tensors during the call; elsewhere, of the process since its
            start. None if the system does not tell.
    """

    seconds: float = 0.0
    sampler_seconds: float = 0.0
    steps: int = 0
    peak_memory: int | None = None


@dataclass(frozen=True)
class Made:
    """A video that has been written. With a teacher, psnr (dB) and ssim compare it with the teacher's video."""

    job: Job
    cost: Cost
    psnr: float | None = None
    ssim: float | None = None


def make_videos(
    pipeline: Any,
    jobs: list[Job],
    settings: dict[str, Any],
    teacher: Any = None,
    teacher_settings: dict[str, Any] | None = None,
    fps: int | None = None,
    overwrite: bool = True,
) -> Iterator[Made]:
    """Make the videos one after another; yield each one after it has been written.

    Args:
        pipeline: Pipeline, on its device.
        jobs: Videos to make.
        settings: Arguments of `generate_video` other than prompt, image and generator.
        teacher: Pipeline that `pipeline` was converted from. If it is given, its video from the same noise is on the
            left of each file.
        teacher_settings: The teacher's own settings, if they differ from `settings`.
        fps: Frame rate of the files; None means the pipeline's own, see `default_fps`.
        overwrite: Whether to replace existing files. If not, and a file appears while its video is sampled, the video
            goes to a numbered file next to it, which the yielded job names.

    Raises:
        ValueError: Before the first video: the teacher is of another kind, or the pipeline takes no image and gets one,
            or needs one and gets none. Later: see `generate_video`.
        OSError: A video cannot be written; for the first one, this is checked before it is sampled.
    """
    if teacher is not None and type(teacher) is not type(pipeline):
        raise ValueError(f"expected a {type(pipeline).__name__} to compare with, got a {type(teacher).__name__}")
    images = [_image(pipeline, job.prompt) for job in jobs]
    negative = settings.get("negative_prompt") or ""
    warn_of_unknown_words(pipeline.tokenizer, [*(job.prompt.caption for job in jobs), negative])
    fps = default_fps(pipeline) if fps is None else fps
    for job in jobs[:1]:
        check_output(job.path, fps)
    for number, (job, image) in enumerate(zip(jobs, images, strict=True), 1):
        arguments = {} if image is None else {"image": image}

        def run(maker: Any, given: dict, what: str, job: Job = job, arguments: dict = arguments) -> np.ndarray:
            show_steps(maker, desc=what)
            generator = torch.Generator("cpu").manual_seed(job.seed)
            return generate_video(maker, job.prompt.caption, generator=generator, **arguments, **given)

        what = f"video {number} of {len(jobs)}"
        with measured(pipeline) as cost:
            frames = run(pipeline, settings, what)
        found = {}
        if teacher is not None:
            other = run(teacher, settings if teacher_settings is None else teacher_settings, f"{what}, teacher")
            pair = (torch.as_tensor(video).permute(0, 3, 1, 2) for video in (frames, other))
            metrics = compare(*pair)
            found = {"psnr": metrics["psnr"], "ssim": metrics["ssim"]}
            frames = np.concatenate([other, frames], axis=2)
        path, taken = job.path, itertools.count(1)
        while path.exists() and not overwrite:
            path = job.path.with_stem(f"{job.path.stem}-{next(taken)}")
        save_video(frames, path, fps=fps)
        yield Made(replace(job, path=path), cost, **found)


def read_index(folder: Path) -> list[dict[str, Any]]:
    """Return the index of a folder of videos, in the order of their names; [] if there is no index yet.

    Raises:
        ValueError: The file is not such an index.
    """
    path = folder / INDEX
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        entries = [json.loads(line) for line in lines]
        return sorted(entries, key=lambda entry: str(entry["video"]))
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        raise ValueError(f"{path} is not an index of videos; move it, or choose another folder") from None


def add_to_index(folder: Path, job: Job) -> None:
    """Add the job's caption, seed and image to the folder's index; entries that other commands add meanwhile stay."""
    entry = {"video": job.path.name, "caption": job.prompt.caption, "seed": job.seed}
    if job.prompt.image is not None:
        entry["image"] = str(job.prompt.image)
    with in_turn(folder):
        others = [other for other in read_index(folder) if other["video"] != entry["video"]]
        entries = sorted([*others, entry], key=lambda entry: str(entry["video"]))
        # JSON escapes characters, so that no character of a caption ends a line
        write_text(folder / INDEX, "".join(json.dumps(entry) + "\n" for entry in entries))


@contextmanager
def measured(pipeline: Any) -> Iterator[Cost]:
    """Measure one call of the pipeline in the block; the result is complete at its end.

    In a sampling step, every family calls its transformer first and `scheduler.step` last, so these two are watched.
    """
    cost, device = Cost(), torch.device(pipeline._execution_device)  # differs from .device with offloading
    cuda, scheduler, first = device.type == "cuda", pipeline.scheduler, []

    def now() -> float:
        if cuda:
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def begin(*_) -> None:
        if not first:
            first.append(now())

    step = scheduler.step

    @wraps(step)  # because pipelines read its signature
    def counted(*args, **kwargs):
        result = step(*args, **kwargs)
        cost.steps += 1
        cost.sampler_seconds = now() - first[0]
        return result

    handles = [transformer.register_forward_pre_hook(begin) for transformer in video_transformers(pipeline).values()]
    scheduler.step = counted
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    started = now()
    try:
        yield cost
    finally:
        cost.seconds = now() - started
        cost.peak_memory = peak_memory(device)
        del scheduler.step
        for handle in handles:
            handle.remove()


def summary(made: list[Made], device: str) -> str:
    """Return the time and memory of the videos, in one line."""
    costs = [video.cost for video in made]
    steps, seconds = sum(cost.steps for cost in costs), sum(cost.seconds for cost in costs)
    each = f"{sum(cost.sampler_seconds for cost in costs) / steps:.3g} s per step, " if steps else ""
    text = f"{each}{seconds:.3g} s in total"
    if costs and costs[0].peak_memory is not None:
        where = "GPU memory" if torch.device(device).type == "cuda" else "memory of the process"
        text += f", peak {where} {max(cost.peak_memory for cost in costs) / 1e9:.2f} GB"
    return text


def check_inputs(pipeline: Any, image: Path | None = None, caption: str = "") -> None:
    """Raise ValueError if the pipeline needs more than this caption and image, or takes no image."""
    name, parameters = type(pipeline).__name__, inspect.signature(pipeline.__call__).parameters
    # LTXConditionPipeline works without an image; LTXImageToVideoPipeline has a default for it, but fails with that
    needed = {key for key, parameter in parameters.items() if parameter.default is parameter.empty} & _MEDIA
    needed |= {key for key in ("image", "video") if f"{key.title()}ToVideo" in name}
    if others := needed - {"image"}:
        raise ValueError(f"expected a pipeline that takes captions and images, got {name}, which needs {min(others)}")
    if "image" in needed and image is None:
        raise ValueError(f"{name} takes an image with each prompt, but got none with {caption[:60]!r}")
    if "image" not in parameters and image is not None:
        raise ValueError(f"{name} takes no image, but got {image}")


def _image(pipeline: Any, prompt: Prompt) -> Image.Image | None:
    check_inputs(pipeline, prompt.image, prompt.caption)
    return None if prompt.image is None else read_image(prompt.image)
