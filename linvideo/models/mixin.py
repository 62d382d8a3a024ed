"""The base of all converted transformers: self-attention layers of the types softmax, linear, mixed and window.

The parameters are in a module `linear_attn` of each self-attention module, the attention processor has no state, and
the config names the type of every layer. So diffusers' own save_pretrained, from_pretrained, offloading, LoRA and
compilation keep working.

A family is one file, with a processor that computes q, k and v as diffusers does and calls `attend`, and a class:

    class LinVideoXTransformer3DModel(LinearAttentionMixin, XTransformer3DModel):
        attention_paths = (("blocks", "attn1"),)
        processor_class = LinVideoXAttnProcessor
        stock_processors = (XAttnProcessor,)
        tokens_per_frame = tokens_of_grid  # window layers need it
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from huggingface_hub import file_exists

from linvideo.models.attention import (
    FAMILIES,
    attach_attention,
    self_attentions,
    stored_attention_type,
    stored_window,
)
from linvideo.models.card import CARD, write_card
from linvideo.nn import FEATURE_MAPS, Window


class LinearAttentionMixin:
    """A diffusers transformer with a type for each self-attention layer, usually made by `linvideo.convert`.

    Args (in addition to those of the base model):
        attention_types: Type of each layer, "softmax", "linear", "mixed" or "window". None makes all layers softmax.
        linear_attention: Settings {"feature_map": name} of all layers that are not softmax. With window layers there is
            also "window": {"chunk": 3, "overlap": 1, "anchors": [], "causal": False}; what is missing has its default.

    Class attributes:
        attention_paths: Pairs (name of a list of blocks, name of the self-attention in a block). Layers are numbered
            through all of them.
        processor_class: Class of the processors of the self-attentions.
        stock_processors: Classes of diffusers' processors that `processor_class` can replace.
        tokens_per_frame: Method that returns the number of tokens per latent frame in a call of `forward`, from its
            arguments {name: value}; `tokens_of_grid` for latents [B, C, F, H, W]. None refuses window layers.

    Every self-attention also has a runtime attribute `attention_type`; see `set_attention_types`. The config and saved
    files always follow the weights of a layer, not this attribute.

    Raises:
        ValueError: attention_types or linear_attention do not fit the model; on loading, weights and config disagree.
    """

    attention_paths: tuple[tuple[str, str], ...]
    processor_class: type
    stock_processors: tuple[type, ...]
    tokens_per_frame: Callable[["LinearAttentionMixin", dict[str, Any]], int] | None = None

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        if LinearAttentionMixin not in cls.__bases__:  # a class that FSDP2 has derived from one of ours
            return
        base = next(kind for kind in cls.__mro__[1:] if issubclass(kind, ModelMixin))
        cls.__init__ = _init_of(base)
        cls.forward = _forward_of(cls, base)
        cls._keep_in_fp32_modules = [*(base._keep_in_fp32_modules or []), "linear_attn"]
        cls._skip_layerwise_casting_patterns = [*(base._skip_layerwise_casting_patterns or []), "linear_attn"]
        FAMILIES[base] = cls

    @classmethod
    def check_convertible(cls, model: ModelMixin) -> None:
        """Raise ValueError for a model of the base class whose attention has no linear form."""

    @classmethod
    def fps(cls, pipeline: DiffusionPipeline) -> int:
        """Return the frame rate (frames per second) that this family was trained on; see `default_fps`."""
        return 16

    def register_attention_config(self, feature_map: str) -> None:
        """Write the types of the layers to the config; to be called after any change of structure."""
        attentions = self_attentions(self)
        settings: dict[str, Any] = {"feature_map": feature_map}
        if (window := stored_window(attentions)) is not None:
            settings["window"] = window.settings()
            if self.tokens_per_frame is None:
                raise ValueError(
                    f"expected a method tokens_per_frame of {type(self).__name__} for its window layers, got none"
                )
        own = {
            "attention_types": [stored_attention_type(attn) for attn in attentions],
            "linear_attention": settings,
        }
        # diffusers drops the keys in this list when it builds a model from a config
        defaults = [key for key in self.config.get("_use_default_values", []) if key not in own]
        self.register_to_config(**own, _use_default_values=defaults)

    def enable_cache(self, config: object) -> None:
        """Enable a cache, as in diffusers.

        By default TaylorSeer hooks all modules whose names end in "attn". A hook on the linear_attn inside a cached
        attention would count only the steps that this attention computes, and predict some of them. It is removed.
        """
        super().enable_cache(config)
        for attn in self_attentions(self):
            if registry := getattr(getattr(attn, "linear_attn", None), "_diffusers_hook", None):
                registry.remove_hook("taylorseer_cache", recurse=False)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = torch.utils.checkpoint.checkpoint
    ) -> None:
        """Set checkpointing, as in diffusers, with a wrapper that window layers need."""
        super()._set_gradient_checkpointing(enable, functools.partial(_checkpoint, gradient_checkpointing_func))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Load a model, as in diffusers; a stock folder gives a model in which all layers are softmax.

        A checkpoint that lacks weights is refused: diffusers only warns and leaves such parameters on the meta device.
        """
        return_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        missing = sorted(info["missing_keys"])
        left_over = sorted(key for key in info["unexpected_keys"] if ".linear_attn." in key)
        if missing:
            only_linear = all(".linear_attn." in key for key in missing)
            hint = "; to add linear layers, load the stock model and call linvideo.convert(model, layers=...)"
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks {len(missing)} weights of {cls.__name__}, the first of which is"
                f" {missing[0]}{hint if only_linear else ''}"
            )
        if left_over:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds {left_over[0]}, but its config gives that layer another"
                " attention type; config.json and weights do not belong together"
            )
        return (model, info) if return_info else model

    def _upload_folder(self, working_dir, repo_id, token=None, subfolder=None, **kwargs):
        """Upload a folder, with linvideo's model card if the repository has none.

        Both ways to push a model end here. The folder has a card from diffusers by then: that of the repository, or an
        empty one.
        """
        if not subfolder and not file_exists(repo_id, CARD, token=token):
            write_card(self, working_dir)
        return super()._upload_folder(working_dir, repo_id, token=token, subfolder=subfolder, **kwargs)


def tokens_of_grid(model: LinearAttentionMixin, inputs: dict[str, Any]) -> int:
    """Return `tokens_per_frame` of a model with latents [B, C, F, H, W] and a config with patch_size."""
    patch = model.config.patch_size
    rows, columns = patch[-2:] if isinstance(patch, list | tuple) else (patch, patch)
    height, width = inputs["hidden_states"].shape[3:]
    return (height // rows) * (width // columns)


def _forward_of(cls: type, base: type) -> Callable:
    """Return the base model's forward, which also tells window layers how many tokens a latent frame has."""
    names = list(inspect.signature(base.forward).parameters)[1:]

    @functools.wraps(base.forward)  # diffusers' hooks read the signature
    def forward(self, *args, **kwargs):
        attentions = [getattr(block, name) for blocks, name in self.attention_paths for block in getattr(self, blocks)]
        if windows := [attn for attn in attentions if attn.attention_type == "window"]:
            frame_tokens = self.tokens_per_frame(dict(zip(names, args, strict=False)) | kwargs)
            for attn in windows:
                attn.frame_tokens = frame_tokens
        return super(cls, self).forward(*args, **kwargs)  # torch.compile cannot trace base.forward

    return forward


def _checkpoint(function: Callable, block: torch.nn.Module, *args):
    """Call diffusers' checkpointing function on a block, which has to see the same grid when it is recomputed."""
    windows = [module for module in block.modules() if getattr(module, "attention_type", None) == "window"]
    return function(_WithGrid(block, windows) if windows else block, *args)


class _WithGrid:
    """A block that sets its layers' grid at every call: other forwards may have come before the recomputation."""

    def __init__(self, block: torch.nn.Module, windows: list[torch.nn.Module]):
        self.block, self.grids = block, [(attn, attn.frame_tokens) for attn in windows]

    def __call__(self, *args):
        for attn, frame_tokens in self.grids:
            if attn.frame_tokens != frame_tokens:  # torch.compile allows no change in here, and needs none
                attn.frame_tokens = frame_tokens
        return self.block(*args)


def _init_of(base: type) -> Callable:
    """Return an __init__ that takes the base model's arguments and two of its own.

    diffusers reads the config keys from the signature, and a hand-written list of them would lack keys that a newer
    diffusers adds.
    """

    def __init__(
        self, *args, attention_types: list[str] | None = None, linear_attention: dict | None = None, **kwargs
    ) -> None:
        base.__init__(self, *args, **kwargs)
        attentions = self_attentions(self)
        types = ["softmax"] * len(attentions) if attention_types is None else attention_types
        if not isinstance(types, list | tuple) or len(types) != len(attentions):
            raise ValueError(f"attention_types must be a list of {len(attentions)} layer types, got {types!r}")
        spec = {"feature_map": "hedgehog"} if linear_attention is None else linear_attention
        known = isinstance(spec, Mapping) and {"feature_map"} <= set(spec) <= {"feature_map", "window"}
        if not known or spec["feature_map"] not in FEATURE_MAPS:
            raise ValueError(
                f'linear_attention must be {{"feature_map": one of {", ".join(FEATURE_MAPS)}}}, and for window layers'
                f' "window": settings, got {spec!r}'
            )
        try:
            window = Window.of(spec.get("window", {}))
        except ValueError as error:
            raise ValueError(f"linear_attention: {error}") from None
        for attn, attention_type in zip(attentions, types, strict=True):
            attach_attention(attn, attention_type, self.processor_class, spec["feature_map"], window=window)
        self.register_attention_config(spec["feature_map"])

    own = [p for p in inspect.signature(__init__).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    arguments = list(inspect.signature(base.__init__).parameters.values())
    var_keyword = [p for p in arguments if p.kind is inspect.Parameter.VAR_KEYWORD]
    arguments = [p for p in arguments if p not in var_keyword]
    __init__.__signature__ = inspect.signature(base.__init__).replace(parameters=[*arguments, *own, *var_keyword])
    return register_to_config(__init__)
