"""Every family with every feature: the table in docs/models.md, which `python tests/models/test_families.py` writes.

A check fails unless the feature has its effect. If diffusers' own model lacks the feature, the test shows that, so it
fails as soon as diffusers adds it.
"""

import functools
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
)
from families import FAMILIES, Family, generate, randn, run
from tiny import TEXT_DIM, tiny_transformer

import linvideo
from linvideo.models import attention as attention_module
from linvideo.models.attention import self_attentions
from linvideo.nn import FEATURE_MAPS, LinearAttentionBranch, collectives

KINDS = ("window", "linear", "mixed", "softmax")  # the softmax part of a mixed layer is a softmax layer's
WINDOW = {"chunk": 1, "overlap": 0}  # the tiny videos have two or three latent frames


def kinds(family: Family) -> list[str]:
    return [KINDS[i % 4] for i in range(family.num_layers)]


def of_all_kinds(family: Family, base: torch.nn.Module | None = None) -> torch.nn.Module:
    """Return the tiny model with window, linear, mixed and (if it has more than three layers) softmax layers."""
    layers = {kind: [i for i, other in enumerate(kinds(family)) if other == kind] for kind in KINDS}
    model = linvideo.convert(family.transformer() if base is None else base, layers["linear"], mode="linear")
    model = linvideo.convert(model, layers["mixed"], r_init=0.6)
    return linvideo.convert(model, layers["window"], mode="window", window=WINDOW)


def branches(model: torch.nn.Module) -> list[LinearAttentionBranch]:
    return [module for module in model.modules() if isinstance(module, LinearAttentionBranch)]


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


def blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [block for name, _ in model.attention_paths for block in getattr(model, name)]


# --- converting and saving ------------------------------------------------------------------------------------------


def converts(family: Family, folder: Path) -> None:
    base = family.transformer()
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    for feature_map in FEATURE_MAPS:
        model = linvideo.convert(base, feature_map=feature_map)
        assert model.config.attention_types == ["mixed"] * family.num_layers
        assert linvideo.describe(model).feature_map == feature_map
        assert torch.isfinite(run(family, model)).all()
    assert type(model).__name__ == f"LinVideo{type(base).__name__}" and isinstance(model, type(base))
    assert of_all_kinds(family, base).config.attention_types == kinds(family)
    assert base.state_dict().keys() == state.keys() and not branches(base)
    assert all(torch.equal(tensor, state[name]) for name, tensor in base.state_dict().items())


def inputs_in(family: Family, dtype: torch.dtype) -> dict:
    inputs = {name: value for name, value in family.inputs().items() if torch.is_tensor(value)}
    return {name: value.to(dtype) for name, value in inputs.items() if value.is_floating_point()}


def equals_the_original_at_r_1(family: Family, folder: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        base, inputs = family.transformer().to(dtype), inputs_in(family, dtype)
        expected = run(family, base, **inputs)
        assert torch.equal(run(family, linvideo.convert(base, r_init=1.0), **inputs), expected)
        linear = run(family, linvideo.convert(base, mode="linear"), **inputs)
        assert torch.isfinite(linear).all() and relative(linear.float(), expected.float()) > 1e-3


def equals_the_original_in_its_window(family: Family, folder: Path) -> None:
    """A window of all frames gives the original, and one without a far part gives its attention under a mask."""
    base = family.transformer()
    expected = run(family, base)
    wide = linvideo.convert(base, mode="window", window={"chunk": 2, "overlap": 2})
    assert relative(run(family, wide), expected) < 1e-5
    model, calls = linvideo.convert(base, mode="window", window=WINDOW), []
    branches(model)[0].register_forward_pre_hook(lambda _, args, options: calls.append(options), with_kwargs=True)
    both = run(family, model)
    with torch.no_grad():
        for branch in branches(model):
            branch.log_gain.fill_(-100)
    near = run(family, model)
    assert relative(both, near) > 1e-3 and relative(near, expected) > 1e-3
    first, last = calls[0]["prefix_tokens"], calls[0]["suffix_tokens"]
    frame_tokens = self_attentions(model)[0].frame_tokens

    def in_window(query, key, value, attn_mask=None, **options):
        position = torch.arange(query.shape[1]) - first
        text = (position < 0) | (position >= query.shape[1] - first - last)
        frame = position // frame_tokens
        mask = (frame == frame[:, None]) | text | text[:, None]
        mask = mask if attn_mask is None else mask & attn_mask
        return diffusers.models.attention_dispatch.dispatch_attention_fn(query, key, value, attn_mask=mask, **options)

    with (
        linvideo.attention_types(model, dict.fromkeys(range(family.num_layers), "softmax")),
        mock.patch.object(attention_module, "dispatch_attention_fn", in_window),
    ):
        assert relative(near, run(family, model)) < 1e-5


def trains(family: Family, folder: Path) -> None:
    model = of_all_kinds(family).train()
    target = torch.randn_like(run(family, model))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        loss = (model(**family.inputs())[0] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    for attn, kind in zip(self_attentions(model), kinds(family), strict=True):
        trained = [attn.to_q.weight, attn.to_out[0].weight, *getattr(attn, "linear_attn", attn.to_v).parameters()]
        assert all(parameter.grad.abs().sum() > 0 for parameter in trained)
        assert kind != "mixed" or attn.linear_attn.r.grad.abs() > 0


def finalizes(family: Family, folder: Path) -> None:
    model = linvideo.convert(family.transformer(), r_init=0.6)
    with linvideo.attention_types(model, {i: "linear" if i == 1 else "softmax" for i in range(family.num_layers)}):
        expected = run(family, model)
    model = linvideo.finalize(model, linear_layers=[1])
    assert model.config.attention_types == ["linear" if i == 1 else "softmax" for i in range(family.num_layers)]
    assert torch.equal(run(family, model), expected)
    assert [name.split(".")[-1] for name, _ in model.named_parameters() if "linear_attn" in name] == [
        "q_weight",
        "k_weight",
    ]


def saves_and_loads(family: Family, folder: Path) -> None:
    model = of_all_kinds(family)
    with torch.no_grad():
        for branch in branches(model):
            branch.q_weight.mul_(0.9)
    expected = run(family, model)
    model.save_pretrained(folder)
    loaded, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.config.attention_types == kinds(family)
    assert torch.equal(run(family, loaded), expected)
    with pytest.raises(ValueError, match=type(model).__name__):  # it names our class, not the stock one
        diffusers.AutoModel.from_pretrained(str(folder))
    half = type(model).from_pretrained(folder, torch_dtype=torch.bfloat16)
    assert self_attentions(half)[1].to_q.weight.dtype == torch.bfloat16
    assert {p.dtype for branch in branches(half) for p in branch.parameters()} == {torch.float32}


def runs_in_its_pipeline(family: Family, folder: Path) -> None:
    stock = family.pipeline()
    expected = generate(family, stock)
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(generate(family, linvideo.convert(stock, r_init=1.0)), expected)

    pipeline = linvideo.convert(stock, layers=[0, 1], mode="linear")
    linear = generate(family, pipeline)
    assert np.abs(linear - expected).max() > 1e-5
    linvideo.save_pipeline(pipeline, folder / "pipeline")
    for load in (linvideo.load_pipeline, type(stock).from_pretrained):
        loaded = load(folder / "pipeline")
        assert type(loaded) is type(stock) and type(loaded.transformer) is type(pipeline.transformer)
        np.testing.assert_allclose(generate(family, loaded), linear, atol=1e-6)
    loaded = diffusers.AutoModel.from_pretrained(str(folder / "pipeline"), subfolder="transformer")
    assert type(loaded) is type(pipeline.transformer)

    index = folder / "pipeline" / "model_index.json"
    index.write_text(index.read_text().replace("linvideo", "diffusers").replace("LinVideo", ""))
    with pytest.raises(ValueError, match="has linear attention layers, but model_index.json names"):
        linvideo.load_pipeline(folder / "pipeline")


# --- features of diffusers ------------------------------------------------------------------------------------------


def exchanges_processors(family: Family, folder: Path) -> None:
    """With stock processors every layer is softmax and keeps its weights; our processors bring back linear layers."""
    base = family.transformer()
    stock = base.attn_processors
    model = of_all_kinds(family, base)
    ours, keys, expected = model.attn_processors, set(model.state_dict()), run(family, model)
    assert ours.keys() == stock.keys()
    model.set_attn_processor(dict(stock))
    assert torch.equal(run(family, model), run(family, base)) and set(model.state_dict()) == keys
    model.set_attn_processor(dict(ours))
    assert torch.equal(run(family, model), expected)


def trains_and_fuses_lora(family: Family, folder: Path) -> None:
    from peft import LoraConfig

    model = of_all_kinds(family)
    expected = run(family, model)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    assert torch.equal(run(family, model), expected)  # lora_B starts at zero
    assert not any("lora" in name for name, _ in model.named_modules() if "linear_attn" in name)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        model(**family.inputs())[0].square().mean().backward()
        optimizer.step()
    assert all(parameter.grad.abs().sum() > 0 for attn in self_attentions(model) for parameter in lora_of(attn))
    trained = run(family, model)
    assert relative(trained, expected) > 1e-4

    model.save_lora_adapter(folder)
    other = of_all_kinds(family)
    other.load_lora_adapter(folder, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    assert torch.equal(run(family, other), trained)
    model.fuse_lora()
    assert relative(run(family, model), trained) < 1e-5
    model.unfuse_lora()
    assert relative(run(family, model), trained) < 1e-5
    model.delete_adapters("default")
    assert relative(run(family, model), expected) < 1e-5


def lora_of(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for name, parameter in module.named_parameters() if "lora" in name]


def load_lora(family: Family, model: torch.nn.Module) -> diffusers.DiffusionPipeline:
    """Return the pipeline around the model after it has loaded an adapter for the first q."""
    pipeline = family.pipeline()
    pipeline.transformer = model
    weights = {}
    for name, module in model.named_modules():
        if name.endswith((".0.attn1.to_q", ".0.attn.to_q")):
            weights[f"transformer.{name}.lora_A.weight"] = randn(2, module.in_features, seed=1)
            weights[f"transformer.{name}.lora_B.weight"] = randn(module.out_features, 2, seed=2)
    pipeline.load_lora_weights(weights)
    return pipeline


def loads_lora_by_the_pipeline(family: Family, folder: Path) -> None:
    stock, model = family.transformer(), of_all_kinds(family)
    before = run(family, model)
    after = run(family, load_lora(family, model).transformer)
    assert relative(after, before) > 1e-4
    exact = load_lora(family, linvideo.convert(stock, r_init=1.0)).transformer
    assert torch.equal(run(family, exact), run(family, load_lora(family, stock).transformer))
    pipeline = load_lora(family, of_all_kinds(family))
    pipeline.fuse_lora(components=["transformer"])
    pipeline.unload_lora_weights()
    assert relative(run(family, pipeline.transformer), after) < 1e-5


def compiles_repeated_blocks(family: Family, folder: Path) -> None:
    model = of_all_kinds(family)
    expected = run(family, model)
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    compiled = {id(m) for m in model.modules() if m._compiled_call_impl is not None}
    assert {id(block) for block in blocks(model)} <= compiled
    assert relative(run(family, model), expected) < 1e-5


def takes_an_attention_backend(family: Family, folder: Path) -> None:
    from diffusers.models.attention_dispatch import attention_backend

    model = of_all_kinds(family)
    windows = [i for i, kind in enumerate(kinds(family)) if kind == "window"]
    used = []

    def dispatch(*args, **kwargs):
        used.append(kwargs["backend"])
        return diffusers.models.attention_dispatch.dispatch_attention_fn(*args, **kwargs)

    with attention_backend("native"):  # restores the process-wide default that set_attention_backend also sets
        with linvideo.attention_types(model, dict.fromkeys(windows, "softmax")):
            expected = run(family, model)
            model.set_attention_backend("_native_math")
            with mock.patch.object(attention_module, "dispatch_attention_fn", dispatch):
                assert relative(run(family, model), expected) < 1e-4
        assert used == ["_native_math"] * sum(kind != "linear" for kind in kinds(family))
        with pytest.raises(ValueError, match="with window layers must be one of native, .*, got '_native_math'"):
            run(family, model)


def offloads_groups(family: Family, folder: Path) -> None:
    """Groups are offloaded to disk, so weights that are not loaded again would be empty."""
    for level in ("block_level", "leaf_level"):
        model = of_all_kinds(family)
        expected = run(family, model)
        model.enable_group_offload(
            onload_device=torch.device("cpu"),
            offload_device=torch.device("cpu"),
            offload_type=level,
            num_blocks_per_group=1 if level == "block_level" else None,
            offload_to_disk_path=folder / level,
        )
        assert torch.equal(run(family, model), expected)


def offloads_sequentially(family: Family, folder: Path) -> None:
    from accelerate import cpu_offload

    model = of_all_kinds(family)
    expected = run(family, model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for branch in branches(model) for parameter in branch.parameters())
    assert torch.equal(run(family, model), expected)


def offloads_to_disk(family: Family, folder: Path) -> None:
    from accelerate import disk_offload

    model = of_all_kinds(family)
    expected = run(family, model)
    disk_offload(model, folder, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for branch in branches(model) for parameter in branch.parameters())
    assert torch.equal(run(family, model), expected)


def casts_layerwise(family: Family, folder: Path) -> None:
    model = of_all_kinds(family)
    expected = run(family, model)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert {attn.to_q.weight.dtype for attn in self_attentions(model)} == {torch.float8_e4m3fn}
    assert {p.dtype for branch in branches(model) for p in branch.parameters()} == {torch.float32}
    assert 0 < relative(run(family, model), expected) < 0.2


def takes_torchao_weights(family: Family, folder: Path) -> None:
    pytest.importorskip("torchao")
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    model = of_all_kinds(family)
    expected = run(family, model)
    model.save_pretrained(folder)
    for weights in (Int8WeightOnlyConfig, Float8WeightOnlyConfig):
        quantization = {"quantization_config": diffusers.TorchAoConfig(weights()), "torch_dtype": torch.bfloat16}
        loaded = type(model).from_pretrained(folder, **quantization)
        assert all(type(attn.to_q.weight) is not torch.nn.Parameter for attn in self_attentions(loaded))
        assert {(type(p), p.dtype) for b in branches(loaded) for p in b.parameters()} == {
            (torch.nn.Parameter, torch.float32)
        }
        out = run(family, loaded, **inputs_in(family, torch.bfloat16))
        assert 0 < relative(out.float(), expected) < 0.1


def fuse(family: Family, model: torch.nn.Module) -> None:
    """Fuse the projections and check that the fused one is in use: clearing it changes the output."""
    model.fuse_qkv_projections()
    before = run(family, model)
    attn = next(m for name, m in model.named_modules() if name.endswith((".0.attn1", ".0.attn")))
    with torch.no_grad():
        fused = attn.to_qkv.weight.clone()
        attn.to_qkv.weight.zero_()
        assert not torch.equal(run(family, model), before), "the fused projection is not in use"
        attn.to_qkv.weight.copy_(fused)


def fuses_projections(family: Family, folder: Path) -> None:
    model = of_all_kinds(family)
    expected = run(family, model)
    fuse(family, model)
    assert all(attn.fused_projections for attn in self_attentions(model))
    assert relative(run(family, model), expected) < 1e-5
    model.unfuse_qkv_projections()
    assert torch.equal(run(family, model), expected)


def sequence(family: Family, model: torch.nn.Module, cache: str, steps: int = 4) -> list[torch.Tensor]:
    """Return outputs at decreasing timesteps with a cache; fail if the second block's attention runs in each step."""
    now = []
    model.enable_cache(CACHES[cache](lambda: now[-1]))
    modules = dict(model.named_modules())
    ran, second = [], next(modules[name] for name in SECOND_ATTENTION if name in modules)
    hook = second.to_out[0].register_forward_hook(lambda *_: ran.append(1))
    outputs, timestep = [], family.inputs()["timestep"]
    for step in range(steps):
        now.append(900 - 100 * step)
        position = {"step_index": step, "num_inference_steps": steps, "sigma": now[-1] / 1000}  # SeaCache needs it
        with model.cache_context("cond", **position):
            outputs.append(run(family, model, timestep=(timestep * (1 - 0.01 * step)).to(timestep.dtype)))
    hook.remove()
    model.disable_cache()
    assert 0 < len(ran) < steps, f"{len(ran)} of {steps} steps computed"
    return outputs


SECOND_ATTENTION = ("blocks.1.attn1", "transformer_blocks.1.attn1", "transformer_blocks.1.attn")
CACHES = {  # functions of a callback that returns the current timestep
    "first-block cache": lambda now: FirstBlockCacheConfig(threshold=10.0),
    "MagCache": lambda now: MagCacheConfig(
        threshold=10.0, num_inference_steps=4, retention_ratio=0.25, mag_ratios=[1.0] * 4
    ),
    "SeaCache": lambda now: SeaCacheConfig(threshold=10.0),
    "pyramid attention broadcast": lambda now: PyramidAttentionBroadcastConfig(
        spatial_attention_timestep_skip_range=(0, 850), current_timestep_callback=now
    ),
    "FasterCache": lambda now: FasterCacheConfig(
        spatial_attention_timestep_skip_range=(0, 850),
        current_timestep_callback=now,
        attention_weight_callback=lambda _: 0.3,
        tensor_format="BCFHW",
        is_guidance_distilled=True,
    ),
    "TaylorSeer": lambda now: TaylorSeerCacheConfig(
        cache_interval=2,
        disable_cache_before_step=1,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[r"(transformer_)?blocks\.\d+\.attn1?"],
    ),
}


def works_with(cache: str, family: Family, folder: Path) -> None:
    """At r = 1 the outputs with a cache equal those of the original model with that cache."""
    base = family.transformer()
    expected = sequence(family, base, cache)
    assert all(map(torch.equal, sequence(family, linvideo.convert(base, r_init=1.0), cache), expected))
    linear = sequence(family, linvideo.convert(base, mode="linear"), cache)
    assert all(torch.isfinite(x).all() and relative(x, y) > 1e-3 for x, y in zip(linear, expected, strict=True))


def checkpoints_gradients(family: Family, folder: Path) -> None:
    gradients, calls = [], []
    for checkpointing in (False, True):
        model = of_all_kinds(family).train()
        self_attentions(model)[1].linear_attn.register_forward_hook(lambda *_: calls.append(checkpointing))  # noqa: B023
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(**family.inputs())[0].square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert calls == [False, True, True]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@contextmanager
def rms_norm_in_fp32() -> Iterator[None]:
    """Have RMSNorm return fp32 under autocast, as on CUDA; on the CPU it returns bf16."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            weight = None if self.weight is None else self.weight.float()
            return torch.nn.functional.rms_norm(x.float(), self.normalized_shape, weight, self.eps)

    with mock.patch.object(torch.nn.RMSNorm, "forward", forward):
        yield


def runs_under_autocast(family: Family, folder: Path) -> None:
    model = of_all_kinds(family)
    expected = run(family, model)
    with torch.autocast("cpu", dtype=torch.bfloat16), rms_norm_in_fp32():
        assert 0 < relative(run(family, model).float(), expected) < 0.05


def context_plan(family: Family, model: torch.nn.Module) -> None:
    assert model._cp_plan is not None, "no plan for context parallelism"


def splits_tokens(family: Family, folder: Path) -> None:
    name = next(name for name, other in FAMILIES.items() if other is family)
    assert context_parallel_outcomes()[name] == "as one"
    if name == "LTX-Video":  # diffusers' own model cannot do these either
        assert "doesn't match the broadcast shape" in context_parallel_outcomes()["stock LTX-Video, text mask"]
        assert "is invalid for input of size" in context_parallel_outcomes()["stock LTX-Video, training"]


@functools.cache
def context_parallel_outcomes() -> dict[str, str]:
    """Return the outcome for every family with a plan; two processes are started once for all of them."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(context_parallel_process, (folder,), nprocs=2)
        ranks = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(2)]
    return {name: outcome if outcome != "as one" else ranks[1][name] for name, outcome in ranks[0].items()}


def context_parallel_process(rank: int, folder: str) -> None:
    from torch import distributed

    from linvideo.run.parallel import ParallelConfig, Ranks
    from linvideo.run.sharding import split_tokens

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    ranks = Ranks(ParallelConfig(shard_degree=1, ulysses_degree=2), torch.device("cpu"), rank, 2)
    outcomes = {}
    for name, family in FAMILIES.items():
        if name not in GAPS["context parallelism"]:
            outcomes[name] = context_parallel_outcome(family, lambda model: split_tokens(model, ranks))
    family = FAMILIES["LTX-Video"]
    for what, changed in (("text mask", {}), ("training", {"encoder_attention_mask": None})):
        stock = family.transformer()
        split_tokens(stock, ranks)
        try:
            stock(**family.inputs() | changed)[0].sum().backward()
        except RuntimeError as error:
            outcomes[f"stock LTX-Video, {what}"] = str(error)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(outcomes))
    distributed.destroy_process_group()


def context_parallel_outcome(family: Family, split: Callable[[torch.nn.Module], None]) -> str:
    """Return "as one" if outputs and summed gradients equal those of one process and each linear layer sums once."""
    from torch import distributed

    from linvideo.nn import linear_attention

    single, model, sums = of_all_kinds(family), of_all_kinds(family), []
    split(model)
    inputs = family.inputs()
    if "encoder_attention_mask" in inputs:  # LTX's cross-attention splits the text, too, but not its mask
        inputs["encoder_attention_mask"] = None
    if (error := relative(run(family, model, **inputs), run(family, single, **inputs))) > 1e-5:
        return f"outputs differ by {error}"

    if "encoder_attention_mask" in inputs:  # and its backward needs as many text tokens as video tokens
        inputs["encoder_hidden_states"] = randn(*inputs["hidden_states"].shape[:2], TEXT_DIM, seed=2)
    single(**inputs)[0].square().mean().backward()

    def all_reduce_sum(x: torch.Tensor, group: object) -> torch.Tensor:
        sums.append(x.numel())
        return collectives.all_reduce_sum(x, group)

    with mock.patch.object(linear_attention, "all_reduce_sum", all_reduce_sum):
        model(**inputs)[0].square().mean().backward()
    if len(sums) != sum(kind in ("linear", "mixed") for kind in kinds(family)):
        return f"{len(sums)} all-reduces in layers {kinds(family)}"
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in single.named_parameters():
        if "linear_attn" in name or "to_q" in name:
            distributed.all_reduce(gradients[name])
            if (error := relative(gradients[name], parameter.grad)) > 1e-4:
                return f"{name}'s gradients differ by {error}"
    return "as one"


FEATURES: dict[str, Callable[[Family, Path], None]] = {
    "converts, any feature map": converts,
    "equal bit for bit at r = 1 (fp32, bf16)": equals_the_original_at_r_1,
    "equal with a window of all frames": equals_the_original_in_its_window,
    "trains": trains,
    "finalizes": finalizes,
    "saves, loads": saves_and_loads,
    "runs in its own pipeline": runs_in_its_pipeline,
    "attention processors exchanged": exchanges_processors,
    "LoRA: train, save, load, fuse": trains_and_fuses_lora,
    "LoRA: the pipeline loads, fuses": loads_lora_by_the_pipeline,
    "torch.compile of the blocks": compiles_repeated_blocks,
    "attention backend": takes_an_attention_backend,
    "autocast to bf16": runs_under_autocast,
    "gradient checkpointing": checkpoints_gradients,
    "context parallelism": splits_tokens,
    "group offload, to disk": offloads_groups,
    "sequential offload": offloads_sequentially,
    "disk offload": offloads_to_disk,
    "layerwise casting to fp8": casts_layerwise,
    "torchao int8, fp8 weights": takes_torchao_weights,
    "fused q, k, v projections": fuses_projections,
    **{cache: functools.partial(works_with, cache) for cache in CACHES},
}


# Features that diffusers' own models lack: how to use the feature, and the error that this gives for each family.
STOCK = {
    "LoRA: the pipeline loads, fuses": load_lora,
    "context parallelism": context_plan,
    "fused q, k, v projections": fuse,
    **{cache: functools.partial(sequence, cache=cache) for cache in CACHES},
}
UNREGISTERED = {
    "SkyReels-V2": "SkyReelsV2TransformerBlock'> not registered",
    "ChronoEdit": "WanTransformerBlock'> not registered",
    "HunyuanVideo 1.5": "HunyuanVideo15TransformerBlock'> not registered",
}
GAPS = {
    "LoRA: the pipeline loads, fuses": {"HunyuanVideo 1.5": "no attribute 'load_lora_weights'"},
    "context parallelism": dict.fromkeys(("Wan VACE", "SkyReels-V2", "HunyuanVideo 1.5", "CogVideoX"), "no plan"),
    "fused q, k, v projections": {
        "LTX-Video": "the fused projection is not in use",
        "HunyuanVideo 1.5": "no attribute 'to_qkv'",
    },
    "first-block cache": UNREGISTERED,
    "MagCache": UNREGISTERED,
    "SeaCache": UNREGISTERED
    | dict.fromkeys(("Wan 2.1 I2V", "Wan VACE", "LTX-Video", "CogVideoX"), "4 of 4 steps computed"),
}
NOT_IN_DIFFUSERS = "not in diffusers"


def cell(feature: str, name: str) -> str:
    if name in GAPS.get(feature, {}):
        return NOT_IN_DIFFUSERS
    return "inference, no text mask" if (feature, name) == ("context parallelism", "LTX-Video") else "yes"


def cells() -> Iterator:
    for name in FAMILIES:
        for feature in FEATURES:
            processes = feature == "context parallelism" and cell(feature, name) != NOT_IN_DIFFUSERS
            yield pytest.param(name, feature, marks=[pytest.mark.full] if processes else [])


@pytest.mark.parametrize(("name", "feature"), cells())
def test_feature(name, feature, tmp_path):
    family = FAMILIES[name]
    if cell(feature, name) == NOT_IN_DIFFUSERS:
        with pytest.raises((AssertionError, AttributeError, ValueError), match=GAPS[feature][name]):
            STOCK[feature](family, family.transformer())
    else:
        FEATURES[feature](family, tmp_path)


# --- special cases of single families -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_from_pipe_keeps_a_converted_transformer_wherever_it_keeps_the_stock_one(name):
    stock = FAMILIES[name].pipeline()
    converted = linvideo.convert(stock)
    package = sys.modules[type(stock).__module__.rpartition(".")[0]]
    kept = []
    for kind in [getattr(package, name) for name in dir(package) if name.endswith("Pipeline")]:
        try:
            expected = kind.from_pipe(stock)
        except (AttributeError, TypeError, ValueError):  # needs other parts
            continue
        result = None
        for part in ("transformer", "transformer_2"):
            model = getattr(stock, part, None)
            if model is not None and getattr(expected, part, None) is model:
                result = result or kind.from_pipe(converted)
                assert getattr(result, part) is getattr(converted, part)
                kept.append(kind)
    assert type(stock) in kept, kept


def test_layers_of_vace_include_its_control_blocks():
    model = linvideo.convert(FAMILIES["Wan VACE"].transformer(), layers=[1, 3], mode="linear")
    linear = [name.removesuffix(".attn1.linear_attn") for name, m in model.named_modules() if m in branches(model)]
    assert linear == ["blocks.1", "vace_blocks.0"]
    assert linvideo.describe(model).layers_linear == [1, 3]


def test_block_causal_sky_reels_is_refused():
    family = FAMILIES["SkyReels-V2"]
    base = family.transformer()
    model = linvideo.convert(base, layers=[1], mode="linear")
    base._set_ar_attention(3)  # as SkyReels-V2's diffusion-forcing pipelines do
    with pytest.raises(ValueError, match="expected a SkyReels-V2 model with full attention, got num_frame_per_block 3"):
        linvideo.convert(base)
    causal = run(family, base)
    model._set_ar_attention(3)
    with pytest.raises(ValueError, match="a linear attention layer takes no attention mask"):
        run(family, model)
    with linvideo.attention_types(model, {1: "softmax"}):
        assert torch.equal(run(family, model), causal)


def test_hunyuan_video_does_not_read_its_text_padding():
    family = FAMILIES["HunyuanVideo 1.5"]
    inputs = family.inputs()
    model = linvideo.convert(family.transformer(), mode="linear")
    expected = run(family, model)
    more = {
        "encoder_hidden_states": torch.nn.functional.pad(inputs["encoder_hidden_states"], (0, 0, 0, 3), value=5.0),
        "encoder_attention_mask": torch.nn.functional.pad(inputs["encoder_attention_mask"], (0, 3)),
    }
    assert relative(run(family, model, **more), expected) < 1e-5

    seen = []

    def disturb(block, arguments):  # the model clears the text's padding, but not what a block computes from it
        video, text, temb, mask, *rest = arguments
        seen.append(int((~mask).sum()))
        return video, torch.where(mask[..., None], text, torch.randn_like(text)), temb, mask, *rest

    for block in model.transformer_blocks:
        block.register_forward_pre_hook(disturb)
    assert torch.equal(run(family, model), expected) and seen == [5] * 3
    shown = {"encoder_attention_mask": torch.ones(2, 5), "encoder_attention_mask_2": torch.ones(2, 3)}
    assert relative(run(family, model, **shown), expected) > 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_taylor_seer_leaves_the_branches_alone(name):
    model = of_all_kinds(FAMILIES[name])
    model.enable_cache(TaylorSeerCacheConfig())  # its default patterns match every module whose name ends in "attn"
    hooked = {
        name for name, m in model.named_modules() if getattr(m, "_diffusers_hook", None) and m._diffusers_hook.hooks
    }
    assert not any("linear_attn" in name for name in hooked)
    model.disable_cache()
    assert torch.equal(run(FAMILIES[name], model), run(FAMILIES[name], of_all_kinds(FAMILIES[name])))


def test_one_expert_of_two(tmp_path):
    family = FAMILIES["Wan 2.2 A14B"]
    pipeline = family.pipeline()
    stock = generate(family, pipeline)
    pipeline.transformer = linvideo.convert(pipeline.transformer, mode="linear")
    expected = generate(family, pipeline)
    assert np.abs(expected - stock).max() > 1e-5
    linvideo.save_pipeline(pipeline, tmp_path / "pipeline")
    loaded = linvideo.load_pipeline(tmp_path / "pipeline")
    assert type(loaded.transformer) is linvideo.LinVideoWanTransformer3DModel
    assert type(loaded.transformer_2) is diffusers.WanTransformer3DModel
    np.testing.assert_allclose(generate(family, loaded), expected, atol=1e-6)


def test_inductor_compiles_a_block_of_wan():
    model = linvideo.convert(tiny_transformer(num_layers=1), r_init=0.6)  # mixed: both attentions in one graph
    expected = run(FAMILIES["Wan 2.1 T2V"], model)
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True)
    assert relative(run(FAMILIES["Wan 2.1 T2V"], model), expected) < 1e-5


# (our class, config values other than the defaults, number of layers, parameters in billions)
REAL = {
    "Wan 2.1 1.3B": (
        linvideo.LinVideoWanTransformer3DModel,
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        30,
        1.419,
    ),
    "Wan 2.1 14B": (linvideo.LinVideoWanTransformer3DModel, {}, 40, 14.288),
    "HunyuanVideo 1.5": (linvideo.LinVideoHunyuanVideo15Transformer3DModel, {}, 54, 8.327),
    "LTX-Video": (linvideo.LinVideoLTXVideoTransformer3DModel, {}, 28, 1.923),
}


@pytest.mark.parametrize("name", REAL)
def test_real_configurations(name):
    """Real sizes are tested on the meta device, which takes no memory; convert() itself needs weights."""
    kind, config, layers, billions = REAL[name]
    with torch.device("meta"):
        stock = kind(**config)
        model = kind(**config, attention_types=["linear"] * layers)
    description = linvideo.describe(model)
    assert description.layers_linear == list(range(layers))
    count = sum(parameter.numel() for parameter in stock.parameters())
    assert round(count / 1e9, 3) == billions
    branch = 2 * description.heads * description.head_dim**2
    assert description.parameters_linear_attn == layers * branch == description.parameters - count
    with pytest.raises(ValueError, match="meta device"):
        linvideo.convert(stock)


# --- docs/models.md -------------------------------------------------------------------------------------------------

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"


def table() -> str:
    rows = [["", *FAMILIES], ["---"] * (len(FAMILIES) + 1)]
    rows += [[feature, *(cell(feature, name) for name in FAMILIES)] for feature in FEATURES]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def test_the_table_is_up_to_date():
    assert written_table().group() == table(), "run python tests/models/test_families.py"


def written_table() -> re.Match:
    return re.search(r"(^\|.*\n)+", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


if __name__ == "__main__":
    place, text = written_table(), PAGE.read_text(encoding="utf-8")
    PAGE.write_text(text[: place.start()] + table() + text[place.end() :], encoding="utf-8")
