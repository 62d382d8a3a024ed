"""`linvideo check`: it reports every part, finds what is broken, and leaves the pipeline unchanged."""

import pytest
import torch
from tiny import tiny_image_pipeline, tiny_image_transformer, tiny_pipeline

from linvideo import convert
from linvideo.commands.main import main
from linvideo.evaluation.check import check_pipeline
from linvideo.run.forward_times import recall

SIZE = {"height": 32, "width": 32, "num_frames": 5}
FLAGS = [word for name, value in SIZE.items() for word in (f"--{name}", str(value))]


@pytest.fixture
def pipeline():
    pipeline = tiny_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_image_experts():
    """An image-to-video pipeline like Wan 2.2: two transformers, no image encoder."""
    first, second = (tiny_image_transformer(clip=False, seed=seed) for seed in (0, 1))
    return tiny_image_pipeline(first, transformer_2=second, boundary_ratio=0.7)


def findings(pipeline, tmp_path):
    return {finding.name: finding for finding in check_pipeline(pipeline, tmp_path / "check.mp4", **SIZE)}


def test_a_sound_pipeline_passes_and_is_unchanged(pipeline, tmp_path):
    transformer = pipeline.transformer
    before = {name: x.clone() for name, x in transformer.state_dict().items()}
    found = findings(pipeline, tmp_path)
    assert len(found) == 5 and all(finding.passed for finding in found.values()), found
    (row,) = recall(transformer.config, torch.float32, torch.device("cpu"))  # for `linvideo plan`
    assert row["tokens"] == 8 and row["seconds"] > 0
    assert pipeline.transformer is transformer and transformer.state_dict().keys() == before.keys()
    assert all(torch.equal(x, before[name]) for name, x in transformer.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == ["check.mp4"]


@pytest.mark.parametrize("make", [tiny_image_pipeline, tiny_image_experts])
def test_image_pipelines_are_checked_with_a_picture(tmp_path, make, monkeypatch):
    pipeline, seen, forward = make(), [], type(make().transformer).forward
    pipeline.set_progress_bar_config(disable=True)

    def record(self, hidden_states, *args, **keywords):
        seen.append((hidden_states[:, 16:].float(), keywords.get("encoder_hidden_states_image")))
        return forward(self, hidden_states, *args, **keywords)

    monkeypatch.setattr(type(pipeline.transformer), "forward", record)
    found = findings(pipeline, tmp_path)
    assert len(found) == 5 and all(finding.passed for finding in found.values()), found
    latents, embeds = seen[0]
    assert latents[:, 4:].std() > 0 and (embeds is None) == (make is tiny_image_experts)
    assert all(torch.allclose(each, latents, atol=1e-5) for each, _ in seen)  # in every part the same picture
    if embeds is not None:
        assert all(torch.allclose(each, embeds, atol=1e-5) for _, each in seen)


def test_a_broken_model_is_found_and_the_rest_still_reported(pipeline, tmp_path):
    with torch.no_grad():
        pipeline.transformer.proj_out.bias.fill_(float("nan"))
    found = findings(pipeline, tmp_path)
    assert len(found) == 5
    assert not found["a trajectory of the teacher"].passed
    assert not found["an ADM step moves r and the feature maps"].passed


def test_other_attention_at_r_1_is_found(pipeline, tmp_path, monkeypatch):
    from linvideo.nn import linear_attention

    def wrong(q, k, v, mix=None, **options):
        return torch.zeros_like(q) if mix is None else mix[0] + 1e-3

    monkeypatch.setattr(linear_attention, "linear_attn", wrong)
    found = findings(pipeline, tmp_path)
    assert not found["the converted model at r = 1 equals the base model"].passed
    assert not found["the feature maps learn softmax attention"].passed


@pytest.mark.parametrize("seed", range(4))
def test_maps_that_do_not_learn_are_found(pipeline, tmp_path, seed, monkeypatch):
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: None)
    found = {finding.name: finding for finding in check_pipeline(pipeline, tmp_path / "check.mp4", seed=seed, **SIZE)}
    assert not found["the feature maps learn softmax attention"].passed
    assert not found["an ADM step moves r and the feature maps"].passed


def test_the_command(pipeline, tmp_path, capsys):
    folder, output = tmp_path / "stock", tmp_path / "check.mp4"
    pipeline.save_pretrained(folder)
    command = ["check", str(folder), "--output", str(output), *FLAGS, "--device", "cpu"]
    assert main(command) == 0
    out, err = capsys.readouterr()
    loading, what, *lines = out.splitlines()
    assert "a trajectory of the teacher" in err and "trajectories: 100%" in err  # progress bars
    assert loading == f"loading {folder} in float32"
    assert what.startswith("check with videos of 32x32, 5 frames, 4 steps")
    assert len(lines) == 5 and all(line.startswith("ok ") for line in lines)
    kept = output.read_bytes()
    assert main(command) == 2 and "exists" in capsys.readouterr().err
    assert output.read_bytes() == kept
    with torch.no_grad():
        pipeline.transformer.proj_out.bias.fill_(float("nan"))
    pipeline.save_pretrained(folder)
    assert main([*command, "--overwrite"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_a_converted_pipeline_is_refused(pipeline, tmp_path):
    with pytest.raises(ValueError, match="expected a stock Wan pipeline"):
        findings(convert(pipeline, [0]), tmp_path)


def test_sizes_that_do_not_fit_are_refused(pipeline, tmp_path):
    for each in (pipeline, tiny_image_pipeline()):
        with pytest.raises(ValueError, match="num_frames must be 1 more than a multiple of 4"):
            list(check_pipeline(each, tmp_path / "check.mp4", **SIZE | {"num_frames": 6}))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"transformer": tiny_image_transformer(clip=False), "expand_timesteps": True}, "expand_timesteps"),
        ({"transformer": tiny_image_transformer(pos_embed_seq_len=10)}, "for a first and a last frame"),
    ],
)
def test_image_pipelines_that_training_does_not_take_are_refused(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        findings(tiny_image_pipeline(**options), tmp_path)
