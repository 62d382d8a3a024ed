"""How close the videos of a converted pipeline are to those of its teacher from the same noise."""

import importlib.util
import warnings
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from linvideo.evaluation.sampling import check_inputs
from linvideo.evaluation.work_folder import WorkFolder, identity
from linvideo.models import default_fps, own_settings
from linvideo.models.generate import generate_video
from linvideo.models.video_file import check_output, save_video
from linvideo.run.video_metrics import compare
from linvideo.trajectories.prompts import warn_of_unknown_words
from linvideo.workspace import locked

METRICS = ("psnr", "ssim", "lpips", "flicker", "teacher_flicker")


def fidelity(
    student: Any,
    teacher: Any,
    prompts: list[str],
    folder: str | Path,
    seed: int = 0,
    fps: int | None = None,
    **settings,
) -> Iterator[dict]:
    """Yield a row for each prompt once it is finished; the rows of an interrupted run come first.

    Args:
        student, teacher: Pipelines of the same class, on their device.
        prompts: Captions of the videos.
        folder: Folder for rows.json, and for NNNN-student.mp4 and NNNN-teacher.mp4 of each prompt. The same call
            continues an interrupted run in it.
        seed: Seed of the noise for the first prompt; prompt number i has seed + i.
        fps: Frame rate of the files; None means the student's own, see `default_fps`.
        settings: Values of height, width, num_frames, num_inference_steps, guidance_scale and negative_prompt for
            `generate_video`. A distilled student keeps its own steps and guidance.

    A row has these fields:
        prompt, seed: Caption, and seed of the noise.
        psnr, ssim: PSNR in dB and SSIM of the student's video to the teacher's.
        lpips: LPIPS distance; only if the package lpips is installed.
        flicker, teacher_flicker: Mean absolute difference of neighbouring frames, with pixels in [0, 1], in the
            student's and in the teacher's video.

    Raises:
        ValueError: There are no prompts, sizes do not fit, or the folder holds other work or is in use.
        OSError: A video cannot be written; this is checked before anything is sampled.
    """
    if not prompts:
        raise ValueError("expected at least one prompt, got none")
    for pipeline in (student, teacher):
        check_inputs(pipeline)
    if type(student) is not type(teacher):
        raise ValueError(f"expected a {type(student).__name__} as the teacher, got a {type(teacher).__name__}")
    perceptual = _lpips(student.device)
    request = {
        "suite": "fidelity",
        "prompts": prompts,
        "seed": seed,
        "fps": default_fps(student) if fps is None else fps,
        **settings,
    }
    request |= {"student": identity(student), "teacher": identity(teacher), "lpips": perceptual is not None}
    if request["student"] == request["teacher"]:
        warnings.warn("the student is its own teacher: both have the same weights", stacklevel=2)
    warn_of_unknown_words(student.tokenizer, prompts)
    with locked(folder):
        work = WorkFolder(folder, request)
        check_output(work.path / "0000-student.mp4", request["fps"])
        yield from work.rows
        for number in range(len(work.rows), len(prompts)):
            videos = {}
            for who, pipeline in (("student", student), ("teacher", teacher)):
                generator = torch.Generator("cpu").manual_seed(seed + number)
                own = settings | own_settings(pipeline)
                video = generate_video(pipeline, prompts[number], generator=generator, **own)
                save_video(video, work.path / f"{number:04d}-{who}.mp4", request["fps"])
                videos[who] = torch.as_tensor(video, device=student.device).permute(0, 3, 1, 2)
            row = {"prompt": prompts[number], "seed": seed + number} | compare(**videos, perceptual=perceptual)
            work.add(row)
            yield row


def summary(rows: list[dict]) -> dict[str, tuple[float, float]]:
    """Return the mean and standard deviation of each metric over the prompts."""
    found = {name: [row[name] for row in rows] for name in METRICS if name in rows[0]}
    return {name: (mean(x), stdev(x) if len(x) > 1 else 0.0) for name, x in found.items()}


def _lpips(device: torch.device):
    """Return LPIPS (AlexNet) of the package lpips; None if it is not installed."""
    if importlib.util.find_spec("lpips") is None:
        return None
    import lpips

    model = lpips.LPIPS(net="alex", verbose=False).to(device).eval()

    @torch.no_grad()
    def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return model(a, b)

    return distance
