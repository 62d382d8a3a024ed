import base64
import io

import numpy as np
import pytest
import torch
from pages import Page
from PIL import Image

from linvideo.models.video_file import save_video
from linvideo.reports import charts, films, html_page
from linvideo.reports.layer_choice import layer_choice, reason


def test_page_escapes_text_and_needs_no_other_file():
    document = html_page.page("a < b", "x & y", [("chart", charts.bars({0: 1.0}, "<x>", "y'", []))], "1 > 0")
    assert "a &lt; b" in document and "x &amp; y" in document and "1 &gt; 0" in document and "&lt;x&gt;" in document
    assert "http" not in document and "src='/" not in document
    assert Page(document).text.index("1 > 0") < Page(document).text.index("x & y")


def test_table_rounds_numbers_and_escapes():
    html = html_page.table(["name", "value"], [["<i>", 1.23456]])
    assert "<td>&lt;i&gt;</td><td>1.235</td>" in html


def test_to_pixels_maps_the_range_and_enlarges():
    video = torch.tensor([-1.0, 0.0, 1.0, 5.0]).view(1, 1, 4, 1, 1).expand(1, 3, 4, 1, 1)
    pixels = films.to_pixels(video, 2)
    assert pixels.shape == (1, 4, 2, 2, 3)
    assert pixels[0, :, 0, 0, 0].tolist() == [0, 128, 255, 255]


def test_side_by_side_places_models_in_columns_and_prompts_in_rows():
    dark, bright = torch.full((2, 3, 4, 8, 8), -1.0), torch.full((2, 3, 4, 8, 8), 1.0)
    film = films.side_by_side([dark, bright], 3)
    assert film.shape == (4, 48, 48, 3)
    assert film[:, :, :24].max() == 0 and film[:, :, 24:].min() == 255


def test_small_videos_keep_their_pixels_and_large_ones_are_shrunk(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
    (small,) = Page(films.moving_picture(frames, 8, "pixels")).images
    assert small["class"] == "pixels" and small["alt"] == "pixels"
    with opened(small) as picture:
        assert picture.n_frames == 5
        for number in range(5):
            picture.seek(number)
            assert np.array_equal(np.asarray(picture.convert("RGB")), frames[number])
    light = (np.arange(90) * 37 % 256).astype(np.uint8)[:, None, None, None]  # frames alike would be stored as one
    save_video(np.broadcast_to(light, (90, 240, 640, 3)), tmp_path / "a b.mp4", fps=16)
    page = Page(films.linked_video(tmp_path, "a b.mp4", "student"))
    assert page.links == ["a%20b.mp4"]
    with opened(page.images[0]) as picture:
        assert picture.size == (320, 120) and picture.n_frames == 30
    with pytest.raises(OSError, match="does not exist"):
        films.read_video(tmp_path / "none.mp4")
    (tmp_path / "broken.mp4").write_text("no video")
    with pytest.raises(OSError, match="cannot read the video"):
        films.read_video(tmp_path / "broken.mp4")


def test_a_filmstrip_fills_its_width():
    videos = torch.zeros(2, 3, 8, 16, 16)
    with Image.open(io.BytesIO(films.film_picture({"teacher": videos, "student": videos}, ["a", "b"]))) as picture:
        pixels = np.asarray(picture.convert("L"))
    assert pixels.shape[1] >= 1600 and pixels[-1, -1] == 128 and pixels[0, 0] == 255  # frames to the very corner


def test_charts():
    drawn = charts.lines({"a": [(0, 1.0), (1, 10.0)], "empty": []}, "x", "loss", yscale="log", rules={"5": ("y", 5.0)})
    assert [image["alt"] for image in Page(drawn).images] == ["loss over x"]
    assert Page(charts.bars({0: 1.0, 1: 0.0}, "layer", "error", [0], rules={"floor": ("y", 0.0)})).images
    assert charts.lines({"a": []}, "x", "y") == "" and charts.bars({0: 0.0}, "x", "y", []) == ""


def test_the_layers_are_explained():
    sensitivity = {0: 0.1, 1: 0.2, 2: 0.4, 3: 0.3}
    assert "also the least sensitive" in reason([0, 1], sensitivity, {})
    said = reason([0, 2], sensitivity, {0: 0.0, 1: 0.8, 2: 0.6, 3: 1.0})
    assert "layer 1 (r 0.80) would have been taken in place of layer 2 (r 0.60)" in said
    said = reason([2, 3], sensitivity, {})
    assert said.endswith("layers 0 and 1 would have been taken in place of layers 2 and 3.")
    assert Page(layer_choice([0], {}, {})).text.count("linear")


def test_a_report_that_fails_is_a_warning():
    with pytest.warns(UserWarning, match="report.html was not written: no space"), html_page.if_possible():
        raise OSError("no space")


def opened(image: dict[str, str]):
    return Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2])))
