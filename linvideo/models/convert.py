"""Conversion of a video transformer to linear self-attention, and the end of it."""

from collections.abc import Iterable
from copy import copy as shallow_copy
from copy import deepcopy
from itertools import chain

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils.torch_utils import unwrap_module

from linvideo.models.attention import attach_attention, family, self_attentions, stored_attention_type
from linvideo.models.mixin import LinearAttentionMixin

MODES = ("mixed", "linear")


def convert(
    transformer_or_pipeline: ModelMixin | DiffusionPipeline,
    layers: str | Iterable[int] = "all",
    mode: str = "mixed",
    feature_map: str = "hedgehog",
    r_init: float = 0.8,
    copy: bool = True,
) -> LinearAttentionMixin | DiffusionPipeline:
    """Give self-attention layers of a video transformer a linear branch; the original is never altered.

    With mode "mixed" and r_init=1 the result computes exactly what the original does.

    Args:
        transformer_or_pipeline: a diffusers transformer of a family that docs/models.md lists, an already converted one
            (its softmax layers can be added), or a pipeline that holds one. A pipeline comes back as a new pipeline
            object that shares all other components; of Wan 2.2, `transformer` and `transformer_2` are both converted,
            with the same layers. For one of them alone: `pipeline.transformer_2 = convert(pipeline.transformer_2)`. Of
            a transformer that torch.compile has wrapped, the model inside is converted: compile the result anew.
        layers: 0-based layer numbers, those of VACE's control blocks after the others, or "all" (of an already
            converted model: all that are still softmax).
        mode: "mixed" for r * softmax + (1 - r) * linear with a learnable r per layer, "linear" for the linear branch
            alone.
        feature_map: "hedgehog", "hedgehog_joint", "elu", "relu" or "softmax"; one per model.
        r_init: start of r, in [0, 1].
        copy: True copies all weights, so that training the result leaves the original alone; False shares them, which
            costs no memory.

    The weights keep their dtype, device and requires_grad, the model its training flag. The new parameters are fp32,
    trainable, and on the device of their layer.

    Raises:
        ValueError: for anything outside these ranges, a layer named twice or converted already, weights on the meta
            device, weights that cannot be copied (GGUF's, which copy=False takes), or a model with hooks (offloading,
            context parallelism, caches: enable those after converting).
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    arguments = {"layers": layers, "mode": mode, "feature_map": feature_map, "r_init": r_init, "copy": copy}
    if isinstance(transformer_or_pipeline, DiffusionPipeline):
        return _convert_pipeline(transformer_or_pipeline, **arguments)
    return _convert_transformer(transformer_or_pipeline, **arguments)


def finalize(model: LinearAttentionMixin, linear_layers: Iterable[int] | None = None) -> LinearAttentionMixin:
    """End the mixture, in place: every mixed layer becomes linear (r is dropped) or softmax (the branch is dropped).

    Args:
        model: a converted transformer. An optimizer made before still holds the dropped parameters: make a new one.
        linear_layers: exactly the layers (0-based) that are linear afterwards; None rounds, a layer with r < 0.5
            becoming linear. Layers that are linear already stay so and have to be among them.

    Returns the same model (of one that torch.compile has wrapped, the model inside), with its config true again.

    Raises:
        ValueError: not a converted transformer, or linear_layers names a layer without a linear branch, leaves out one
            that is linear already, or is no list of distinct layers. Nothing is changed then.
    """
    model = unwrap_module(model)
    if not isinstance(model, LinearAttentionMixin):
        raise ValueError(f"expected a converted transformer, got {type(model).__name__}")
    attentions = self_attentions(model)
    stored = [stored_attention_type(attn) for attn in attentions]
    if linear_layers is None:
        linear = {i for i, attn in enumerate(attentions) if stored[i] == "mixed" and attn.linear_attn.r.item() < 0.5}
        linear |= {i for i, kind in enumerate(stored) if kind == "linear"}
    else:
        linear = set(_check_layers(linear_layers, len(stored)))
        if lacking := sorted(i for i in linear if stored[i] == "softmax"):
            raise ValueError(f"linear_layers must name mixed or linear layers, got the softmax layers {lacking}")
        if dropped := sorted(i for i, kind in enumerate(stored) if kind == "linear" and i not in linear):
            raise ValueError(f"linear_layers must contain the layers that are linear already, {dropped} are missing")

    for i, attn in enumerate(attentions):
        if i in linear:
            attn.linear_attn.drop_r()
        elif stored[i] != "softmax":
            del attn.linear_attn
        attn.attention_type = stored_attention_type(attn)
    model.register_attention_config(model.config.linear_attention["feature_map"])
    return model


def _convert_pipeline(pipeline: DiffusionPipeline, **arguments) -> DiffusionPipeline:
    names = [name for name in ("transformer", "transformer_2") if getattr(pipeline, name, None) is not None]
    if not names:
        raise ValueError(f"expected a pipeline with a transformer, got {type(pipeline).__name__} without one")
    converted = {name: _convert_transformer(getattr(pipeline, name), **arguments) for name in names}
    # A shallow copy keeps the pipeline's own settings; setting a component also updates what model_index.json will say.
    result = shallow_copy(pipeline)
    for name, transformer in converted.items():
        setattr(result, name, transformer)
    return result


def _convert_transformer(model, layers, mode, feature_map, r_init, copy) -> LinearAttentionMixin:
    model = unwrap_module(model)
    _check_convertible(model)
    stored = [stored_attention_type(attn) for attn in self_attentions(model)]
    free = [i for i, kind in enumerate(stored) if kind == "softmax"]
    chosen = free if isinstance(layers, str) and layers == "all" else _check_layers(layers, len(stored))
    if not chosen:
        raise ValueError("layers must name at least one layer that is still softmax, got none")
    if taken := sorted(set(chosen) - set(free)):
        raise ValueError(f"layers must name layers that are still softmax, {taken} are converted already")
    if len(free) < len(stored) and feature_map != model.config.linear_attention["feature_map"]:
        known = model.config.linear_attention["feature_map"]
        raise ValueError(
            f"a model has one feature_map: expected {known!r} as in its linear layers, got {feature_map!r}"
        )

    result = copy_module(model, share_tensors=not copy)
    # Only the class changes, so that what the user set on the model (fused projections, adapters, checkpointing,
    # attention backend) is kept; a model built anew from the config would lose it.
    result.__class__ = kind = family(model)
    for i, attn in enumerate(self_attentions(result)):
        if i in chosen:
            attach_attention(attn, mode, kind.processor_class, feature_map, r_init)
        elif stored[i] == "softmax":
            attach_attention(attn, "softmax", kind.processor_class)
        else:
            attn.attention_type = stored[i]
    result.register_attention_config(feature_map)
    return result


def _check_convertible(model) -> None:
    kind = family(model)  # also refuses subclasses, because changing the class would drop their methods
    if type(model) is not kind and "attention_types" in model.config:
        raise ValueError(
            f"this model is a converted one that the stock {type(model).__name__} loaded without its linear layers;"
            f" load it with linvideo.{kind.__name__} or linvideo.load_pipeline"
        )
    kind.check_convertible(model)
    if any(_has_hooks(module) for module in model.modules()):
        raise ValueError("expected a model without hooks (offloading, context parallelism, caches), got one with hooks")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("expected a model with its weights loaded, got parameters on the meta device")
    for i, attn in enumerate(self_attentions(model)):
        if not isinstance(attn.processor, (*kind.stock_processors, kind.processor_class)):
            expected = " or ".join(processor.__name__ for processor in kind.stock_processors)
            raise ValueError(f"expected {expected} in layer {i}, got {type(attn.processor).__name__}")


def _has_hooks(module) -> bool:
    registry = getattr(module, "_diffusers_hook", None)  # pipelines leave an empty one behind
    return hasattr(module, "_hf_hook") or (registry is not None and bool(registry.hooks))


def _check_layers(layers, num_layers: int) -> list[int]:
    expected = f'expected "all" or a list of distinct layers from 0 to {num_layers - 1}'
    if isinstance(layers, str | bytes | dict) or not isinstance(layers, Iterable):
        raise ValueError(f"{expected}, got {layers!r}")
    layers = list(layers)
    if any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < num_layers for i in layers):
        raise ValueError(f"{expected}, got {layers}")
    if len(set(layers)) != len(layers):
        raise ValueError(f"{expected}, got duplicates in {layers}")
    return sorted(layers)


def copy_module(model: ModelMixin, share_tensors: bool) -> ModelMixin:
    """A model of its own, over the same tensors or over copies of them.

    Raises:
        ValueError: the weights are of a kind that cannot be copied.
    """
    tensors = chain(model.parameters(), model.buffers()) if share_tensors else ()
    # deepcopy takes what its memo holds for copied already
    try:
        result = deepcopy(model, {id(tensor): tensor for tensor in tensors})
    except Exception as error:
        special = {type(parameter) for parameter in model.parameters()} - {torch.nn.Parameter}
        if share_tensors or not special:
            raise
        names = ", ".join(sorted(kind.__name__ for kind in special))
        raise ValueError(f"weights of the kind {names} cannot be copied; pass copy=False, which shares them") from error
    if not share_tensors:
        for parameter in result.parameters():
            parameter.grad = None
    return result
