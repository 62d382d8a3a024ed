"""A Wan transformer on the kernels, where the op rotates and mixes, gives the same results as on plain PyTorch."""

import pytest
import torch

pytest.importorskip("diffusers", reason="the models need diffusers")

from tiny import tiny_inputs, tiny_transformer  # noqa: E402

from linvideo.models import convert, set_attention_types  # noqa: E402


def run(model, device: str) -> dict[str, torch.Tensor]:
    """Return the output and every gradient, moved to the CPU."""
    inputs = {name: x.to(device) if torch.is_tensor(x) else x for name, x in tiny_inputs(batch=1).items()}
    model.zero_grad()
    out = model.to(device)(**inputs)[0]
    out.square().mean().backward()
    grads = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach().cpu()} | grads


def test_equals_plain_pytorch(device, monkeypatch):
    model = convert(tiny_transformer(), layers=[0, 1], mode="mixed")
    set_attention_types(model, {1: "linear"})
    kernels = run(model, device)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    plain = run(model, "cpu")
    assert kernels.keys() == plain.keys() and "blocks.0.attn1.linear_attn.r" in kernels
    for name in plain:
        torch.testing.assert_close(kernels[name], plain[name], rtol=1e-4, atol=1e-6, msg=name)
