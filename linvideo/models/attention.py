"""The self-attention layers of a video transformer, stock or converted: finding them, their types, and attention."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    attention_backend,
    dispatch_attention_fn,
)
from diffusers.utils.torch_utils import unwrap_module

from linvideo.models.sampling_settings import stored_settings
from linvideo.nn import LinearAttentionBranch, Window, WindowAttentionBranch
from linvideo.ops.softmax_backends import choose

ATTENTION_TYPES = ("softmax", "linear", "mixed", "window")
# diffusers' names of attention backends -> those of linvideo.ops.softmax_backends, for the softmax part of a window
WINDOW_BACKENDS = {
    "native": None,
    "_native_flash": "flash",
    "_native_cudnn": "cudnn",
    "_native_efficient": "efficient",
    "flash": "flash_attn_2",
    "_flash_3": "flash_attn_3",
}
FAMILIES: dict[type, type] = {}  # diffusers' class -> ours; importing the file of a family adds it (see mixin.py)


def _accept_converted_parts() -> None:
    """Let every pipeline class accept our class where it accepts the stock one.

    diffusers' `from_pipe` compares exact types and would leave out a converted transformer.
    """
    stock = DiffusionPipeline._get_signature_types.__func__

    def _get_signature_types(cls: type[DiffusionPipeline]) -> dict[str, tuple]:
        types = stock(cls)
        return {
            name: (*kinds, *(FAMILIES[kind] for kind in kinds if kind in FAMILIES)) for name, kinds in types.items()
        }

    DiffusionPipeline._get_signature_types = classmethod(_get_signature_types)


_accept_converted_parts()


def is_converted(model: object) -> bool:
    """Return whether a model is of one of our classes, which have a type for each layer."""
    return isinstance(model, tuple(FAMILIES.values()))


def family(model: torch.nn.Module) -> type[ModelMixin]:
    """Return our class for a diffusers transformer, stock or converted, compiled or not.

    Raises:
        ValueError: The transformer belongs to no supported family.
    """
    model = unwrap_module(model)
    if is_converted(model):
        return type(model)
    if type(model) not in FAMILIES:
        known = ", ".join(sorted(kind.__name__ for kind in FAMILIES))
        raise ValueError(f"expected one of {known}, or a converted one, got {type(model).__name__}")
    return FAMILIES[type(model)]


def self_attentions(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the self-attention modules of a transformer, stock or converted, in the order of the layers."""
    paths = family(model).attention_paths
    return [getattr(block, name) for blocks, name in paths for block in getattr(model, blocks)]


def video_transformers(pipeline: DiffusionPipeline) -> dict[str, ModelMixin]:
    """Return a pipeline's transformers by name: "transformer" and, with two experts, "transformer_2".

    For a transformer that torch.compile has wrapped, it is the model inside.

    Raises:
        ValueError: The pipeline has no transformer, or one that belongs to no supported family.
    """
    names = ("transformer", "transformer_2")
    parts = {name: getattr(pipeline, name, None) for name in names}
    found = {name: unwrap_module(part) for name, part in parts.items() if part is not None}
    if not found:
        raise ValueError(f"expected a pipeline with a video transformer, got {type(pipeline).__name__} without one")
    for transformer in found.values():
        family(transformer)
    return found


def default_fps(pipeline: DiffusionPipeline) -> int:
    """Return the frame rate, in frames per second, at which the pipeline's videos should be played.

    It is that of the pipeline's folder (see linvideo.models.sampling_settings), else the default of the pipeline's call
    if that takes a frame rate, else that of its family.

    Raises:
        ValueError: The pipeline has no transformer of a supported family, or its folder's settings are damaged.
    """
    transformer = next(iter(video_transformers(pipeline).values()))
    arguments = inspect.signature(pipeline.__call__).parameters
    stated = [arguments[name].default for name in ("frame_rate", "fps") if name in arguments]
    return stored_settings(pipeline).get("fps") or next(iter(stated), None) or family(transformer).fps(pipeline)


def attend(
    processor: object,
    attn: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    rope: tuple[torch.Tensor, torch.Tensor] | None = None,
    prefix_tokens: int = 0,
    suffix_tokens: int = 0,
) -> torch.Tensor:
    """Return attention [B, N, H, D] of the layer's `attention_type`.

    Args:
        processor: Attention processor, which holds the backend and the parallel configuration.
        attn: Self-attention module of the layer.
        query, key: Normalised and rotated queries and keys [B, N, H, D], in value's dtype. Under autocast the norms may
            return fp32, which only some backends cast back. The processor casts them, so that the fp32 tensors are not
            kept during attention.
        value: Values [B, N, H, D].
        key_mask: Bool [B, N], True for the keys that count, for linear and window attention.
        attention_mask: The same mask for softmax attention, in the form of diffusers' processor of the family.
        rope: Rotary embedding (cos, sin), each [N, D/2], if a linear or window layer has still to rotate q and k.
        prefix_tokens, suffix_tokens: Numbers of text tokens before and after those of the video.
    """
    attention_type = getattr(attn, "attention_type", "softmax")
    options = {"key_mask": key_mask, "group": context_group(processor)}
    if attention_type == "linear":
        return attn.linear_attn(query, key, value, rope=rope, **options)
    if attention_type == "window":
        _check_even(processor)
        if key_mask is not None:
            video_end = key_mask.shape[1] - suffix_tokens
            options["key_mask"] = torch.cat([key_mask[:, :prefix_tokens], key_mask[:, video_end:]], dim=1)
        options |= {"prefix_tokens": prefix_tokens, "suffix_tokens": suffix_tokens, "rope": rope}
        options["backend"] = window_backend(processor._attention_backend, query.device)
        return attn.linear_attn(query, key, value, frame_tokens=_frame_tokens(attn), **options)
    out = dispatch_attention_fn(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=0.0,
        is_causal=False,
        backend=processor._attention_backend,
        parallel_config=processor._parallel_config,
    )
    if attention_type == "mixed":
        out = attn.linear_attn(query, key, value, softmax_out=out, **options)
    return out


@torch.no_grad()
def choose_backend(
    model: ModelMixin, name: str, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> None:
    """Set the model's attention backend after trying it once.

    Args:
        model: Transformer, stock or converted.
        name: Name of one of diffusers' attention backends.
        device, dtype: Device and dtype that attention will run with. None is the model's current one.

    Raises:
        ValueError: There is no such backend, a package that it needs is missing, or it does not run on this device.
    """
    if name not in (known := [backend.value for backend in AttentionBackendName]):
        raise ValueError(f"attention_backend must be one of the following: {', '.join(known)}; got {name!r}")
    attn = self_attentions(model)[0]
    tokens = torch.zeros(1, 16, attn.heads, attn.inner_dim // attn.heads, device=device or model.device)
    tokens = tokens.to(dtype or model.dtype)
    try:
        with attention_backend(name):  # not set_attention_backend, which also sets a default for the whole process
            dispatch_attention_fn(tokens, tokens, tokens)
    except Exception as error:  # the backends' packages may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"cannot use attention_backend {name!r} here: {reason}") from None
    check_window_backend(model, name, tokens, training=False)
    model.set_attention_backend(name)


def check_window_backend(model: ModelMixin, name: str | None, tokens: torch.Tensor, training: bool) -> None:
    """Raise ValueError if the model has window layers and no such softmax for them.

    Args:
        model: Transformer, stock or converted.
        name: Name of one of diffusers' attention backends. None is diffusers' default.
        tokens: Tensor of the device and dtype that attention will run with.
        training: Whether a backward is needed.
    """
    if stored_window(self_attentions(model)) is not None:
        choose(window_backend(name, tokens.device), tokens, masked=False, training=training)


def window_backend(name: str | None, device: torch.device) -> str | None:
    """Return the backend of a window layer's softmax part, in linvideo.ops.softmax_backends, for diffusers' name.

    None means diffusers' default, which an environment variable, `attention_backend` or another model may have set.

    Raises:
        ValueError: Window layers have no such backend.
    """
    if name is None:
        name = _AttentionBackendRegistry.get_active_backend()[0]
    name = getattr(name, "value", name)
    if name not in WINDOW_BACKENDS:
        known = ", ".join(WINDOW_BACKENDS)
        raise ValueError(f"the attention backend of a model with window layers must be one of {known}, got {name!r}")
    return "cpu" if (name, device.type) == ("_native_flash", "cpu") else WINDOW_BACKENDS[name]


def _frame_tokens(attn: torch.nn.Module) -> int:
    """Return the number of tokens per latent frame that the model's forward has written to a window layer."""
    if attn.frame_tokens is None:
        raise ValueError("a window layer expects a call by its model, which tells it the tokens per frame, got another")
    return attn.frame_tokens


def _check_even(processor: object) -> None:
    """Refuse context parallelism with unequal numbers of tokens per rank: window layers exchange equal parts."""
    config = getattr(processor._parallel_config, "context_parallel_config", None)
    for name in ("ulysses_anything", "ring_anything"):
        if getattr(config, name, False):
            raise ValueError(f"expected context parallelism without {name} in a model with window layers, got it")


def context_group(processor: object) -> torch.distributed.ProcessGroup | None:
    """Return the group of ranks that hold the other tokens under diffusers' context parallelism, else None."""
    config = processor._parallel_config
    return None if config is None else config.context_parallel_config._flattened_mesh.get_group()


def attach_attention(
    attn: torch.nn.Module,
    attention_type: str,
    processor_class: type,
    feature_map: str = "hedgehog",
    r_init: float = 0.8,
    window: Window | None = None,
) -> None:
    """Give a self-attention module its type, the branch that the type needs, and our processor."""
    if attention_type not in ATTENTION_TYPES:
        raise ValueError(f"an attention type must be one of {', '.join(ATTENTION_TYPES)}, got {attention_type!r}")
    if attention_type != "softmax":
        heads, head_dim = attn.heads, attn.inner_dim // attn.heads
        if attention_type == "window":
            branch = WindowAttentionBranch(heads, head_dim, feature_map, window)
            attn.frame_tokens = None  # tokens per latent frame, which the model's forward writes at every call
        else:
            branch = LinearAttentionBranch(heads, head_dim, feature_map, attention_type == "mixed", r_init)
        attn.linear_attn = branch.to(attn.to_q.weight.device).train(attn.training)
    attn.attention_type = attention_type
    processor = processor_class()
    processor._attention_backend = getattr(attn.processor, "_attention_backend", None)
    attn.set_processor(processor)


def stored_attention_type(attn: torch.nn.Module) -> str:
    """Return a module's type according to its parameters, whatever its runtime `attention_type` is."""
    branch = getattr(attn, "linear_attn", None)
    if branch is None:
        return "softmax"
    return "window" if isinstance(branch, WindowAttentionBranch) else "linear" if branch.r is None else "mixed"


def stored_window(attentions: list[torch.nn.Module]) -> Window | None:
    """Return the setting that all window layers of a model share; None if it has no such layer."""
    return next((attn.linear_attn.window for attn in attentions if stored_attention_type(attn) == "window"), None)


def set_attention_types(model: ModelMixin, types: Mapping[int, str]) -> dict[int, str]:
    """Run layers as another type from now on, and return the types that they ran as before.

    No parameter is added or dropped, and `save_pretrained` writes the same as before.

    Args:
        model: Converted transformer.
        types: Type to run each layer as, by layer number (starting at 0). "softmax" is always possible, "linear" needs
            a linear branch (a linear or mixed layer), "mixed" needs r (a mixed layer), and "window" a window layer.

    Raises:
        ValueError: The model is not converted, a layer or type is unknown, or a layer has no weights for its type.
            Nothing is changed then.
    """
    if not is_converted(unwrap_module(model)):
        raise ValueError(f"expected a converted transformer, got {type(model).__name__}")
    attentions = self_attentions(model)
    possible = {"mixed": ("softmax", "linear", "mixed")}
    for layer, attention_type in types.items():
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < len(attentions):
            raise ValueError(f"a layer must be an integer from 0 to {len(attentions) - 1}, got {layer!r}")
        stored = stored_attention_type(attentions[layer])
        allowed = possible.get(stored, tuple(dict.fromkeys(("softmax", stored))))
        if attention_type not in allowed:
            raise ValueError(f"layer {layer} can run as {' or '.join(allowed)}, got {attention_type!r}")
    before = {layer: attentions[layer].attention_type for layer in types}
    for layer, attention_type in types.items():
        attentions[layer].attention_type = attention_type
    return before


@contextmanager
def attention_types(model: ModelMixin, types: Mapping[int, str]) -> Iterator[None]:
    """Context manager around `set_attention_types`: the previous types are restored on exit, even after an error.

    With gradient checkpointing, backward() must run inside the block, too, since it computes the layers again.
    """
    before = set_attention_types(model, types)
    try:
        yield
    finally:
        set_attention_types(model, before)
