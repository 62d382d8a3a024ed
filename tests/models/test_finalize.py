import pytest
import torch
from tiny import tiny_inputs, tiny_transformer

from linvideo.models import LinVideoWanTransformer3DModel, attention_types, convert, describe, finalize


def mixed_model(*r: float):
    model = convert(tiny_transformer(num_layers=len(r)))
    with torch.no_grad():
        for block, value in zip(model.blocks, r, strict=True):
            block.attn1.linear_attn.r.fill_(value)
    return model


def run(model):
    with torch.no_grad():
        return model(**tiny_inputs())[0]


def test_rounds_r():
    model = mixed_model(0.2, 0.9, 0.49, 0.5)
    with attention_types(model, {0: "linear", 1: "softmax", 2: "linear", 3: "softmax"}):
        expected = run(model)
    assert finalize(model) is model
    assert model.config.attention_types == ["linear", "softmax", "linear", "softmax"]
    assert torch.equal(run(model), expected)
    assert not any(name.endswith("linear_attn.r") for name in model.state_dict())
    assert [hasattr(block.attn1, "linear_attn") for block in model.blocks] == [True, False, True, False]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    finalize(model)  # no mixed layer is left
    assert model.state_dict().keys() == state.keys() and torch.equal(run(model), expected)


@pytest.mark.parametrize("linear", [[], [1], (2, 0), [0, 1, 2]])
def test_given_layers_override_r(linear):
    model = finalize(mixed_model(0.2, 0.9, 0.4), linear_layers=linear)
    assert describe(model).layers_linear == sorted(linear) and describe(model).layers_mixed == []
    rebuilt = LinVideoWanTransformer3DModel.from_config(model.config)
    assert rebuilt.state_dict().keys() == model.state_dict().keys()


def test_layers_that_are_linear_stay_linear():
    model = convert(convert(tiny_transformer(), layers=[0], mode="linear"), layers=[1], r_init=0.9)
    before = dict(model.state_dict())
    for linear, message in [([1], r"\[0\] are missing"), ([0, 2], r"softmax layers \[2\]"), ([0, 0], "duplicates")]:
        with pytest.raises(ValueError, match=message):
            finalize(model, linear_layers=linear)
    assert model.state_dict().keys() == before.keys() and describe(model).layers_mixed == [1]
    assert describe(finalize(model)).layers_linear == [0]


def test_finalized_model_runs_as_its_weights_say():
    model = mixed_model(0.2, 0.9, 0.4)
    with attention_types(model, {1: "softmax"}):
        pass
    model.blocks[0].attn1.attention_type = "softmax"  # a runtime type does not outlive the branch it was chosen for
    finalize(model)
    assert [block.attn1.attention_type for block in model.blocks] == ["linear", "softmax", "linear"]


def test_refuses_other_models():
    with pytest.raises(ValueError, match="expected a converted transformer, got WanTransformer3DModel"):
        finalize(tiny_transformer())


def test_describe():
    model = convert(convert(tiny_transformer(num_layers=4), layers=[2, 3], mode="linear"), layers=[0], r_init=0.25)
    description = describe(model)
    assert (description.layers_linear, description.layers_mixed, description.layers_softmax) == ([2, 3], [0], [1])
    assert description.r == {0: 0.25} and description.feature_map == "hedgehog" and description.num_layers == 4
    assert description.parameters == sum(p.numel() for p in model.parameters())
    assert description.parameters_linear_attn == 3 * 2 * 2 * 24 * 24 + 1
    for text in ("linear  (2): 2-3", "mixed   (1): 0", "softmax (1): 1", "0: 0.250", "hedgehog", "2 heads x 24"):
        assert text in str(description)


def test_describe_stock():
    description = describe(tiny_transformer())
    assert description.layers_softmax == [0, 1, 2] and description.feature_map is None and description.r == {}
    assert "softmax (3): 0-2" in str(description) and "linear  (0): none" in str(description)
    with pytest.raises(ValueError, match="expected one of .*WanTransformer3DModel.*, got Linear"):
        describe(torch.nn.Linear(1, 1))
