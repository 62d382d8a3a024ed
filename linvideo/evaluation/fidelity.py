"""How close a converted pipeline's videos are to its teacher's, from the same noise: needs the two pipelines only."""

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
    """Yields a row for each prompt as it is finished, those of an interrupted run first.

    Args:
        student, teacher: WanPipelines on their device.
        folder: gets rows.json and for each prompt NNNN-student.mp4 and NNNN-teacher.mp4. A run that was interrupted is
            continued by the same call.
        seed: prompt number i starts from noise of seed + i.
        fps: frames per second of the files; None is the student's own, see `default_fps`.
        settings: height, width, num_frames, num_inference_steps, guidance_scale, negative_prompt of `generate_video`; a
            distilled student has steps and guidance of its own.

    A row has prompt, seed, psnr (dB), ssim, lpips (where the package lpips is installed) and flicker, the mean absolute
    difference of neighbouring frames in [0, 1], of the student's video and of the teacher's.

    Raises:
        ValueError: no prompts, sizes that do not fit, or a folder with other work or in use.
        OSError: a video cannot be written; whether they can be is tried before anything is sampled.
    """
    if not prompts:
        raise ValueError("expected at least one prompt, got none")
    for pipeline in (student, teacher):
        check_inputs(pipeline)
    if type(student) is not type(teacher):
        raise ValueError(f"expected a {type(student).__name__} for a teacher, got a {type(teacher).__name__}")
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
        warnings.warn("the student is its own teacher: the same weights, so that nothing is compared", stacklevel=2)
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
    """Metric -> mean and standard deviation over the prompts."""
    found = {name: [row[name] for row in rows] for name in METRICS if name in rows[0]}
    return {name: (mean(x), stdev(x) if len(x) > 1 else 0.0) for name, x in found.items()}


def _lpips(device: torch.device):
    """LPIPS (AlexNet) by the package lpips, None without it."""
    if importlib.util.find_spec("lpips") is None:
        return None
    import lpips

    model = lpips.LPIPS(net="alex", verbose=False).to(device).eval()

    @torch.no_grad()
    def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return model(a, b)

    return distance
