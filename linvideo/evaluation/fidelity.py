"""How close a converted pipeline's videos are to its teacher's, from the same noise: needs the two pipelines only."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from linvideo.evaluation.generate import generate_video, save_video
from linvideo.evaluation.work_folder import WorkFolder, identity

METRICS = ("psnr", "ssim", "lpips", "flicker", "teacher_flicker")


def fidelity(
    student: Any, teacher: Any, prompts: list[str], folder: str | Path, seed: int = 0, fps: int = 16, **settings
) -> Iterator[dict]:
    """Yields a row for each prompt as it is finished, those of an interrupted run first.

    Args:
        student, teacher: WanPipelines on their device.
        folder: gets rows.json and for each prompt NNNN-student.mp4 and NNNN-teacher.mp4. A run that was interrupted is
            continued by the same call.
        seed: prompt number i starts from noise of seed + i.
        settings: height, width, num_frames, num_inference_steps, guidance_scale, negative_prompt of `generate_video`.

    A row has prompt, seed, psnr (dB), ssim, lpips (where the package lpips is installed) and flicker, the mean absolute
    difference of neighbouring frames in [0, 1], of the student's video and of the teacher's.

    Raises:
        ValueError: no prompts, sizes that do not fit, or a folder with other work.
    """
    if not prompts:
        raise ValueError("expected at least one prompt, got none")
    perceptual = _lpips(student.device)
    request = {"suite": "fidelity", "prompts": prompts, "seed": seed, "fps": fps, **settings}
    request |= {"student": identity(student), "teacher": identity(teacher), "lpips": perceptual is not None}
    work = WorkFolder(folder, request)
    yield from work.rows
    for number in range(len(work.rows), len(prompts)):
        videos = {}
        for who, pipeline in (("student", student), ("teacher", teacher)):
            generator = torch.Generator("cpu").manual_seed(seed + number)
            video = generate_video(pipeline, prompts[number], generator=generator, **settings)
            save_video(video, work.path / f"{number:04d}-{who}.mp4", fps=fps)
            videos[who] = torch.as_tensor(video, device=student.device).permute(0, 3, 1, 2)
        row = {"prompt": prompts[number], "seed": seed + number} | compare(**videos, perceptual=perceptual)
        work.add(row)
        yield row


def compare(student: torch.Tensor, teacher: torch.Tensor, perceptual=None) -> dict[str, float]:
    """Metrics of two videos [F, 3, H, W] in [0, 1]. perceptual: a function of image batches in [-1, 1], as of lpips.

    PSNR is of the whole video, at most 100 dB; SSIM (11 x 11 Gaussian window) and LPIPS are means over frames.
    """
    pairs = list(zip(student.split(8), teacher.split(8), strict=True))  # SSIM of a whole video takes tens of GB
    similar = [structural_similarity_index_measure(a, b, data_range=1.0, reduction="none") for a, b in pairs]
    row = {"psnr": min(100.0, float(peak_signal_noise_ratio(student, teacher, data_range=1.0)))}
    row["ssim"] = float(torch.cat([x.flatten() for x in similar]).mean())
    if perceptual is not None:
        row["lpips"] = float(torch.cat([perceptual(2 * a - 1, 2 * b - 1).flatten() for a, b in pairs]).mean())
    return row | {"flicker": flicker(student), "teacher_flicker": flicker(teacher)}


def flicker(video: torch.Tensor) -> float:
    """Mean absolute difference of neighbouring frames; 0 for a single frame."""
    return float(video.diff(dim=0).abs().mean()) if len(video) > 1 else 0.0


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
