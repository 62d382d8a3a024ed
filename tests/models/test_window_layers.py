"""Window layers of a model: their settings, and the latent grid. test_families.py has them in every family."""

import json
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from families import FAMILIES, randn, run
from tiny import tiny_inputs, tiny_transformer

import linvideo
from linvideo.models import LinVideoLTXVideoTransformer3DModel, LinVideoWanTransformer3DModel, convert, describe
from linvideo.models.attention import self_attentions, window_backend
from linvideo.nn import Window

WINDOW = {"chunk": 1, "overlap": 0}


def windows(**options) -> torch.nn.Module:
    return convert(tiny_transformer(), mode="window", window=WINDOW, **options)


def latents(*shape: int) -> dict:
    return tiny_inputs() | {"hidden_states": randn(2, 16, *shape, seed=4)}


def test_settings_are_in_the_config_and_the_description(tmp_path):
    model = convert(convert(tiny_transformer(), layers=[1], mode="window"), layers=[0], mode="linear")
    assert model.config.linear_attention == {"feature_map": "hedgehog", "window": Window().settings()}
    assert model.config.attention_types == ["linear", "window", "softmax"]
    text = str(describe(model))
    assert "  window  (1): 1; chunks of 3 latent frames, overlap 1\n" in text and "linear  (1): 0" in text
    more = convert(model, mode="window")  # with the settings of the model
    assert describe(more).layers_window == [1, 2] and describe(more).window == Window()
    with pytest.raises(ValueError, match="one window setting: expected chunks of 3 .*, got chunks of 1"):
        convert(model, mode="window", window=WINDOW)

    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["linear_attention"]
    assert saved["window"] == {"chunk": 3, "overlap": 1, "anchors": [], "causal": False}
    short = LinVideoWanTransformer3DModel.from_pretrained(tmp_path, linear_attention={**saved, "window": {"chunk": 2}})
    assert describe(short).window == Window(chunk=2)
    for bad in ({**saved, "window": {"chunk": 0}}, {**saved, "window": 3}, {"window": {}}):
        with pytest.raises(ValueError, match="linear_attention.* must be"):
            LinVideoWanTransformer3DModel.from_pretrained(tmp_path, linear_attention=bad)


def test_types_at_runtime_and_finalizing():
    base = tiny_transformer()
    model = convert(convert(base, layers=[0], mode="window", window=WINDOW), layers=[1], r_init=0.2)
    with linvideo.attention_types(model, {0: "softmax", 1: "softmax"}):
        assert torch.equal(run(FAMILIES["Wan 2.1 T2V"], model), run(FAMILIES["Wan 2.1 T2V"], base))
    with pytest.raises(ValueError, match="layer 0 can run as softmax or window, got 'linear'"):
        linvideo.models.set_attention_types(model, {0: "linear"})
    with pytest.raises(ValueError, match=r"got the window layers \[0\]"):
        linvideo.finalize(model, linear_layers=[0, 1])
    assert linvideo.finalize(model).config.attention_types == ["window", "linear", "softmax"]
    assert describe(model).window == Window(**WINDOW)


def test_any_grid_at_any_call():
    model = windows()
    single = LinVideoWanTransformer3DModel.from_config(model.config).eval()
    single.load_state_dict(model.state_dict())
    with torch.no_grad():
        for shape in ((3, 8, 8), (5, 8, 8), (1, 4, 6)):
            inputs = latents(*shape)
            expected = model(**inputs)[0]
            assert {attn.frame_tokens for attn in self_attentions(model)} == {shape[1] * shape[2] // 4}
            arguments = [inputs.pop(name) for name in ("hidden_states", "timestep", "encoder_hidden_states")]
            assert torch.equal(single(*arguments, **inputs)[0], expected)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.full)])
def test_checkpointing_recomputes_with_the_grid_of_its_forward(compiled):
    """Both videos have 48 tokens, and the backward of the first comes after the forward of the second."""
    base, gradients = tiny_transformer(num_layers=1 if compiled else 3), []
    base.enable_gradient_checkpointing()
    for checkpointing in (False, True):
        model = convert(base, mode="window", window=WINDOW).train()
        assert model.is_gradient_checkpointing
        if not checkpointing:
            model.disable_gradient_checkpointing()
        call = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled and checkpointing else model
        outputs = [call(**latents(*shape))[0] for shape in ((3, 8, 8), (4, 6, 8))]
        sum(out.square().mean() for out in outputs).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_ltx_needs_its_grid():
    family = FAMILIES["LTX-Video"]
    model = convert(family.transformer(), layers=[1], mode="window", window=WINDOW)
    with pytest.raises(ValueError, match=r"expected num_frames, height and width .* got \[3, None, 2\]"):
        run(family, model, height=None)
    with pytest.raises(ValueError, match="expected 3 x 2 x 2 = 12 tokens .* got 16"):  # conditions come first
        run(family, model, hidden_states=randn(2, 16, 8, seed=1))
    with pytest.raises(ValueError, match="expects a call by its model"):
        fresh = convert(family.transformer(), layers=[1], mode="window", window=WINDOW)
        fresh.transformer_blocks[1].attn1(randn(2, 12, 32, seed=1))


def test_a_family_that_cannot_say_its_grid_is_refused(monkeypatch):
    monkeypatch.setattr(LinVideoLTXVideoTransformer3DModel, "tokens_per_frame", None)
    base = FAMILIES["LTX-Video"].transformer()
    with pytest.raises(ValueError, match="expected a method tokens_per_frame of LinVideoLTXVideo.*, got none"):
        convert(base, mode="window")
    assert convert(base, mode="linear").config.linear_attention == {"feature_map": "hedgehog"}


def test_uneven_context_parallelism_is_refused():
    model = windows()
    parallel = SimpleNamespace(ulysses_anything=True, _flattened_mesh=MagicMock())
    config = SimpleNamespace(context_parallel_config=parallel)
    model.blocks[1].attn1.processor._parallel_config = config
    with pytest.raises(ValueError, match="without ulysses_anything in a model with window layers"):
        model(**tiny_inputs())


def test_softmax_backends_have_two_names():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert window_backend(None, cuda) is window_backend("native", cuda) is None
    assert window_backend("_native_flash", cpu) == "cpu" and window_backend("_native_flash", cuda) == "flash"
    assert window_backend("flash", cuda) == "flash_attn_2"
    with pytest.raises(ValueError, match="must be one of native, .*, got 'sage'"):
        window_backend("sage", cuda)
    model = windows()
    with pytest.raises(ValueError, match="got '_native_math'"):
        linvideo.models.choose_backend(model, "_native_math")
    assert {attn.processor._attention_backend for attn in self_attentions(model)} == {None}
    with attention_backend("_native_math"), pytest.raises(ValueError, match="got '_native_math'"):
        model(**tiny_inputs())  # diffusers' softmax layers take this backend too
    with attention_backend("_native_flash"):
        assert window_backend(None, cuda) == "flash"
