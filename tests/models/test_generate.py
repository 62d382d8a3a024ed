"""What `generate_video` and `save_video` promise: frame rates, sizes and counts, and files that are whole."""

import diffusers
import pytest
from families import FAMILIES, cogvideox_pipeline, ltx_pipeline

from linvideo import convert
from linvideo.models import default_fps

FPS = {"Wan 2.2 TI2V-5B": 24, "SkyReels-V2": 24, "LTX-Video": 25, "HunyuanVideo 1.5": 24, "CogVideoX": 8}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_its_frame_rate(name):
    pipeline = FAMILIES[name].pipeline()
    assert default_fps(pipeline) == default_fps(convert(pipeline, layers=[0])) == FPS.get(name, 16)


def test_a_frame_rate_that_the_pipeline_states_comes_first(monkeypatch):
    cogvideox = cogvideox_pipeline()
    cogvideox.transformer.register_to_config(patch_size_t=2)  # CogVideoX 1.5
    assert default_fps(cogvideox) == 16
    monkeypatch.setattr(diffusers.LTXPipeline, "__call__", lambda self, prompt, frame_rate=30: None)
    assert default_fps(ltx_pipeline()) == 30
