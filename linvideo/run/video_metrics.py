"""Similarity of two videos, and flicker of one."""

import torch


def compare(student: torch.Tensor, teacher: torch.Tensor, perceptual=None) -> dict[str, float]:
    """Return psnr, ssim, lpips (with `perceptual`), flicker and teacher_flicker of two videos.

    PSNR is that of the whole video, at most 100 dB, and NaN if a pixel is NaN. SSIM (11 x 11 Gaussian window) and LPIPS
    are means over frames.

    Args:
        student: Video [F, 3, H, W] in [0, 1].
        teacher: Video to compare with, of the same shape.
        perceptual: Function of two image batches in [-1, 1] that returns a distance per image, such as those of the
            package lpips.
    """
    # imported here, because everything imports this module's users but few need the metrics
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    pairs = list(zip(student.split(8), teacher.split(8), strict=True))  # SSIM of a whole video at once takes tens of GB
    similar = [structural_similarity_index_measure(a, b, data_range=1.0, reduction="none") for a, b in pairs]
    row = {"psnr": float(peak_signal_noise_ratio(student, teacher, data_range=1.0).clamp(max=100.0))}
    row["ssim"] = float(torch.cat([x.flatten() for x in similar]).mean())
    if perceptual is not None:
        row["lpips"] = float(torch.cat([perceptual(2 * a - 1, 2 * b - 1).flatten() for a, b in pairs]).mean())
    return row | {"flicker": flicker(student), "teacher_flicker": flicker(teacher)}


def flicker(video: torch.Tensor) -> float:
    """Return the mean absolute difference of neighbouring frames of [F, ...]; 0 for a single frame."""
    return float(video.diff(dim=0).abs().mean()) if len(video) > 1 else 0.0
