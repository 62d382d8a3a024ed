"""A video file either has all frames or does not exist, and a failed save keeps an existing file."""

import os
import resource
import stat
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from linvideo.models.video_file import check_output, save_video
from linvideo.workspace import LOCK

imageio = pytest.importorskip("imageio")


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).random(shape)


@contextmanager
def largest_file(size: int):
    """Limit the size of files, which stands for a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_file_holds_the_frames(tmp_path):
    flat = np.linspace(0, 1, 9)[:, None, None, None] * np.ones((9, 32, 40, 3))
    pixels = (255 * flat).round().astype(np.uint8)
    path = tmp_path / "new" / "v.mp4"
    for frames in (flat, flat.astype(np.float32) * 1.001, pixels, list(pixels), [Image.fromarray(x) for x in pixels]):
        save_video(frames, path, fps=24, crf=5)
        with imageio.get_reader(path) as reader:
            assert reader.get_meta_data()["fps"] == 24
        assert abs(np.stack(imageio.mimread(path)).astype(int) - pixels).max() < 6
    assert [file.name for file in path.parent.iterdir()] == ["v.mp4"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("there", [False, True])
def test_a_full_disk_is_an_error_and_the_old_video_stays(tmp_path, there):
    path = tmp_path / "v.mp4"
    if there:
        path.write_text("mine")
    with largest_file(8192), pytest.raises(OSError, match=f"cannot write the video {path}: ffmpeg exited with"):
        save_video(noise(17, 64, 64, 3), path, 16)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["mine"] * there


@pytest.mark.parametrize(
    "result, reason", [("", "No such file"), ("echo junk > $last", "frames"), ("exit 3", "exited with status 3")]
)
def test_the_written_file_is_read_back(tmp_path, monkeypatch, result, reason):
    ffmpeg = tmp_path / "ffmpeg"
    ffmpeg.write_text(f"#!/bin/sh\nfor last; do :; done\ncat > /dev/null\n{result}\n")
    ffmpeg.chmod(0o700)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(ffmpeg))
    (tmp_path / "videos").mkdir()
    monkeypatch.chdir(tmp_path / "videos")  # where a relative path like "-" would be written
    for write in (check_output, lambda path: save_video(noise(3, 32, 32, 3), path, 16)):
        with pytest.raises(OSError, match=reason):
            write(tmp_path / "v.mp4")
    assert {path.name for path in tmp_path.iterdir()} == {"ffmpeg", "videos"}


def test_missing_frames_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("imageio_ffmpeg.count_frames_and_secs", lambda path: (2, 1.0))
    with pytest.raises(OSError, match="holds 2 of 3 frames"):
        save_video(noise(3, 32, 32, 3), tmp_path / "v.mp4", 16)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "frames, fps, message",
    [
        (noise(0, 32, 32, 3), 16, r"\[F, H, W, 3\]"),
        (noise(2, 32, 32), 16, r"\[F, H, W, 3\]"),
        (noise(2, 33, 32, 3), 16, "even"),
        (np.full((2, 32, 32, 3), np.nan), 16, "finite"),
        (noise(2, 32, 32, 3), 0, "fps must be at least 1, got 0"),
        (noise(2, 32, 32, 3), float("nan"), "fps must be at least 1, got nan"),
    ],
)
def test_frames_that_are_no_video_are_refused(tmp_path, frames, fps, message):
    with pytest.raises(ValueError, match=message):
        save_video(frames, tmp_path / "v.mp4", fps)
    assert not list(tmp_path.iterdir())


def test_the_output_path_is_tried_first(tmp_path):
    check_output(tmp_path / "a" / "b" / "v.mp4")
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "v.mp4", tmp_path / f"{'x' * 260}.mp4"):
        with pytest.raises(OSError, match=f"cannot write the video {path}: "):
            check_output(path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("write", [check_output, lambda path: save_video(noise(3, 32, 32, 3), path, 16)])
def test_what_a_kill_has_left_is_deleted(tmp_path, write):
    dead, mine = tmp_path / ".tmp-0123456789abcdef-video", tmp_path / ".tmp-mine"
    for folder in (dead, mine):
        folder.mkdir()
        (folder / "v.mp4").write_text("half")
    (dead / LOCK).touch()
    write(tmp_path / f"{'v' * 250}.mp4")
    assert mine.is_dir() and not dead.exists()
