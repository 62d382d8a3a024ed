"""Pieces of a self-contained HTML report: tables, plots and filmstrips, all inside the one file."""

import base64
import html
import io

import numpy as np
import torch

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1060px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.7em; margin-bottom: .2em } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; font-size: .88em } th { background: #f4f4f4 }
th, td { padding: .3em .6em; border: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left }
img { max-width: 100% } pre { white-space: pre-wrap; font-size: .88em } p.note { color: #555; font-size: .92em }
"""


def page(title: str, summary: str, sections: list[tuple[str, str]]) -> str:
    """A whole HTML document. sections: (heading as text, body as HTML)."""
    body = "".join(f"<h2>{html.escape(heading)}</h2>\n{content}\n" for heading, content in sections)
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>\n{note(summary)}\n{body}</body></html>\n"
    )


def note(text: str) -> str:
    return f"<p class='note'>{html.escape(text)}</p>"


def table(columns: list[str], rows: list[list]) -> str:
    """Numbers are shown with four significant digits."""

    def cell(value) -> str:
        return html.escape(f"{value:.4g}" if isinstance(value, float) else str(value))

    head = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
    body = "".join("<tr>" + "".join(f"<td>{cell(value)}</td>" for value in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def plot(draw, size: tuple[float, float] = (5.0, 3.2)) -> str:
    """An <img> of one matplotlib axes that `draw(axes)` fills; no display is needed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    draw(figure.subplots())
    return image_tag(to_png(figure))


def film_picture(films: dict[str, torch.Tensor], captions: list[str]) -> bytes:
    """A PNG: for each caption a block, in it a filmstrip for each model, named at the left, time to the right.

    Args:
        films: model's name -> videos, float [B, 3, F, H, W] in [-1, 1], B at least the number of captions.
        captions: one for each block.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.2 * len(captions)), layout="constrained")
    for index, (axes, caption) in enumerate(
        zip(figure.subplots(len(captions), squeeze=False)[:, 0], captions, strict=True)
    ):
        strips = np.concatenate([filmstrip(film[index], 8) for film in films.values()])
        height = len(strips) / len(films)
        axes.imshow(strips, interpolation="none")
        axes.set_title(f"“{caption}”", fontsize=9, loc="left")
        axes.set_xticks([])
        axes.set_yticks([(row + 0.5) * height for row in range(len(films))], list(films), fontsize=8)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    return to_png(figure)


def to_png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def image_tag(png: bytes) -> str:
    return f"<img alt='' src='data:image/png;base64,{base64.b64encode(png).decode()}'>"


def to_pixels(videos: torch.Tensor, scale: int) -> np.ndarray:
    """float [B, 3, F, H, W] in [-1, 1] -> uint8 [B, F, scale*H, scale*W, 3], every pixel a square of scale x scale."""
    pixels = ((videos.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 4, 1).repeat_interleave(scale, 2).repeat_interleave(scale, 3).numpy()


def filmstrip(video: torch.Tensor, scale: int = 4) -> np.ndarray:
    """The frames of one video [3, F, H, W] from left to right, thinly framed: uint8 [H', W', 3]."""
    framed = np.pad(to_pixels(video[None], scale)[0], ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=128)
    return np.concatenate(list(framed), axis=1)


def side_by_side(videos: list[torch.Tensor], scale: int = 6) -> np.ndarray:
    """One film: a column for each tensor [B, 3, F, H, W], a row for each video of it: uint8 [F, H', W', 3]."""
    columns = [np.concatenate(list(to_pixels(batch, scale)), axis=1) for batch in videos]
    return np.concatenate(columns, axis=2)
