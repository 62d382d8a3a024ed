"""AdamW with 8-bit state; needs torchao (pip install 'linvideo[8bit]')."""

import pytest
import torch
from tiny_run import run, tiny_config

from linvideo.run.checkpoint import list_checkpoints, load_checkpoint
from linvideo.run.optimizer import OptimizerConfig

EIGHT_BIT = {"optimizer": {"lr_scheduler": "cosine", "lr_warmup_steps": 1, "use_8bit_adam": True}}


def test_needs_torchao(monkeypatch):
    monkeypatch.setattr("linvideo.run.optimizer.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="use_8bit_adam needs the package torchao"):
        OptimizerConfig(use_8bit_adam=True)


def test_a_run_continues_exactly_and_stays_close_to_fp32(tmp_path):
    pytest.importorskip("torchao")
    whole, other = run(tmp_path / "run", **EIGHT_BIT), run(tmp_path / "fp32")
    middle = next(
        path for path in list_checkpoints(tmp_path / "run") if load_checkpoint(path)[1]["stage"] == "finetune"
    )
    again = run(tmp_path / "run", resume_from_checkpoint=str(middle), **EIGHT_BIT)
    ours, repeated, fp32 = (result.pipeline.transformer.state_dict() for result in (whole, again, other))
    assert all(torch.equal(tensor, repeated[name]) for name, tensor in ours.items())
    changed = [name for name in ours if not torch.equal(ours[name], fp32[name])]
    rate = tiny_config(tmp_path / "x").optimizer.learning_rate
    assert changed and all((ours[name] - fp32[name]).abs().max() < 5 * rate for name in changed)


@pytest.mark.parametrize("seed", range(4))
def test_large_moments_are_kept_in_8_bits(seed):
    pytest.importorskip("torchao")
    torch.manual_seed(seed)  # includes blocks whose largest moment is negative, the hard case
    from linvideo.run.eight_bit import CheckpointedAdamW8bit

    large, small = torch.nn.Parameter(torch.randn(64, 64)), torch.nn.Parameter(torch.randn(10))
    optimizer = CheckpointedAdamW8bit([large, small], lr=1e-2)
    for parameter in (large, small):
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    moments = optimizer.state[large]["exp_avg"]
    assert moments.codes.dtype == torch.uint8 and type(optimizer.state[small]["exp_avg"]) is torch.Tensor
    saved = optimizer.state_dict()
    assert type(saved["state"][0]["exp_avg"]) is torch.Tensor and saved["state"][0]["exp_avg"].dtype == torch.float32
    other = CheckpointedAdamW8bit([large, small], lr=1.0)
    other.load_state_dict(saved)
    for name in ("codes", "scale"):
        assert torch.equal(getattr(other.state[large]["exp_avg"], name), getattr(moments, name))
    assert float(other.param_groups[0]["lr"]) == pytest.approx(1e-2) and float(other.state[large]["step"]) == 1
