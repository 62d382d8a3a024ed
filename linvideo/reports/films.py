"""Videos as pictures: moving ones for a page, filmstrips for a README."""

import io
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from linvideo.reports import html_page

SMALL = 64  # pixels: videos up to this size are pixel art, stored as they are and enlarged with sharp edges
LARGEST_WIDTH, MOST_FRAMES = 320, 41  # of larger videos inside a page; they are shrunk and thinned out to these
STRIP_WIDTH = 1600  # pixels of a filmstrip picture, at least
TEXT, GREY, GAP = (34, 34, 34), (110, 110, 110), 6


def to_pixels(videos: torch.Tensor, scale: int = 1) -> np.ndarray:
    """float [B, 3, F, H, W] in [-1, 1] -> uint8 [B, F, scale*H, scale*W, 3], every pixel a square of scale x scale."""
    pixels = ((videos.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 4, 1).repeat_interleave(scale, 2).repeat_interleave(scale, 3).numpy()


def side_by_side(videos: list[torch.Tensor], scale: int = 6) -> np.ndarray:
    """One film: a column for each tensor [B, 3, F, H, W], a row for each video of it: uint8 [F, H', W', 3]."""
    columns = [np.concatenate(list(to_pixels(batch, scale)), axis=1) for batch in videos]
    return np.concatenate(columns, axis=2)


def moving_picture(frames: np.ndarray, fps: float, alt: str) -> str:
    """Return an <img> that plays in a loop, an animated WebP inside the page.

    Args:
        frames: uint8 [F, H, W, 3].
        fps: Frames per second.
        alt: A description for those who cannot see it.
    """
    height, width = frames.shape[1:3]
    small = max(height, width) <= SMALL
    every = 1 if small else -(-len(frames) // MOST_FRAMES)
    pictures = [Image.fromarray(frame) for frame in frames[::every]]
    if width > LARGEST_WIDTH and not small:
        size = (LARGEST_WIDTH, round(height * LARGEST_WIDTH / width))
        pictures = [picture.resize(size, Image.Resampling.LANCZOS) for picture in pictures]
    duration = round(1000 * every / fps)
    durations = [duration] * (len(pictures) - 1) + [duration + 400]  # a short rest shows where it starts again
    options = {"lossless": True} if small else {"quality": 55}
    file = io.BytesIO()
    pictures[0].save(
        file, "WEBP", save_all=True, append_images=pictures[1:], duration=durations, loop=0, method=4, **options
    )
    return html_page.image_tag(file.getvalue(), "webp", "pixels" if small else "", alt)


def read_video(path: str | Path) -> tuple[np.ndarray, float]:
    """Return the frames of a video file, uint8 [F, H, W, 3], and its frames per second.

    Raises:
        OSError: The file is missing or is no video.
    """
    from imageio_ffmpeg import read_frames

    if not Path(path).is_file():
        raise OSError(f"expected a video file, got {path}, which does not exist")
    try:
        reader = read_frames(str(path))
        found = next(reader)
        width, height = found["size"]
        return np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader]), found["fps"]
    except (OSError, RuntimeError, StopIteration, ValueError) as error:  # ffmpeg's words are a page
        reason = (str(error).strip().splitlines() or ["no frames"])[-1]
        raise OSError(f"cannot read the video {path}: {reason}") from None


def linked_video(folder: Path, path: str, name: str) -> str:
    """Return a small moving picture that links to the video file; path: relative to the report's folder."""
    return f"<a href='{quote(path)}'>{moving_picture(*read_video(folder / path), name)}</a>"


def film_picture(films: dict[str, torch.Tensor], captions: list[str]) -> bytes:
    """Return a PNG: under each caption a filmstrip of each model, named on the left, with time running to the right.

    Args:
        films: Model's name -> videos, float [B, 3, F, H, W] in [-1, 1], at least as many as there are captions.
        captions: The captions of the first videos.
    """
    name_font, caption_font = (ImageFont.load_default(size) for size in (32, 36))
    films = {name.replace(", ", ",\n"): film for name, film in films.items()}
    names = round(max(name_font.getlength(line) for name in films for line in name.split("\n"))) + 28
    frames, height, width = next(iter(films.values())).shape[2:]
    scale = max(1, -(-(STRIP_WIDTH - names - frames * GAP) // (frames * width)))
    row, head, between = scale * height + GAP, 60, 34
    block = head + len(films) * row + between
    canvas = Image.new(
        "RGB", (names + frames * (scale * width + GAP) - GAP, block * len(captions) - between - GAP), "white"
    )
    draw = ImageDraw.Draw(canvas)
    for number, caption in enumerate(captions):
        top = number * block
        draw.text((0, top + head / 2), f"“{caption}”", TEXT, caption_font, anchor="lm")
        draw.text((canvas.width, top + head / 2), "time runs to the right", GREY, name_font, anchor="rm")
        for line, (name, film) in enumerate(films.items()):
            upper = top + head + line * row
            draw.text((0, upper + (row - GAP) / 2), name, TEXT, name_font, anchor="lm")
            for index, frame in enumerate(to_pixels(film[number : number + 1], scale)[0]):
                canvas.paste(Image.fromarray(frame), (names + index * (scale * width + GAP), upper))
    file = io.BytesIO()
    canvas.save(file, "PNG", optimize=True)
    return file.getvalue()
