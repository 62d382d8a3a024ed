import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_inputs, tiny_transformer

from linvideo.models import LinVideoWanTransformer3DModel, convert, describe, finalize

WEIGHTS = "diffusion_pytorch_model.safetensors"


def run(model, dtype=torch.float32):
    with torch.no_grad():
        return model(**tiny_inputs(dtype=dtype))[0]


def perturbed(model):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "linear_attn" in name and not name.endswith(".r"):
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


MODELS = {
    "mixed": lambda: convert(tiny_transformer(), layers=[0, 2], r_init=0.7),
    "linear": lambda: convert(tiny_transformer(), mode="linear"),
    "elu": lambda: convert(tiny_transformer(), layers=[1], feature_map="elu"),
    "window": lambda: convert(tiny_transformer(), layers=[0, 2], mode="window", window={"chunk": 1, "overlap": 0}),
    "finalized": lambda: finalize(convert(tiny_transformer()), linear_layers=[1]),
    "no layer": lambda: finalize(convert(tiny_transformer()), linear_layers=[]),
}


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_bit_exact(name, tmp_path):
    model = perturbed(MODELS[name]())
    model.save_pretrained(tmp_path)
    loaded, info = LinVideoWanTransformer3DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    assert torch.equal(run(loaded), run(model))
    assert describe(loaded) == describe(model)
    assert loaded.config.attention_types == model.config.attention_types
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["_class_name"] == "LinVideoWanTransformer3DModel"
    assert saved["attention_types"] == model.config.attention_types
    loaded.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert {k: v for k, v in again.items() if k != "_name_or_path"} == saved


def test_bf16_loading_keeps_the_linear_branch_in_fp32(tmp_path):
    convert(tiny_transformer()).save_pretrained(tmp_path)
    model = LinVideoWanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    attn = model.blocks[0].attn1
    assert attn.to_q.weight.dtype == torch.bfloat16
    assert {p.dtype for p in attn.linear_attn.parameters()} == {torch.float32}
    assert run(model, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_training_continues_after_loading(tmp_path):
    convert(tiny_transformer()).save_pretrained(tmp_path)
    model = LinVideoWanTransformer3DModel.from_pretrained(tmp_path).train()
    assert all(parameter.requires_grad for parameter in model.parameters())
    run_loss = model(**tiny_inputs())[0].square().mean()
    run_loss.backward()
    assert model.blocks[0].attn1.linear_attn.r.grad.abs() > 0


def test_stock_folder_loads_as_softmax_and_is_not_half_converted(tmp_path):
    base = tiny_transformer()
    base.save_pretrained(tmp_path)
    model = LinVideoWanTransformer3DModel.from_pretrained(tmp_path)
    assert describe(model).layers_softmax == [0, 1, 2]
    assert torch.equal(run(model), run(base))
    assert convert(model, layers=[0]).config.attention_types == ["mixed", "softmax", "softmax"]
    with pytest.raises(ValueError, match=r"linvideo.convert") as error:
        LinVideoWanTransformer3DModel.from_pretrained(tmp_path, attention_types=["linear", "softmax", "softmax"])
    assert "\n" not in str(error.value)


def test_damaged_folders_are_refused(tmp_path):
    convert(tiny_transformer(), layers=[1]).save_pretrained(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / WEIGHTS
    good_config, good_weights = json.loads(config.read_text()), load_file(weights)

    config.write_text(json.dumps({**good_config, "attention_types": ["softmax", "softmax", "softmax"]}))
    with pytest.raises(ValueError, match="do not belong together"):
        LinVideoWanTransformer3DModel.from_pretrained(tmp_path)
    config.write_text(json.dumps({**good_config, "linear_attention": {"feature_map": "hedgehog", "version": 2}}))
    with pytest.raises(ValueError, match="linear_attention must be"):
        LinVideoWanTransformer3DModel.from_pretrained(tmp_path)
    config.write_text(json.dumps(good_config))
    assert LinVideoWanTransformer3DModel.from_pretrained(tmp_path).config.attention_types[1] == "mixed"

    for lacking in ("blocks.1.attn1.linear_attn.r", "blocks.0.attn1.to_q.weight"):
        save_file({name: tensor for name, tensor in good_weights.items() if name != lacking}, weights)
        with pytest.raises(ValueError, match=lacking.replace(".", r"\.")):
            LinVideoWanTransformer3DModel.from_pretrained(tmp_path)
