import inspect

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from tiny import tiny_inputs, tiny_transformer

from linvideo.models import (
    LinVideoWanAttnProcessor,
    LinVideoWanTransformer3DModel,
    attention_types,
    convert,
    set_attention_types,
)

KINDS = ["softmax", "linear", "mixed"]


def three_kinds():
    """Return a model with one layer of each type, in the order of KINDS."""
    return convert(convert(tiny_transformer(), layers=[1], mode="linear"), layers=[2], r_init=0.6)


def run(model, **arguments):
    with torch.no_grad():
        return model(**tiny_inputs(**arguments))[0]


def test_gradients_equal_finite_differences():
    model = convert(tiny_transformer(), r_init=0.6)
    model.requires_grad_(False)
    target = torch.randn(2, 16, 3, 8, 8, generator=torch.Generator().manual_seed(2))

    def loss():
        return (model(**tiny_inputs())[0].double() * target).sum()

    branch, step = model.blocks[1].attn1.linear_attn, 2e-2
    for parameter in (branch.r, branch.q_weight, branch.k_weight):
        parameter.requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(), parameter)
        direction = gradient / gradient.norm()
        with torch.no_grad():
            parameter += step * direction
            above = loss()
            parameter -= 2 * step * direction
            below = loss()
            parameter += step * direction
        difference = (above - below).item() / (2 * step)
        assert difference > 1e-2
        assert (gradient * direction).sum().item() == pytest.approx(difference, rel=0.02)


def test_signature_holds_every_argument_of_the_base():
    base = inspect.signature(WanTransformer3DModel.__init__).parameters
    mine = inspect.signature(LinVideoWanTransformer3DModel.__init__).parameters
    assert list(mine) == [*base, "attention_types", "linear_attention"]
    model = LinVideoWanTransformer3DModel.from_config(tiny_transformer(eps=1e-3, cross_attn_norm=False).config)
    assert model.config.eps == 1e-3 and model.config.cross_attn_norm is False
    assert set(base) - {"self"} <= set(model.config)


def test_default_is_softmax_everywhere_and_equals_the_base():
    base = tiny_transformer()
    model = LinVideoWanTransformer3DModel.from_config(base.config).eval()
    model.load_state_dict(base.state_dict())
    assert model.config.attention_types == ["softmax"] * 3
    assert torch.equal(run(model), run(base))


@pytest.mark.parametrize(
    "arguments",
    [
        {"attention_types": ["linear"]},
        {"attention_types": "linear"},
        {"attention_types": ["linear", "mixed", "sparse"]},
        {"linear_attention": {"feature_map": "identity"}},
        {"linear_attention": {"feature_map": "elu", "window": 3}},
        {"linear_attention": "elu"},
    ],
)
def test_bad_config(arguments):
    with pytest.raises(ValueError, match="attention") as error:
        LinVideoWanTransformer3DModel.from_config(tiny_transformer().config, **arguments)
    assert "\n" not in str(error.value)


def test_runtime_types_are_restored_on_exit_and_on_error():
    model = convert(tiny_transformer(), r_init=0.6)
    mixed = run(model)
    keys = set(model.state_dict())
    with attention_types(model, {0: "softmax", 1: "softmax", 2: "softmax"}):
        assert torch.equal(run(model), run(tiny_transformer()))
        with attention_types(model, {1: "linear"}):
            only_layer_1 = run(model)
        assert torch.equal(run(model), run(tiny_transformer()))
    assert torch.equal(only_layer_1, run(convert(tiny_transformer(), layers=[1], mode="linear")))
    with pytest.raises(RuntimeError), attention_types(model, {0: "linear"}):
        raise RuntimeError
    assert torch.equal(run(model), mixed)
    assert set(model.state_dict()) == keys and model.config.attention_types == ["mixed"] * 3


def test_set_attention_types_returns_what_was_before():
    model = three_kinds()
    assert set_attention_types(model, {2: "linear", 1: "softmax"}) == {2: "mixed", 1: "linear"}
    assert [block.attn1.attention_type for block in model.blocks] == ["softmax", "softmax", "linear"]


@pytest.mark.parametrize(
    "types", [{0: "linear"}, {1: "mixed"}, {3: "softmax"}, {-1: "softmax"}, {"0": "softmax"}, {2: "x"}]
)
def test_bad_runtime_types_change_nothing(types):
    model = three_kinds()
    with pytest.raises(ValueError, match="layer"), attention_types(model, {2: "linear", **types}):
        pass
    assert [block.attn1.attention_type for block in model.blocks] == KINDS
    with pytest.raises(ValueError, match="expected a converted transformer"):
        set_attention_types(tiny_transformer(), {0: "softmax"})


def test_set_attn_processor_keeps_the_weights():
    model = three_kinds()
    keys, output = set(model.state_dict()), run(model)
    model.set_attn_processor(WanAttnProcessor())
    assert set(model.state_dict()) == keys
    assert torch.equal(run(model), run(tiny_transformer()))
    model.set_attn_processor(LinVideoWanAttnProcessor())  # cross-attention gets it, too, and is left to diffusers
    assert torch.equal(run(model), output)


def test_attention_backend_reaches_the_softmax_layers():
    from diffusers.models.attention_dispatch import attention_backend

    model = three_kinds()
    expected = run(model)
    with attention_backend("native"):  # restores the process-wide default that set_attention_backend also sets
        model.set_attention_backend("_native_math")
        assert {block.attn1.processor._attention_backend for block in model.blocks} == {"_native_math"}
        torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-4)


def test_attention_mask_is_refused_for_linear_layers():
    model = three_kinds()
    hidden, mask = torch.randn(1, 4, 48), torch.ones(1, 1, 4, 4, dtype=torch.bool)
    model.blocks[0].attn1(hidden, None, mask)
    with pytest.raises(ValueError, match="takes no attention mask"):
        model.blocks[1].attn1(hidden, None, mask)


def test_fused_projections():
    model = three_kinds()
    expected = run(model)
    model.fuse_qkv_projections()
    assert model.blocks[1].attn1.fused_projections
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-4)
    model.unfuse_qkv_projections()
    assert torch.equal(run(model), expected)


def test_gradient_checkpointing():
    gradients = []
    for checkpointing in (False, True):
        model = three_kinds().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(**tiny_inputs())[0].square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert {"blocks.2.attn1.linear_attn.r", "blocks.1.attn1.linear_attn.q_weight"} <= gradients[0].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_compiles_without_graph_break():
    model = three_kinds()
    expected = run(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(run(compiled), expected)


def test_lora_leaves_the_linear_branch_alone():
    from peft import LoraConfig

    model = three_kinds()
    expected = run(model)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    assert torch.equal(run(model), expected)  # lora_B starts at zero
    assert not any("lora" in name for name, _ in model.named_modules() if "linear_attn" in name)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name or "linear_attn" in name)
    model(**tiny_inputs())[0].square().mean().backward()
    assert model.blocks[2].attn1.linear_attn.r.grad.abs() > 0
    assert model.blocks[1].attn1.to_q.lora_B["default"].weight.grad.abs().sum() > 0
    with torch.no_grad():
        model.blocks[1].attn1.to_q.lora_B["default"].weight.normal_()
    assert not torch.equal(run(model), expected)
    model.delete_adapters("default")
    assert torch.equal(run(model), expected)


def test_offloading_hooks():
    from accelerate import cpu_offload

    model = three_kinds()
    expected = run(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.blocks[2].attn1.linear_attn.r.is_meta
    assert torch.equal(run(model), expected)


def test_layerwise_casting_keeps_the_linear_branch_in_fp32():
    model = three_kinds()
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert model.blocks[2].attn1.to_q.weight.dtype == torch.float8_e4m3fn
    assert {p.dtype for p in model.blocks[2].attn1.linear_attn.parameters()} == {torch.float32}
    assert torch.isfinite(run(model)).all()


def test_autocast():
    model = three_kinds()
    expected = run(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = run(model)
    assert (out.float() - expected).norm() < 0.05 * expected.norm()
