"""Wan transformer whose self-attention layers are softmax, linear, or a learned mixture of both.

The parameters sit in `blocks.i.attn1.linear_attn`, the attention processor holds no state, and the config names the
type of every layer, so that diffusers' own save_pretrained, from_pretrained, offloading, LoRA and compilation keep
working.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from diffusers import WanTransformer3DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from linvideo.nn import FEATURE_MAPS, LinearAttentionBranch
from linvideo.ops.reference import rotate

ATTENTION_TYPES = ("softmax", "linear", "mixed")


class LinVideoWanAttnProcessor(WanAttnProcessor):
    """Self-attention of a Wan block, computed as the layer's `attn.attention_type` says; it owns nothing.

    Cross-attention is left to diffusers, so `model.set_attn_processor(LinVideoWanAttnProcessor())` restores a model
    whose processors were exchanged. With any other processor every layer runs as softmax and keeps its linear weights.

    Raises:
        ValueError: a layer that is not softmax meets an attention mask.
    """

    _attention_backend = None  # both attributes are written by diffusers (set_attention_backend, enable_parallelism)
    _parallel_config = None

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        if encoder_hidden_states is not None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        attention_type = getattr(attn, "attention_type", "softmax")
        if attention_type != "softmax" and attention_mask is not None:
            raise ValueError(f"a {attention_type} attention layer takes no attention mask, got one")
        group = None  # of the ranks with the other tokens
        if self._parallel_config is not None:
            group = self._parallel_config.context_parallel_config._flattened_mesh.get_group()

        query, key, value = _qkv(attn, hidden_states)
        rope = None if rotary_emb is None else _tables(*rotary_emb)
        if attention_type == "linear":
            out = attn.linear_attn(query, key, value, rope=rope, group=group)
        else:
            if rope is not None:
                query, key = rotate(query, *rope), rotate(key, *rope)
            # autocast's RMSNorm gives fp32, which only some backends cast back
            query, key = query.type_as(value), key.type_as(value)
            out = dispatch_attention_fn(
                query,
                key,
                value,
                attn_mask=attention_mask,
                dropout_p=0.0,
                is_causal=False,
                backend=self._attention_backend,
                parallel_config=self._parallel_config,
            )
        if attention_type == "mixed":
            out = attn.linear_attn(query, key, value, softmax_out=out, group=group)

        out = out.flatten(2, 3).type_as(query)
        for layer in attn.to_out:  # projection, dropout
            out = layer(out)
        return out


def _qkv(attn: torch.nn.Module, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[B, N, H*D] -> normalised q, normalised k, v, each [B, N, H, D]; fused projections included."""
    if attn.fused_projections:
        query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
    else:
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
    # Wan normalises over all heads at once, before the split.
    query, key = attn.norm_q(query), attn.norm_k(key)
    return tuple(x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))


def _tables(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """diffusers' tables [1, N, 1, D], every entry repeated for its pair of channels -> [N, D/2]."""
    return cos[0, :, 0, 0::2].contiguous(), sin[0, :, 0, 0::2].contiguous()  # once, and not in each kernel


def _with_base_arguments(init):
    """Give `init` the base model's arguments beside its own: diffusers reads the config keys off the signature, and a
    hand-written list would drop keys that a newer diffusers adds."""
    own = [p for p in inspect.signature(init).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    base = inspect.signature(WanTransformer3DModel.__init__)
    init.__signature__ = base.replace(parameters=[*base.parameters.values(), *own])
    return register_to_config(init)


class LinVideoWanTransformer3DModel(WanTransformer3DModel):
    """`WanTransformer3DModel` with a type per self-attention layer. Usually made by `linvideo.convert`.

    Args (all of WanTransformer3DModel's, and):
        attention_types: one of "softmax", "linear", "mixed" per layer; None is softmax everywhere.
        linear_attention: {"feature_map": name}, shared by all layers that are not softmax.

    Every `blocks[i].attn1` has a runtime attribute `attention_type`, see `set_attention_types`; the config and what is
    saved always follow the weights that are there, not this attribute.

    Raises:
        ValueError: attention_types or linear_attention do not fit; on loading, weights and config disagree.
    """

    _keep_in_fp32_modules = [*WanTransformer3DModel._keep_in_fp32_modules, "linear_attn"]
    _skip_layerwise_casting_patterns = [*WanTransformer3DModel._skip_layerwise_casting_patterns, "linear_attn"]

    @_with_base_arguments
    def __init__(
        self, *args, attention_types: list[str] | None = None, linear_attention: dict | None = None, **kwargs
    ) -> None:
        super().__init__(*args, **kwargs)
        types = ["softmax"] * len(self.blocks) if attention_types is None else attention_types
        if not isinstance(types, list | tuple) or len(types) != len(self.blocks):
            raise ValueError(f"attention_types must be a list of {len(self.blocks)} layer types, got {types!r}")
        spec = {"feature_map": "hedgehog"} if linear_attention is None else linear_attention
        if not isinstance(spec, Mapping) or set(spec) != {"feature_map"} or spec["feature_map"] not in FEATURE_MAPS:
            raise ValueError(
                f'linear_attention must be {{"feature_map": one of {", ".join(FEATURE_MAPS)}}}, got {spec!r}'
            )
        for block, attention_type in zip(self.blocks, types, strict=True):
            attach_attention(block.attn1, attention_type, spec["feature_map"])
        self.register_attention_config(spec["feature_map"])

    def register_attention_config(self, feature_map: str) -> None:
        """Write the layers as they are into the config; call it after any change of structure."""
        own = {
            "attention_types": [stored_attention_type(block.attn1) for block in self.blocks],
            "linear_attention": {"feature_map": feature_map},
        }
        # diffusers drops the keys listed here when it rebuilds a model from a config
        defaults = [key for key in self.config.get("_use_default_values", []) if key not in own]
        self.register_to_config(**own, _use_default_values=defaults)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As diffusers' from_pretrained, but a checkpoint that lacks weights of this model is refused: diffusers only
        warns and leaves such parameters on the meta device. A stock Wan folder loads as all softmax."""
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


def attach_attention(
    attn: torch.nn.Module, attention_type: str, feature_map: str = "hedgehog", r_init: float = 0.8
) -> None:
    """Give one self-attention module its type, the linear branch that the type needs, and the processor."""
    if attention_type not in ATTENTION_TYPES:
        raise ValueError(f"an attention type must be one of {', '.join(ATTENTION_TYPES)}, got {attention_type!r}")
    if attention_type != "softmax":
        mixed = attention_type == "mixed"
        branch = LinearAttentionBranch(
            attn.heads, attn.inner_dim // attn.heads, feature_map=feature_map, mixed=mixed, r_init=r_init
        )
        attn.linear_attn = branch.to(attn.norm_q.weight.device).train(attn.training)
    attn.attention_type = attention_type
    processor = LinVideoWanAttnProcessor()
    processor._attention_backend = getattr(attn.processor, "_attention_backend", None)
    attn.set_processor(processor)


def stored_attention_type(attn: torch.nn.Module) -> str:
    """The type that the module's parameters make it, whatever its runtime `attention_type` is."""
    branch = getattr(attn, "linear_attn", None)
    return "softmax" if branch is None else "linear" if branch.r is None else "mixed"


def set_attention_types(model: LinVideoWanTransformer3DModel, types: Mapping[int, str]) -> dict[int, str]:
    """Run the given layers (0-based) as another type from now on; returns the types they ran as before.

    "softmax" is always possible, "linear" needs a linear branch (a linear or mixed layer), "mixed" needs r (a mixed
    layer). No parameter is added or dropped, and what `save_pretrained` writes does not change.

    Raises:
        ValueError: not a converted model, an unknown layer or type, or a type that the layer has no weights for.
            Nothing is changed then.
    """
    if not isinstance(model, LinVideoWanTransformer3DModel):
        raise ValueError(f"expected a LinVideoWanTransformer3DModel, got {type(model).__name__}")
    possible = {"softmax": ("softmax",), "linear": ("softmax", "linear"), "mixed": ATTENTION_TYPES}
    for layer, attention_type in types.items():
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < len(model.blocks):
            raise ValueError(f"a layer must be an integer from 0 to {len(model.blocks) - 1}, got {layer!r}")
        allowed = possible[stored_attention_type(model.blocks[layer].attn1)]
        if attention_type not in allowed:
            raise ValueError(f"layer {layer} can run as {' or '.join(allowed)}, got {attention_type!r}")
    before = {layer: model.blocks[layer].attn1.attention_type for layer in types}
    for layer, attention_type in types.items():
        model.blocks[layer].attn1.attention_type = attention_type
    return before


@contextmanager
def attention_types(model: LinVideoWanTransformer3DModel, types: Mapping[int, str]) -> Iterator[None]:
    """`set_attention_types` for the length of a with-block, restored on exit and on error.

    With gradient checkpointing, backward() has to run inside the block too: it computes the layers again.
    """
    before = set_attention_types(model, types)
    try:
        yield
    finally:
        set_attention_types(model, before)
