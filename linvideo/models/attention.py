"""The self-attention layers of a video transformer, stock or converted: which they are, what they run as, and
attention itself."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn
from diffusers.utils.torch_utils import unwrap_module

from linvideo.models.sampling_settings import stored_settings
from linvideo.nn import LinearAttentionBranch

ATTENTION_TYPES = ("softmax", "linear", "mixed")
FAMILIES: dict[type, type] = {}  # diffusers' class -> ours; importing a family's file registers it (see mixin.py)


def _accept_converted_parts() -> None:
    """Let every pipeline class take our class where it takes the stock one: diffusers' `from_pipe` compares types, not
    subclasses, and leaves a converted transformer out."""
    stock = DiffusionPipeline._get_signature_types.__func__

    def _get_signature_types(cls: type[DiffusionPipeline]) -> dict[str, tuple]:
        types = stock(cls)
        return {
            name: (*kinds, *(FAMILIES[kind] for kind in kinds if kind in FAMILIES)) for name, kinds in types.items()
        }

    DiffusionPipeline._get_signature_types = classmethod(_get_signature_types)


_accept_converted_parts()


def is_converted(model: object) -> bool:
    """Whether a model is one of our classes, which has a type for each of its layers."""
    return isinstance(model, tuple(FAMILIES.values()))


def family(model: torch.nn.Module) -> type[ModelMixin]:
    """Our class for a diffusers transformer, stock or converted, compiled or not.

    Raises:
        ValueError: no family of ours has it.
    """
    model = unwrap_module(model)
    if is_converted(model):
        return type(model)
    if type(model) not in FAMILIES:
        known = ", ".join(sorted(kind.__name__ for kind in FAMILIES))
        raise ValueError(f"expected one of {known}, or a converted one, got {type(model).__name__}")
    return FAMILIES[type(model)]


def self_attentions(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The self-attention modules of a transformer, stock or converted, in the order of the layers."""
    paths = family(model).attention_paths
    return [getattr(block, name) for blocks, name in paths for block in getattr(model, blocks)]


def video_transformers(pipeline: DiffusionPipeline) -> dict[str, ModelMixin]:
    """Name -> transformer of a pipeline, stock or converted: "transformer" and, of two experts, "transformer_2". Of one
    that torch.compile has wrapped, the model inside.

    Raises:
        ValueError: it has none, or one that is of no family of ours.
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
    """Frames per second that the pipeline's videos are meant to be played at: as its folder says (see
    linvideo.models.sampling_settings), else the default of its call, where the call takes a frame rate, else that of
    its family.

    Raises:
        ValueError: the pipeline has no transformer of a family of ours, or its folder's settings are damaged.
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
) -> torch.Tensor:
    """Attention of q, k and v [B, N, H, D], normalised and rotated, as the layer's `attention_type` says; [B, N, H, D].

    Args:
        query, key: in value's dtype: autocast's norms may give fp32, which only some backends cast back. The processor
            casts, so that the fp32 ones are not kept meanwhile.
        key_mask: bool [B, N], the keys that count, for linear attention.
        attention_mask: the same for softmax attention, as diffusers' processor of the family has it.
    """
    attention_type = getattr(attn, "attention_type", "softmax")
    options = {"key_mask": key_mask, "group": context_group(processor)}
    if attention_type == "linear":
        return attn.linear_attn(query, key, value, **options)
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
    """As the model's set_attention_backend, and the backend is tried once.

    Args:
        name: of diffusers' attention backends.
        device, dtype: that attention will run with, where they are not the model's of now.

    Raises:
        ValueError: no such backend, a package that it needs is missing, or it doesn't run on this device.
    """
    if name not in (known := [backend.value for backend in AttentionBackendName]):
        raise ValueError(f"attention_backend must be one of the following: {', '.join(known)}; got {name!r}")
    attn = self_attentions(model)[0]
    tokens = torch.zeros(1, 16, attn.heads, attn.inner_dim // attn.heads, device=device or model.device)
    tokens = tokens.to(dtype or model.dtype)
    try:
        with attention_backend(name):  # the setter leaves a default for the whole process behind
            dispatch_attention_fn(tokens, tokens, tokens)
    except Exception as error:  # the backends' packages raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"cannot use attention_backend {name!r} here: {reason}") from None
    model.set_attention_backend(name)


def context_group(processor: object) -> torch.distributed.ProcessGroup | None:
    """The ranks that hold the other tokens, under diffusers' context parallelism."""
    config = processor._parallel_config
    return None if config is None else config.context_parallel_config._flattened_mesh.get_group()


def attach_attention(
    attn: torch.nn.Module,
    attention_type: str,
    processor_class: type,
    feature_map: str = "hedgehog",
    r_init: float = 0.8,
) -> None:
    """Give one self-attention module its type, the linear branch that the type needs, and the processor."""
    if attention_type not in ATTENTION_TYPES:
        raise ValueError(f"an attention type must be one of {', '.join(ATTENTION_TYPES)}, got {attention_type!r}")
    if attention_type != "softmax":
        mixed = attention_type == "mixed"
        branch = LinearAttentionBranch(
            attn.heads, attn.inner_dim // attn.heads, feature_map=feature_map, mixed=mixed, r_init=r_init
        )
        attn.linear_attn = branch.to(attn.to_q.weight.device).train(attn.training)
    attn.attention_type = attention_type
    processor = processor_class()
    processor._attention_backend = getattr(attn.processor, "_attention_backend", None)
    attn.set_processor(processor)


def stored_attention_type(attn: torch.nn.Module) -> str:
    """The type that the module's parameters make it, whatever its runtime `attention_type` is."""
    branch = getattr(attn, "linear_attn", None)
    return "softmax" if branch is None else "linear" if branch.r is None else "mixed"


def set_attention_types(model: ModelMixin, types: Mapping[int, str]) -> dict[int, str]:
    """Run the given layers (0-based) as another type from now on; returns the types they ran as before.

    "softmax" is always possible, "linear" needs a linear branch (a linear or mixed layer), "mixed" needs r (a mixed
    layer). No parameter is added or dropped, and what `save_pretrained` writes does not change.

    Raises:
        ValueError: not a converted model, an unknown layer or type, or a type that the layer has no weights for.
            Nothing is changed then.
    """
    if not is_converted(unwrap_module(model)):
        raise ValueError(f"expected a converted transformer, got {type(model).__name__}")
    attentions = self_attentions(model)
    possible = {"softmax": ("softmax",), "linear": ("softmax", "linear"), "mixed": ATTENTION_TYPES}
    for layer, attention_type in types.items():
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < len(attentions):
            raise ValueError(f"a layer must be an integer from 0 to {len(attentions) - 1}, got {layer!r}")
        allowed = possible[stored_attention_type(attentions[layer])]
        if attention_type not in allowed:
            raise ValueError(f"layer {layer} can run as {' or '.join(allowed)}, got {attention_type!r}")
    before = {layer: attentions[layer].attention_type for layer in types}
    for layer, attention_type in types.items():
        attentions[layer].attention_type = attention_type
    return before


@contextmanager
def attention_types(model: ModelMixin, types: Mapping[int, str]) -> Iterator[None]:
    """`set_attention_types` for the length of a with-block, restored on exit and on error.

    With gradient checkpointing, backward() has to run inside the block too: it computes the layers again.
    """
    before = set_attention_types(model, types)
    try:
        yield
    finally:
        set_attention_types(model, before)
