"""Runs that were begun by version 0.1.0, before there was a `Run` class, can be continued (folders in earlier_runs)."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny import tiny_pipeline, tiny_transformer
from tiny_run import watched

from linvideo.distillation import DistillConfig, distill, distiller
from linvideo.models import convert, describe, load_pipeline
from linvideo.run import read_metrics
from linvideo.run.checkpoint import list_checkpoints, load_checkpoint
from linvideo.run.read_config import load_config
from linvideo.transfer import TrainConfig, train, trainer

EARLIER = Path(__file__).parent / "earlier_runs"
PROMPTS = ["a red fox runs", "two white boats race"]


def teacher():
    """A teacher with the same weights on every machine, because the stored trajectories fit only this model."""
    pipeline = tiny_pipeline(tiny_transformer(2, attention_head_dim=8, ffn_dim=8, freq_dim=16))
    for number, part in enumerate((pipeline.transformer, pipeline.text_encoder, pipeline.vae)):
        for count, (name, tensor) in enumerate(sorted(part.named_parameters())):
            numbers = (torch.arange(tensor.numel()) * 7919 + 104729 * count + number) % 1021 - 510
            with torch.no_grad():
                tensor.copy_((numbers / 2**12).view_as(tensor))
                if "norm" in name and name.endswith("weight"):
                    tensor.fill_(1.0)
    return pipeline


@pytest.mark.parametrize("kind", ["transfer", "distill"])
def test_an_earlier_run_is_continued(kind, tmp_path, capsys):
    folder = tmp_path / kind
    shutil.copytree(EARLIER / kind, folder)
    rows, checkpoint = read_metrics(folder / "metrics.jsonl"), list_checkpoints(folder)[-1]
    saved, state = load_checkpoint(checkpoint)
    words = ["--config", str(folder / "config.yaml"), "--output_dir", str(folder), "--resume_from_checkpoint", "latest"]
    restored, pipeline = {}, teacher()
    with watched(trainer if kind == "transfer" else distiller) as seen, pytest.MonkeyPatch.context() as patch:
        remaining = trainer.Run.remaining

        def look(run):
            restored.update({name: value.detach().clone() for name, value in run.trained().items()})
            return remaining(run)

        patch.setattr(trainer.Run, "remaining", look)
        if kind == "transfer":
            train(load_config(words, TrainConfig), pipeline, PROMPTS)
        else:
            distill(
                load_config(words, DistillConfig), pipeline, convert(pipeline.transformer, [1], mode="linear"), PROMPTS
            )
    assert capsys.readouterr().err.count("created again") == 0  # the stored embeddings and trajectories were used
    assert restored.keys() == saved.keys() and all(torch.equal(restored[name], saved[name]) for name in saved)
    now = read_metrics(folder / "metrics.jsonl")
    assert [row for row in now if row["step"] <= state["global_step"]] == rows[: state["global_step"]]
    if kind == "transfer":
        assert [row["stage"] for row in now] == ["warmup"] + ["selection"] * 2 + ["finetune"] * 4
        layers = json.loads((EARLIER / kind / "selection.json").read_text())["linear_layers"]
        assert describe(load_pipeline(folder / "pipeline").transformer).layers_linear == layers
    else:
        assert [row["stage"] for row in now] == ["regression"] + ["dmd"] * 4
    assert seen.run.global_step == len(now)
