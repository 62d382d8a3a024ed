"""What all families of video transformers share: self-attention layers that are softmax, linear, or a learned mixture
of both.

The parameters sit in a module `linear_attn` of the self-attention module, the attention processor holds no state, and
the config names the type of every layer, so that diffusers' own save_pretrained, from_pretrained, offloading, LoRA and
compilation keep working.

A family is one file: a processor that computes q, k and v as diffusers does and calls `attend`, and a class

    class LinVideoXTransformer3DModel(LinearAttentionMixin, XTransformer3DModel):
        attention_paths = (("blocks", "attn1"),)
        processor_class = LinVideoXAttnProcessor
        stock_processors = (XAttnProcessor,)
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn
from diffusers.utils.torch_utils import unwrap_module

from linvideo.models.sampling_settings import stored_settings
from linvideo.nn import FEATURE_MAPS, LinearAttentionBranch

ATTENTION_TYPES = ("softmax", "linear", "mixed")
FAMILIES: dict[type, type] = {}  # diffusers' class -> ours; importing a family's file registers it


class LinearAttentionMixin:
    """A diffusers transformer with a type per self-attention layer. Usually made by `linvideo.convert`.

    Args (all of the base model's, and):
        attention_types: one of "softmax", "linear", "mixed" per layer; None is softmax everywhere.
        linear_attention: {"feature_map": name}, shared by all layers that are not softmax.

    Class attributes:
        attention_paths: (name of a list of blocks, name of the self-attention in each); layers count through them.
        processor_class: of the self-attentions.
        stock_processors: those of diffusers that it computes the same as.

    Every self-attention has a runtime attribute `attention_type`, see `set_attention_types`; the config and what is
    saved always follow the weights that are there, not this attribute.

    Raises:
        ValueError: attention_types or linear_attention do not fit; on loading, weights and config disagree.
    """

    attention_paths: tuple[tuple[str, str], ...]
    processor_class: type
    stock_processors: tuple[type, ...]

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        if LinearAttentionMixin not in cls.__bases__:  # FSDP2 derives classes of its own
            return
        base = next(kind for kind in cls.__mro__[1:] if issubclass(kind, ModelMixin))
        cls.__init__ = _init_of(base)
        cls._keep_in_fp32_modules = [*(base._keep_in_fp32_modules or []), "linear_attn"]
        cls._skip_layerwise_casting_patterns = [*(base._skip_layerwise_casting_patterns or []), "linear_attn"]
        FAMILIES[base] = cls

    @classmethod
    def check_convertible(cls, model: ModelMixin) -> None:
        """Raise ValueError when a model of the base class is in a state that linear attention cannot take over."""

    @classmethod
    def fps(cls, pipeline: DiffusionPipeline) -> int:
        """Frames per second of the videos that a pipeline of this family was trained on; see `default_fps`."""
        return 16

    def register_attention_config(self, feature_map: str) -> None:
        """Write the layers as they are into the config; call it after any change of structure."""
        own = {
            "attention_types": [stored_attention_type(attn) for attn in self_attentions(self)],
            "linear_attention": {"feature_map": feature_map},
        }
        # diffusers drops the keys listed here when it rebuilds a model from a config
        defaults = [key for key in self.config.get("_use_default_values", []) if key not in own]
        self.register_to_config(**own, _use_default_values=defaults)

    def enable_cache(self, config: object) -> None:
        """As diffusers' enable_cache. By default TaylorSeer hooks all modules whose names end in "attn": a linear_attn
        inside a cached attention would count only the steps that this one computes, and predict some of those."""
        super().enable_cache(config)
        for attn in self_attentions(self):
            if registry := getattr(getattr(attn, "linear_attn", None), "_diffusers_hook", None):
                registry.remove_hook("taylorseer_cache", recurse=False)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As diffusers' from_pretrained, but a checkpoint that lacks weights of this model is refused: diffusers only
        warns and leaves such parameters on the meta device. A stock folder loads as all softmax."""
        return_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        missing = sorted(info["missing_keys"])
        left_over = sorted(key for key in info["unexpected_keys"] if ".linear_attn." in key)
        if missing:
            only_linear = all(".linear_attn." in key for key in missing)
            hint = "; to add linear layers, load it as it is and call linvideo.convert(model, layers=...)"
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks {len(missing)} weights of {cls.__name__}, the first is"
                f" {missing[0]}{hint if only_linear else ''}"
            )
        if left_over:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds {left_over[0]}, but its config names that layer's attention"
                " otherwise; config.json and weights do not belong together"
            )
        return (model, info) if return_info else model

    def _upload_folder(self, working_dir, repo_id, token=None, subfolder=None, **kwargs):
        """Both ways to push end here, with a card of diffusers' in the folder: that of the repository, or an empty
        one, which is no use."""
        from huggingface_hub import file_exists

        from linvideo.models.card import CARD, write_card

        if not subfolder and not file_exists(repo_id, CARD, token=token):
            write_card(self, working_dir)
        return super()._upload_folder(working_dir, repo_id, token=token, subfolder=subfolder, **kwargs)


def _init_of(base: type) -> Callable:
    """An __init__ with the base model's arguments beside its own: diffusers reads the config keys off the signature,
    and a hand-written list would drop keys that a newer diffusers adds."""

    def __init__(
        self, *args, attention_types: list[str] | None = None, linear_attention: dict | None = None, **kwargs
    ) -> None:
        base.__init__(self, *args, **kwargs)
        attentions = self_attentions(self)
        types = ["softmax"] * len(attentions) if attention_types is None else attention_types
        if not isinstance(types, list | tuple) or len(types) != len(attentions):
            raise ValueError(f"attention_types must be a list of {len(attentions)} layer types, got {types!r}")
        spec = {"feature_map": "hedgehog"} if linear_attention is None else linear_attention
        if not isinstance(spec, Mapping) or set(spec) != {"feature_map"} or spec["feature_map"] not in FEATURE_MAPS:
            raise ValueError(
                f'linear_attention must be {{"feature_map": one of {", ".join(FEATURE_MAPS)}}}, got {spec!r}'
            )
        for attn, attention_type in zip(attentions, types, strict=True):
            attach_attention(attn, attention_type, self.processor_class, spec["feature_map"])
        self.register_attention_config(spec["feature_map"])

    own = [p for p in inspect.signature(__init__).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    arguments = list(inspect.signature(base.__init__).parameters.values())
    var_keyword = [p for p in arguments if p.kind is inspect.Parameter.VAR_KEYWORD]
    arguments = [p for p in arguments if p not in var_keyword]
    __init__.__signature__ = inspect.signature(base.__init__).replace(parameters=[*arguments, *own, *var_keyword])
    return register_to_config(__init__)


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


def family(model: torch.nn.Module) -> type[LinearAttentionMixin]:
    """Our class for a diffusers transformer, stock or converted, compiled or not.

    Raises:
        ValueError: no family of ours has it.
    """
    model = unwrap_module(model)
    if isinstance(model, LinearAttentionMixin):
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


def set_attention_types(model: LinearAttentionMixin, types: Mapping[int, str]) -> dict[int, str]:
    """Run the given layers (0-based) as another type from now on; returns the types they ran as before.

    "softmax" is always possible, "linear" needs a linear branch (a linear or mixed layer), "mixed" needs r (a mixed
    layer). No parameter is added or dropped, and what `save_pretrained` writes does not change.

    Raises:
        ValueError: not a converted model, an unknown layer or type, or a type that the layer has no weights for.
            Nothing is changed then.
    """
    if not isinstance(unwrap_module(model), LinearAttentionMixin):
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
def attention_types(model: LinearAttentionMixin, types: Mapping[int, str]) -> Iterator[None]:
    """`set_attention_types` for the length of a with-block, restored on exit and on error.

    With gradient checkpointing, backward() has to run inside the block too: it computes the layers again.
    """
    before = set_attention_types(model, types)
    try:
        yield
    finally:
        set_attention_types(model, before)
