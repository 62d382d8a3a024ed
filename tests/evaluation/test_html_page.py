import torch

from linvideo.evaluation import html_page


def test_page_escapes_text_and_needs_no_other_file():
    document = html_page.page("a < b", "x & y", [("plot", html_page.plot(lambda axes: axes.plot([1, 2])))])
    assert "a &lt; b" in document and "x &amp; y" in document
    assert "data:image/png;base64," in document
    assert "http" not in document and "src='/" not in document


def test_table_rounds_numbers_and_escapes():
    html = html_page.table(["name", "value"], [["<i>", 1.23456]])
    assert "<td>&lt;i&gt;</td><td>1.235</td>" in html


def test_to_pixels_maps_the_range_and_enlarges():
    video = torch.tensor([-1.0, 0.0, 1.0, 5.0]).view(1, 1, 4, 1, 1).expand(1, 3, 4, 1, 1)
    pixels = html_page.to_pixels(video, 2)
    assert pixels.shape == (1, 4, 2, 2, 3)
    assert pixels[0, :, 0, 0, 0].tolist() == [0, 128, 255, 255]


def test_side_by_side_places_models_in_columns_and_prompts_in_rows():
    dark, bright = torch.full((2, 3, 4, 8, 8), -1.0), torch.full((2, 3, 4, 8, 8), 1.0)
    film = html_page.side_by_side([dark, bright], 3)
    assert film.shape == (4, 48, 48, 3)
    assert film[:, :, :24].max() == 0 and film[:, :, 24:].min() == 255
