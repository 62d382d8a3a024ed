import copy

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from tiny import tiny_inputs, tiny_pipeline, tiny_transformer

from linvideo.models import (
    LinVideoWanTransformer3DModel,
    attention_types,
    convert,
    describe,
    finalize,
    load_pipeline,
    save_pipeline,
)
from linvideo.nn import FEATURE_MAPS


def run(model, **arguments):
    with torch.no_grad():
        return model(**{**tiny_inputs(dtype=model.patch_embedding.weight.dtype), **arguments})[0]


def clone_state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model, state):
    assert model.state_dict().keys() == state.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_mixed_with_r_1_equals_the_original_bit_for_bit(dtype, feature_map):
    base = tiny_transformer().to(dtype)
    model = convert(base, mode="mixed", feature_map=feature_map, r_init=1.0)
    assert torch.equal(run(model), run(base))


def test_linear_and_r_below_1_change_the_output():
    base = tiny_transformer()
    outputs = [run(base), run(convert(base, mode="linear")), run(convert(base)), run(convert(base, layers=[1]))]
    for i, one in enumerate(outputs):
        assert torch.isfinite(one).all()
        for other in outputs[:i]:
            assert (one - other).norm() > 1e-3 * one.norm()


def test_original_is_not_changed():
    base = tiny_transformer()
    state, config, output = clone_state(base), dict(base.config), run(base)
    model = convert(base)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**tiny_inputs())[0].square().sum().backward()
    optimizer.step()
    assert not torch.equal(run(model.eval()), output)

    assert type(base) is WanTransformer3DModel and dict(base.config) == config and not base.training
    assert all(type(block.attn1.processor) is WanAttnProcessor for block in base.blocks)
    assert all(parameter.grad is None for parameter in base.parameters())
    assert_same_state(base, state)
    assert torch.equal(run(base), output)


def test_copy_false_shares_weights_but_not_structure():
    base = tiny_transformer()
    keys = set(base.state_dict())
    model = convert(base, layers=[0], copy=False)
    mine = dict(model.named_parameters())
    assert all(mine[name] is parameter for name, parameter in base.named_parameters())
    assert model.rope.freqs_cos is base.rope.freqs_cos
    assert set(base.state_dict()) == keys and not hasattr(base.blocks[0].attn1, "linear_attn")
    copied = dict(convert(base, layers=[0]).named_parameters())
    assert all(copied[name].data_ptr() != parameter.data_ptr() for name, parameter in base.named_parameters())


def test_keeps_dtype_requires_grad_and_training_flag():
    base = tiny_transformer().to(torch.bfloat16).train()
    base.requires_grad_(False)
    base.blocks[1].ffn.requires_grad_(True)
    base.blocks[0].eval()
    base.proj_out.weight.requires_grad_(True)
    base.proj_out.weight.grad = torch.ones_like(base.proj_out.weight)
    model = convert(base, layers=[0, 1])
    mine = dict(model.named_parameters())
    for name, parameter in base.named_parameters():
        assert (mine[name].dtype, mine[name].device) == (parameter.dtype, parameter.device), name
        assert mine[name].requires_grad == parameter.requires_grad and mine[name].grad is None, name
    assert model.training
    assert [block.attn1.linear_attn.training for block in model.blocks[:2]] == [False, True]
    new = {name: p for name, p in mine.items() if "linear_attn" in name}
    assert len(new) == 6 and all(p.dtype == torch.float32 and p.requires_grad for p in new.values())


def test_keeps_what_the_user_set_and_draws_no_random_numbers():
    base = tiny_transformer()
    base.enable_gradient_checkpointing()
    base.fuse_qkv_projections()
    for block in base.blocks:
        block.attn1.processor._attention_backend = "_native_math"
    rng = torch.get_rng_state()
    model = convert(base, r_init=1.0)
    assert torch.equal(torch.get_rng_state(), rng)
    assert model.gradient_checkpointing and model.blocks[0].attn1.fused_projections
    assert {block.attn1.processor._attention_backend for block in model.blocks} == {"_native_math"}
    assert torch.equal(run(model), run(base))


def test_config_is_complete_and_rebuilds_the_same_structure():
    model = convert(tiny_transformer(num_layers=4), layers=[1, 3], mode="linear", feature_map="elu")
    assert model.config.attention_types == ["softmax", "linear", "softmax", "linear"]
    assert model.config.linear_attention == {"feature_map": "elu"}
    rebuilt = LinVideoWanTransformer3DModel.from_config(model.config)
    assert rebuilt.state_dict().keys() == model.state_dict().keys()
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(run(rebuilt.eval()), run(model))


def test_layers_can_be_added():
    first = convert(tiny_transformer(), layers=[2], mode="linear")
    with torch.no_grad():
        first.blocks[2].attn1.linear_attn.q_weight.mul_(0.5)
    second = convert(first, layers=[0], r_init=0.3)
    assert second.config.attention_types == ["mixed", "softmax", "linear"]
    assert first.config.attention_types == ["softmax", "softmax", "linear"]
    assert torch.equal(second.blocks[2].attn1.linear_attn.q_weight, first.blocks[2].attn1.linear_attn.q_weight)
    assert describe(convert(second, layers="all", mode="linear")).layers_linear == [1, 2]
    with pytest.raises(ValueError, match=r"\[0, 2\] are already converted"):
        convert(second, layers=[2, 0, 1])
    with pytest.raises(ValueError, match="one feature_map"):
        convert(second, layers=[1], feature_map="relu")
    with pytest.raises(ValueError, match="at least one layer"):
        convert(convert(second))


def test_all_softmax_model_can_be_converted_with_any_feature_map():
    stock = LinVideoWanTransformer3DModel.from_config(tiny_transformer().config)
    assert convert(stock, layers=[1], feature_map="relu").config.linear_attention == {"feature_map": "relu"}


def test_pipeline_keeps_everything_else():
    pipeline = tiny_pipeline(expand_timesteps=True)
    transformer, config = pipeline.transformer, dict(pipeline.config)
    result = convert(pipeline, layers=[1], mode="linear")
    assert type(result) is type(pipeline) and result.config.expand_timesteps
    assert isinstance(result.transformer, LinVideoWanTransformer3DModel)
    assert result.config["transformer"] == ("linvideo", "LinVideoWanTransformer3DModel")
    for name in ("vae", "text_encoder", "tokenizer", "scheduler"):
        assert getattr(result, name) is getattr(pipeline, name)
    assert pipeline.transformer is transformer and dict(pipeline.config) == config


def test_pipeline_with_two_transformers():
    other = tiny_transformer(seed=1)
    result = convert(tiny_pipeline(transformer_2=other, boundary_ratio=0.9), layers=[0])
    assert result.transformer.config.attention_types == result.transformer_2.config.attention_types
    assert torch.equal(result.transformer_2.proj_out.weight, other.proj_out.weight)
    assert result.config.boundary_ratio == 0.9


@pytest.mark.parametrize("layers", ["some", [3], [-1], [0, 0], [0.0], ["1"], [True], 1, None, [], {0: 1}, b"\x00"])
def test_bad_layers(layers):
    with pytest.raises(ValueError, match=r"layer") as error:
        convert(tiny_transformer(), layers=layers)
    assert "\n" not in str(error.value)


def test_layers_may_be_any_iterable():
    assert describe(convert(tiny_transformer(), layers=range(1, 3))).layers_mixed == [1, 2]
    assert describe(convert(tiny_transformer(), layers=(2, 0))).layers_mixed == [0, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "softmax"}, "mode must be one of"),
        ({"mode": None}, "mode must be one of"),
        ({"window": {"chunk": 3}}, "go with mode \"window\" only, got mode 'mixed'"),
        ({"mode": "window", "window": {"chunk": 0}}, "chunk must be an integer of at least 1, got 0"),
        ({"feature_map": "identity"}, "feature_map must be one of"),
        ({"r_init": -0.1}, "r_init must lie in"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        convert(tiny_transformer(), **arguments)


class Subclass(WanTransformer3DModel):
    pass


def with_class(model):
    model = copy.deepcopy(model)
    model.__class__ = Subclass
    return model


def with_processor(model):
    model.blocks[1].attn1.processor = object()
    return model


def with_hooks(model):
    from accelerate import cpu_offload

    return cpu_offload(model, execution_device=torch.device("cpu"))


def misread(model):
    model.register_to_config(attention_types=["linear"] * 3)
    return model


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda model: model.blocks, "expected one of .*WanTransformer3DModel.*, got"),
        (lambda model: "a/folder", "expected one of .*WanTransformer3DModel.*, got"),
        (with_class, "expected one of .*WanTransformer3DModel.*, got"),
        (with_processor, "expected WanAttnProcessor in layer 1"),
        (with_hooks, "without hooks"),
        (lambda model: model.to("meta"), "meta device"),
        (misread, "has loaded without them"),
        (lambda model: tiny_transformer(attention_head_dim=12), "head_dim must be a multiple of 8"),
    ],
)
def test_refuses_what_it_cannot_convert(spoil, message):
    with pytest.raises(ValueError, match=message) as error:
        convert(spoil(tiny_transformer()))
    assert "\n" not in str(error.value)


def test_a_compiled_transformer_is_the_model_inside(tmp_path):
    pipeline = tiny_pipeline()
    stock = pipeline.transformer
    expected = run(convert(stock))
    pipeline.transformer = torch.compile(stock, backend="eager")
    assert describe(pipeline.transformer) == describe(stock)
    assert torch.equal(run(convert(pipeline.transformer)), expected)
    pipeline = convert(pipeline)
    assert torch.equal(run(pipeline.transformer), expected)
    pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")
    model = pipeline.transformer
    assert torch.equal(run(model), expected)
    with attention_types(model, dict.fromkeys(range(3), "softmax")):
        assert torch.equal(run(model), run(stock))
    save_pipeline(pipeline, tmp_path / "pipeline")
    assert "mixed   (3): 0-2" in (tmp_path / "pipeline" / "README.md").read_text()
    assert describe(finalize(model, linear_layers=[1])).layers_linear == [1]
    assert describe(load_pipeline(tmp_path / "pipeline").transformer).layers_mixed == [0, 1, 2]


class Uncopyable(torch.nn.Parameter):
    """A parameter that cannot be copied, like GGUF weights."""

    def __deepcopy__(self, memo):
        raise KeyError(None)


def test_weights_that_cannot_be_copied_can_be_shared():
    model = tiny_transformer()
    model.proj_out.weight = Uncopyable(model.proj_out.weight.data)
    with pytest.raises(ValueError, match="Uncopyable cannot be copied; pass copy=False"):
        convert(model)
    assert convert(model, copy=False).proj_out.weight is model.proj_out.weight


def test_refuses_a_pipeline_without_a_wan_transformer():
    pipeline = tiny_pipeline()
    pipeline.transformer = None
    with pytest.raises(ValueError, match="without one"):
        convert(pipeline)
