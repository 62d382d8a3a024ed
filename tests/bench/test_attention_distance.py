"""How far attention reaches: the closed cases, and a whole model with one layer whose attention is uniform."""

import pytest
import torch

from benchmarks import attention_distance
from linvideo.demo.teacher import FOLDER
from linvideo.models import convert, load_pipeline, sampling_settings

FRAMES, PER_FRAME, HEADS, DIM = 5, 3, 2, 8


def test_attention_to_one_frame():
    """Head 0 sees only frame 1; head 1 is uniform."""
    frame = torch.arange(FRAMES).repeat_interleave(PER_FRAME)
    q = torch.zeros(2, FRAMES * PER_FRAME, HEADS, DIM)
    k = torch.zeros_like(q)
    q[:, :, 0, 0] = 100
    k[:, frame == 1, 0, 0] = 100
    weights, keys = attention_distance.by_distance(q, k, PER_FRAME)
    torch.testing.assert_close(weights[0], torch.tensor([1, 2, 1, 1, 0]) / FRAMES)
    torch.testing.assert_close(weights[1], torch.tensor([5, 8, 6, 4, 2]) / FRAMES**2)
    torch.testing.assert_close(keys, torch.tensor([PER_FRAME, FRAMES * PER_FRAME]).float())


def test_a_layer_without_queries_is_uniform():
    pipeline = load_pipeline(FOLDER)
    pipeline.set_progress_bar_config(disable=True)
    stock = pipeline.transformer
    flat = stock.blocks[2].attn1
    torch.nn.init.zeros_(flat.to_q.weight)
    torch.nn.init.zeros_(flat.to_q.bias)
    settings = sampling_settings(pipeline) | {"num_inference_steps": 2}
    layers, uniform = attention_distance.measure(pipeline, ["a red disc moving left"], **settings)
    assert pipeline.transformer is stock
    pipeline.transformer = convert(stock)
    with pytest.raises(ValueError, match="with one WanTransformer3DModel, got one with LinVideoWan"):
        attention_distance.measure(pipeline, ["a red disc moving left"], **settings)
    assert list(layers) == list(range(len(stock.blocks)))
    for layer, seen in layers.items():
        weights, keys = seen
        torch.testing.assert_close(weights.sum(-1), torch.ones(len(weights)))
        same = torch.allclose(weights, uniform[0], atol=1e-5) and torch.allclose(keys, uniform[1], rtol=1e-4)
        assert same == (layer == 2), layer


def test_the_table(capsys):
    attention_distance.main(["--captions", "a red disc moving left"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    names, *cells = zip(*rows, strict=True)
    assert names == ("| layer", "| uniform", *(f"| {layer}" for layer in range(8)))
    for own, near, farther in zip(*(map(float, column[1:]) for column in cells[:3]), strict=True):
        assert 0 < own < near < farther <= 100


@pytest.mark.parametrize("frames", [1, 2])
def test_short_videos_have_all_weight_near(frames):
    q = torch.randn(1, frames * PER_FRAME, HEADS, DIM)
    row = attention_distance.line("x", *attention_distance.by_distance(q, q, PER_FRAME))
    assert row.split(" | ")[2:4] == ["100", "100"]
