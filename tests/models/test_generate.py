"""`generate_video` with every family: the frame rate, and the requested size and number of frames."""

import diffusers
import numpy as np
import pytest
from families import FAMILIES, cogvideox_pipeline, ltx_pipeline
from tiny import tiny_pipeline

from linvideo import convert
from linvideo.models import default_fps
from linvideo.models.generate import generate_video

FPS = {"Wan 2.2 TI2V-5B": 24, "SkyReels-V2": 24, "LTX-Video": 25, "HunyuanVideo 1.5": 24, "CogVideoX": 8}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_its_frame_rate(name):
    pipeline = FAMILIES[name].pipeline()
    assert default_fps(pipeline) == default_fps(convert(pipeline, layers=[0])) == FPS.get(name, 16)


def test_a_frame_rate_in_the_pipeline_takes_precedence(monkeypatch):
    cogvideox = cogvideox_pipeline()
    cogvideox.transformer.register_to_config(patch_size_t=2)  # CogVideoX 1.5
    assert default_fps(cogvideox) == 16
    monkeypatch.setattr(diffusers.LTXPipeline, "__call__", lambda self, prompt, frame_rate=30: None)
    assert default_fps(ltx_pipeline()) == 30


@pytest.mark.parametrize("name", FAMILIES)
def test_a_video_is_as_requested_or_refused(name):
    family = FAMILIES[name]
    pipeline = family.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    for attribute, value in family.settings.items():
        setattr(pipeline, attribute, value)
    arguments = family.arguments()
    arguments.pop("max_sequence_length", None)
    made, most = 0, {"ChronoEdit": 1, "CogVideoX": 1}.get(name, 2)
    for num_frames, width in ((5, 32), (9, 64), (7, 32), (9, 40)):
        size = {"num_frames": num_frames, "height": 32, "width": width}
        try:
            video = generate_video(pipeline, "a red circle", num_inference_steps=1, **size, **arguments)
        except ValueError as error:
            assert str(error).startswith(("num_frames must be ", "width must be a positive multiple of "))
        else:
            assert np.shape(video) == (num_frames, 32, width, 3)
            made += 1
    assert made == most


def test_sizes_that_the_pipeline_would_round_are_refused():
    pipeline = tiny_pipeline(expand_timesteps=True)
    pipeline.vae_scale_factor_spatial = 16  # as in Wan 2.2 TI2V, whose patches then have 32 pixels
    with pytest.raises(ValueError, match="height must be a positive multiple of 32, got 720"):
        generate_video(pipeline, "a fox", height=720, width=1280)


def test_a_video_that_is_not_finite_is_refused():
    pipeline = tiny_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.transformer.proj_out.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="the sampled video is not finite"):
        generate_video(pipeline, "a fox", num_inference_steps=1, num_frames=5, height=32, width=32)
