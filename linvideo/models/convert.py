"""Converting a video transformer to linear self-attention, and finalizing the conversion."""

from collections.abc import Iterable, Mapping
from copy import copy as shallow_copy
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils.torch_utils import unwrap_module

from linvideo.models.attention import (
    attach_attention,
    family,
    self_attentions,
    stored_attention_type,
    stored_window,
)
from linvideo.models.mixin import LinearAttentionMixin
from linvideo.nn import Window

MODES = ("mixed", "linear", "window")


def convert(
    transformer_or_pipeline: ModelMixin | DiffusionPipeline,
    layers: str | Iterable[int] = "all",
    mode: str = "mixed",
    feature_map: str = "hedgehog",
    r_init: float = 0.8,
    copy: bool = True,
    window: Mapping[str, Any] | None = None,
) -> LinearAttentionMixin | DiffusionPipeline:
    """Return a converted model, in which self-attention layers of a video transformer have a linear branch.

    The original is not changed. With mode "mixed" and r_init=1 the result computes exactly what the original does. The
    method is LinVideo's (arXiv 2510.08318).

    Args:
        transformer_or_pipeline: Diffusers transformer of a family listed in docs/models.md, stock or already converted
            (to convert more of its softmax layers), or a pipeline with one. In a pipeline of Wan 2.2, `transformer` and
            `transformer_2` are both converted, with the same layers; to convert only one of them, use
            `pipeline.transformer_2 = convert(pipeline.transformer_2)`. If torch.compile has wrapped the transformer,
            the model inside is converted; compile the result again.
        layers: Layer numbers to convert, starting at 0, or "all" for all layers that are still softmax. VACE's control
            blocks count after the main ones.
        mode: Type of the converted layers: "mixed" for r * softmax + (1 - r) * linear with a learnable r per layer,
            "linear" for the linear branch alone, or "window" for softmax attention to the near latent frames and linear
            attention to all others, under one normaliser.
        feature_map: Name of the feature map, the same for all layers of a model: "hedgehog", "hedgehog_joint", "elu",
            "relu" or "softmax". See `linvideo.ops.linear_attn`.
        r_init: Initial value of r in [0, 1].
        copy: Whether to copy all weights, so that training the result leaves the original unchanged. False shares them,
            which takes no memory.
        window: Settings for mode "window", the same for all window layers of a model: {"chunk": 3, "overlap": 1,
            "anchors": [], "causal": False}, or some of these; see `linvideo.ops.window_attn`. None takes those of the
            model's window layers, or, if it has none, these defaults.

    Returns:
        The converted transformer, or a new pipeline object that has it and shares all other components. The weights
        keep their dtype, device and requires_grad, and the model keeps its training flag. The new parameters are fp32,
        trainable, and on the device of their layer.

    Raises:
        ValueError: An argument is outside these ranges; a layer is named twice or already converted; weights are on the
            meta device, or cannot be copied (GGUF weights work with copy=False); or the model has hooks (enable
            offloading, context parallelism and caches after converting).
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    arguments = {"layers": layers, "mode": mode, "feature_map": feature_map, "r_init": r_init, "copy": copy}
    arguments["window"] = check_window(mode, window)
    if isinstance(transformer_or_pipeline, DiffusionPipeline):
        return _convert_pipeline(transformer_or_pipeline, **arguments)
    return _convert_transformer(transformer_or_pipeline, **arguments)


def check_window(mode: str, window: Mapping[str, Any] | None) -> Window | None:
    """Return the window of `convert`'s arguments, or raise ValueError if they do not fit together."""
    if window is None:
        return None
    if mode != "window":
        raise ValueError(f'window settings go with mode "window" only, got mode {mode!r}')
    return Window.of(window)


def finalize(model: LinearAttentionMixin, linear_layers: Iterable[int] | None = None) -> LinearAttentionMixin:
    """Make every mixed layer linear (dropping r) or softmax (dropping the branch), in place.

    Softmax and window layers stay what they are.

    Args:
        model: Converted transformer. An optimizer created before still holds the dropped parameters; create a new one.
        linear_layers: Numbers (starting at 0) of exactly the layers that are linear afterwards; layers that are already
            linear must be among them. None rounds r instead: a mixed layer with r < 0.5 becomes linear.

    Returns:
        The same model, or the model inside if torch.compile has wrapped it. Its config describes the new layers.

    Raises:
        ValueError: The model is not a converted transformer, or linear_layers is not a list of distinct layers, names a
            layer without a linear branch, or lacks one that is already linear. The model is then unchanged.
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
        for kind in ("softmax", "window"):
            if others := sorted(i for i in linear if stored[i] == kind):
                raise ValueError(f"linear_layers must name mixed or linear layers, got the {kind} layers {others}")
        if dropped := sorted(i for i, kind in enumerate(stored) if kind == "linear" and i not in linear):
            raise ValueError(f"linear_layers must contain the layers that are already linear, {dropped} are missing")

    for i, attn in enumerate(attentions):
        if i in linear:
            attn.linear_attn.drop_r()
        elif stored[i] == "mixed":
            del attn.linear_attn
        attn.attention_type = stored_attention_type(attn)
    model.register_attention_config(model.config.linear_attention["feature_map"])
    return model


def _convert_pipeline(pipeline: DiffusionPipeline, **arguments) -> DiffusionPipeline:
    names = [name for name in ("transformer", "transformer_2") if getattr(pipeline, name, None) is not None]
    if not names:
        raise ValueError(f"expected a pipeline with a transformer, got {type(pipeline).__name__} without one")
    converted = {name: _convert_transformer(getattr(pipeline, name), **arguments) for name in names}
    # A shallow copy keeps the pipeline's settings. Setting a component also updates what model_index.json will say.
    result = shallow_copy(pipeline)
    for name, transformer in converted.items():
        setattr(result, name, transformer)
    return result


def _convert_transformer(model, layers, mode, feature_map, r_init, copy, window) -> LinearAttentionMixin:
    model = unwrap_module(model)
    _check_convertible(model)
    stored = [stored_attention_type(attn) for attn in self_attentions(model)]
    free = [i for i, kind in enumerate(stored) if kind == "softmax"]
    chosen = free if isinstance(layers, str) and layers == "all" else _check_layers(layers, len(stored))
    if not chosen:
        raise ValueError("layers must name at least one layer that is still softmax, got none")
    if taken := sorted(set(chosen) - set(free)):
        raise ValueError(f"layers must name layers that are still softmax, {taken} are already converted")
    if len(free) < len(stored) and feature_map != model.config.linear_attention["feature_map"]:
        known = model.config.linear_attention["feature_map"]
        raise ValueError(
            f"a model has one feature_map: expected {known!r}, as in its linear layers, got {feature_map!r}"
        )
    known_window = stored_window(self_attentions(model))
    if None not in (window, known_window) and window != known_window:
        raise ValueError(f"a model has one window setting: expected {known_window}, as in its layers, got {window}")

    result = copy_module(model, share_tensors=not copy)
    # Only the class changes, which keeps what the user has set on the model (fused projections, adapters, gradient
    # checkpointing, attention backend). A new model built from the config would lose it.
    result.__class__ = kind = family(model)
    if type(model) is not kind and model.is_gradient_checkpointing:
        result._set_gradient_checkpointing(True, model._gradient_checkpointing_func)
    for i, attn in enumerate(self_attentions(result)):
        if i in chosen:
            attach_attention(attn, mode, kind.processor_class, feature_map, r_init, window or known_window)
        elif stored[i] == "softmax":
            attach_attention(attn, "softmax", kind.processor_class)
        else:
            attn.attention_type = stored[i]
    result.register_attention_config(feature_map)
    return result


def _check_convertible(model) -> None:
    kind = family(model)  # refuses subclasses, too, because changing the class would drop their methods
    if type(model) is not kind and "attention_types" in model.config:
        raise ValueError(
            f"expected a model with its linear layers, got a converted one that the stock {type(model).__name__} has"
            f" loaded without them; load it with linvideo.{kind.__name__} or linvideo.load_pipeline"
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
    registry = getattr(module, "_diffusers_hook", None)  # pipelines leave an empty registry behind
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
    """Return a new model with the same tensors, or with copies of them.

    Raises:
        ValueError: The weights are of a type that cannot be copied.
    """
    tensors = chain(model.parameters(), model.buffers()) if share_tensors else ()
    # deepcopy does not copy objects that are in its memo
    try:
        result = deepcopy(model, {id(tensor): tensor for tensor in tensors})
    except Exception as error:
        special = {type(parameter) for parameter in model.parameters()} - {torch.nn.Parameter}
        if share_tensors or not special:
            raise
        names = ", ".join(sorted(kind.__name__ for kind in special))
        raise ValueError(f"weights of type {names} cannot be copied; pass copy=False, which shares them") from error
    if not share_tensors:
        for parameter in result.parameters():
            parameter.grad = None
    return result
