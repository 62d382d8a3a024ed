"""The time and memory of a video are measured without leaving a trace on the pipeline."""

import numpy as np
import pytest
from tiny import generate, tiny_pipeline, tiny_transformer

from linvideo.evaluation.sampling import Cost, Job, Made, make_videos, measured, summary
from linvideo.trajectories.prompts import Prompt


def untouched(pipeline) -> bool:
    hooks = (pipeline.transformer._forward_pre_hooks, pipeline.transformer_2._forward_pre_hooks)
    return "step" not in vars(pipeline.scheduler) and not any(hooks)


def test_steps_and_seconds():
    pipeline = tiny_pipeline(transformer_2=tiny_transformer(seed=1), boundary_ratio=0.9)
    with measured(pipeline) as cost:
        generate(pipeline, num_inference_steps=3)
    assert cost.steps == 3 and 0 < cost.sampler_seconds < cost.seconds and cost.peak_memory > 1e7
    assert untouched(pipeline)
    with pytest.raises(ValueError, match="multiple|divisible"), measured(pipeline) as cost:
        pipeline(prompt="a cat", height=33, width=32)
    assert cost.steps == 0 and untouched(pipeline)


def test_summary():
    made = [Made(Job(None, 0, None), Cost(5.0, 4.0, 2, 2 * 10**9)), Made(Job(None, 1, None), Cost(3.0, 2.0, 2, 10**9))]
    assert summary(made, "cpu") == "1.5 s per step, 8 s in total, peak memory of the process 2.00 GB"
    assert "peak GPU memory 2.00 GB" in summary(made, "cuda:0")
    assert summary([Made(Job(None, 0, None), Cost(3.0))], "cpu") == "3 s in total"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_that_appears_meanwhile_is_kept(tmp_path, monkeypatch, overwrite):
    path = tmp_path / "v.mp4"

    def sample(*_, **__):
        path.write_text("another run's")
        return np.zeros((1, 16, 16, 3))

    monkeypatch.setattr("linvideo.evaluation.sampling.generate_video", sample)
    (made,) = make_videos(tiny_pipeline(), [Job(Prompt("a fox"), 0, path)], {}, overwrite=overwrite)
    names = ["v.mp4"] if overwrite else ["v-1.mp4", "v.mp4"]
    assert sorted(file.name for file in tmp_path.iterdir()) == names and made.job.path.name == names[0]
    assert (path.read_bytes() == b"another run's") != overwrite
