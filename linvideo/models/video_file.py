"""Writing mp4 files that are either complete or absent."""

import errno
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from linvideo.workspace import remove_dead, workspace


def save_video(frames: np.ndarray | Sequence, output: str | Path, fps: int, crf: int = 25) -> None:
    """Save one video as an mp4 file (H.264).

    It is encoded to a temporary folder next to `output`, read back, and only then moved to `output`, replacing an
    existing file.

    Args:
        frames: Frames [F, H, W, 3] with even H and W, floats in [0, 1] or uint8, as an array or as a list of arrays or
            PIL images.
        output: Path of the file.
        fps: Frame rate in frames per second, at least 1.
        crf: Constant rate factor of the encoder, from 0 (lossless) to 51 (worst).

    Raises:
        ValueError: The frames have another shape or values that are not finite, or fps is below 1.
        OSError: The file could not be written or does not hold all frames. An existing file is then unchanged.
    """
    output, pixels = Path(output), _pixels(frames)
    with _temporary(output, output.parent) as new:
        _encode(pixels, new, fps, crf)
        os.replace(new, output)


def check_output(output: str | Path, fps: int = 16) -> None:
    """Encode a small video next to `output` and delete it.

    This finds problems with the folder, the encoder or fps before hours of sampling. It creates no missing folders.

    Raises:
        ValueError, OSError: As for `save_video`.
    """
    output = Path(output).absolute()
    with _temporary(output, next(parent for parent in output.parents if parent.exists())) as new:
        _encode(np.zeros((2, 16, 16, 3), np.uint8), new, fps)


@contextmanager
def _temporary(output: Path, parent: Path) -> Iterator[Path]:
    """Yield a path to write to, in a temporary folder in `parent`.

    Temporary folders of killed processes are deleted. The message of any system error names `output`.
    """
    try:
        if parent.exists() and not parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        remove_dead(parent)
        with workspace(parent / "video") as space:  # a short name, since that of `output` may already be the longest
            yield space / output.name
    except OSError as error:
        raise OSError(f"cannot write the video {output}: {error.strerror or error}") from error


def _pixels(frames: np.ndarray | Sequence) -> np.ndarray:
    """Convert frames to contiguous uint8 [F, H, W, 3]."""
    pixels = np.stack([np.asarray(frame) for frame in frames]) if len(frames) else np.empty(0)
    if pixels.ndim != 4 or pixels.shape[3] != 3 or pixels.shape[1] % 2 or pixels.shape[2] % 2:
        raise ValueError(f"expected frames [F, H, W, 3] with H and W even, got {list(pixels.shape)}")
    if pixels.dtype != np.uint8:
        if not np.isfinite(pixels).all():
            raise ValueError("expected a video of finite values, got NaN or infinity; nothing was written")
        pixels = (255 * pixels.clip(0, 1)).round().astype(np.uint8)
    return np.ascontiguousarray(pixels)


def _encode(pixels: np.ndarray, path: Path, fps: int, crf: int = 25) -> None:
    """Encode pixels to `path`; raise OSError with ffmpeg's reason, or if the file cannot be read back."""
    from imageio_ffmpeg import count_frames_and_secs, get_ffmpeg_exe

    if not fps >= 1:
        raise ValueError(f"fps must be at least 1, got {fps}")
    frames, height, width, _ = pixels.shape
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "-"]
    result = ["-an", "-pix_fmt", "yuv420p", "-crf", str(crf), str(path)]
    try:
        command = [get_ffmpeg_exe(), "-v", "error", *source, *result]
        done = subprocess.run(command, input=memoryview(pixels).cast("B"), capture_output=True)
        if done.returncode:
            reason = done.stderr.decode(errors="replace").strip().splitlines()
            raise OSError(f"ffmpeg exited with status {done.returncode}{': ' + reason[-1] if reason else ''}")
        with path.open("rb") as file:
            os.fsync(file.fileno())
        found = count_frames_and_secs(str(path))[0]
    except RuntimeError as error:  # ffmpeg is missing or cannot read the file
        raise OSError(str(error).strip().splitlines()[-1]) from None
    if found != frames:
        raise OSError(f"the file holds {found} of {frames} frames")
