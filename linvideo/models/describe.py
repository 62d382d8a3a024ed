"""A description of a transformer's self-attention layers."""

from dataclasses import dataclass

from diffusers import ModelMixin
from diffusers.utils.torch_utils import unwrap_module

from linvideo.models.attention import ATTENTION_TYPES, self_attentions, stored_attention_type, stored_window
from linvideo.nn import Window


@dataclass(frozen=True)
class Description:
    """The self-attention layers of a transformer. Layer numbers start at 0."""

    model_class: str
    num_layers: int
    layers_softmax: list[int]
    layers_linear: list[int]
    layers_mixed: list[int]
    layers_window: list[int]
    r: dict[int, float]  # mixed layer -> value of its r
    feature_map: str | None  # None if no layer has a linear branch
    window: Window | None  # None if no layer is a window layer
    heads: int
    head_dim: int
    parameters: int  # number of parameters
    parameters_linear_attn: int  # number of parameters in linear branches
    dtype: str

    def __str__(self) -> str:
        lines = [
            f"{self.model_class}: {self.num_layers} layers, {self.heads} heads x {self.head_dim}, {self.dtype}",
            f"  linear  ({len(self.layers_linear)}): {ranges(self.layers_linear)}",
            f"  mixed   ({len(self.layers_mixed)}): {ranges(self.layers_mixed)}",
            f"  softmax ({len(self.layers_softmax)}): {ranges(self.layers_softmax)}",
        ]
        if self.window is not None:
            lines.append(f"  window  ({len(self.layers_window)}): {ranges(self.layers_window)}; {self.window}")
        if self.r:
            lines.append("  r: " + ", ".join(f"{layer}: {value:.3f}" for layer, value in self.r.items()))
        if self.feature_map is not None:
            lines.append(f"  feature map: {self.feature_map}")
        lines.append(f"  parameters: {self.parameters:,}, of these {self.parameters_linear_attn:,} in linear branches")
        return "\n".join(lines)


def describe(model: ModelMixin) -> Description:
    """Describe a transformer, stock or converted, by its weights (not by what its layers currently run as).

    Args:
        model: Transformer of a supported family. For a pipeline, pass `pipeline.transformer`.

    Returns:
        A `Description`; str() of it is the summary that the command line prints.

    Raises:
        ValueError: `model` is not a transformer of a supported family.
    """
    model = unwrap_module(model)
    attentions = self_attentions(model)
    types = [stored_attention_type(attn) for attn in attentions]
    branches = [attn.linear_attn for attn, kind in zip(attentions, types, strict=True) if kind != "softmax"]
    layers = {kind: [i for i, other in enumerate(types) if other == kind] for kind in ATTENTION_TYPES}
    return Description(
        model_class=type(model).__name__,
        num_layers=len(types),
        layers_softmax=layers["softmax"],
        layers_linear=layers["linear"],
        layers_mixed=layers["mixed"],
        layers_window=layers["window"],
        r={i: attentions[i].linear_attn.r.item() for i in layers["mixed"]},
        feature_map=branches[0].feature_map if branches else None,
        window=stored_window(attentions),
        heads=attentions[0].heads,
        head_dim=attentions[0].inner_dim // attentions[0].heads,
        parameters=sum(p.numel() for p in model.parameters()),
        parameters_linear_attn=sum(p.numel() for branch in branches for p in branch.parameters()),
        dtype=str(model.dtype).removeprefix("torch."),
    )


def ranges(layers: list[int]) -> str:
    """Format layer numbers as ranges: [0, 2, 3, 4] -> "0, 2-4"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], layer]
        else:
            runs.append([layer])
    return ", ".join("-".join(map(str, run)) for run in runs) or "none"
