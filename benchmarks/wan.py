"""The block and model suites: Wan transformers with random weights and layers of the types softmax, linear and window.

One model serves every choice of layers: the first layers are linear, and the others softmax or window, as `Parts.use`
sets them. The time of a forward is composed of its parts, rest + softmax or window blocks + linear blocks, each timed
alone. Some counts are also timed whole, which shows how far the sum can be trusted.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
import torch._dynamo
from diffusers.models.attention_dispatch import attention_backend

from benchmarks.measure import attempt, dtype_name, timed
from benchmarks.shapes import LINEAR_COUNTS, WINDOW, WanModel
from linvideo.models import LinVideoWanTransformer3DModel
from linvideo.models.attention import attach_attention, stored_attention_type

# The paper compares with FlashAttention-2, which PyTorch includes; the others are the fastest available ones.
BACKENDS = ("_native_flash", "_native_cudnn", "_flash_3", "sage")
NOT_EXACT = ("sage",)  # rounds to 8 bits and returns no log-sum-exp, so it has no part in windows


def build(
    wan: WanModel, device: str, dtype: torch.dtype, attention_type: str = "linear"
) -> LinVideoWanTransformer3DModel:
    """Build a model with random weights in `dtype`, except those that diffusers keeps in fp32."""
    with torch.device("meta"):
        model = LinVideoWanTransformer3DModel(**wan.config, attention_types=[attention_type] * wan.layers)
    for name, x in model.named_parameters():
        kept = any(part in model._keep_in_fp32_modules for part in name.split("."))
        x.data = x.data.to(torch.float32 if kept else dtype)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, x in model.named_parameters():
        if "norm" in name:
            x.data.fill_(float(name.endswith("weight")))
        else:
            x.data.normal_(0.0, 0.02, generator=generator)
    model.rope = type(model.rope)(wan.config["attention_head_dim"], model.config.patch_size, 1024).to(device)
    return model.eval().requires_grad_(False)


def latents(wan: WanModel, device: str, dtype: torch.dtype) -> dict:
    """Return arguments for the transformer's forward."""
    text = torch.randn(1, wan.text_tokens, wan.text_dim, device=device, dtype=dtype)
    return {
        "hidden_states": torch.randn(1, *wan.latents, device=device, dtype=dtype),
        "timestep": torch.tensor([500.0], device=device),
        "encoder_hidden_states": text,
        "return_dict": False,
    }


class Parts:
    """One Wan model and the parts of its forward."""

    def __init__(self, name: str, device: str, dtype: torch.dtype, wan: WanModel, attempt: Callable = attempt):
        self.wan, self.device, self.attempt = wan, device, attempt
        self.model = build(self.wan, device, dtype)
        self.arguments = latents(self.wan, device, dtype)
        self.backends = [b for b in BACKENDS if device == "cuda" or b == "_native_flash"]
        self.backends += [f"{WINDOW}{b}" for b in self.backends if b not in NOT_EXACT]
        self.base = {"model": name, "dtype": dtype_name(dtype), "tokens": wan.tokens, "layers": wan.layers}
        self.block_arguments = self._block_arguments()

    def block_rows(self, compiled: bool) -> Iterator[dict]:
        """Time a block with each softmax backend, also as a window, a linear block, and the model without blocks.

        The cross-attention of the linear block uses the first backend.
        """
        for attention in (*self.backends, "linear", "rest"):
            row = {"suite": "block", **self.base, "attention": attention, "compiled": compiled}
            yield self.attempt(row, lambda a=attention: self._time_part(a, compiled))

    def whole_row(self, backend: str, linear_layers: int, compiled: bool) -> dict:
        row = self._model_row(backend, linear_layers, compiled, "whole")
        return self.attempt(row, lambda: self._time_whole(backend, linear_layers, compiled))

    def composed_rows(self, block_rows: list[dict]) -> list[dict]:
        """Return the sum of the parts for each backend and count; a percentile is the sum of the parts' percentiles."""
        compiled = block_rows[0]["compiled"]
        parts = {row["attention"]: row["ms"] for row in block_rows if "ms" in row}
        rows, layers = [], self.wan.layers
        if not {"linear", "rest"} <= parts.keys():
            return rows
        counts = sorted({n for n in LINEAR_COUNTS if n < layers} | {*self.wan.linear_layers, layers})
        for backend in (b for b in self.backends if b in parts):
            triples = list(zip(parts["rest"], parts[backend], parts["linear"], strict=True))
            for count in counts[: -1 if backend.startswith(WINDOW) else None]:  # all linear is the same for both
                ms = [rest + (layers - count) * softmax + count * linear for rest, softmax, linear in triples]
                rows.append(self._model_row(backend, count, compiled, "composed") | {"ms": ms})
        return rows

    def _model_row(self, backend: str, linear_layers: int, compiled: bool, how: str) -> dict:
        row = {"suite": "model", **self.base, "backend": backend, "linear_layers": linear_layers}
        return row | {"compiled": compiled, "how": how}

    def _time_part(self, attention: str, compiled: bool) -> dict:
        if attention == "rest":
            return self._without_blocks()
        block = self.model.blocks[0]
        with self.use(1, BACKENDS[0]) if attention == "linear" else self.use(0, attention):
            call = torch.compile(block, fullgraph=True) if compiled else block
            return timed(lambda: _no_grad(call, *self.block_arguments), self.device)

    def use(self, linear_layers: int, backend: str) -> AbstractContextManager:
        """Make the first layers linear and the others softmax with a backend, over all tokens or in windows.

        The context that is returned selects this backend for softmax layers and cross-attention.
        """
        name, rest = backend.removeprefix(WINDOW), "window" if backend.startswith(WINDOW) else "softmax"
        for layer, block in enumerate(self.model.blocks):
            attn, kind = block.attn1, "linear" if layer < linear_layers else rest
            if kind != "softmax" and stored_attention_type(attn) != kind:
                attach_attention(attn, kind, type(attn.processor))
            attn.attention_type = kind
            attn.frame_tokens = self.wan.frame_tokens  # which the model sets, but not for a block that is called alone
            attn.processor._attention_backend = name  # window layers don't read the context's
        return attention_backend(name)

    def _without_blocks(self) -> dict:
        blocks, self.model.blocks = self.model.blocks, torch.nn.ModuleList()
        try:
            return timed(lambda: _no_grad(self.model, **self.arguments), self.device)
        finally:
            self.model.blocks = blocks

    def _time_whole(self, backend: str, linear_layers: int, compiled: bool) -> dict:
        blocks = self.model.blocks
        if compiled:  # block by block, as diffusers' compile_repeated_blocks does
            self.model.blocks = torch.nn.ModuleList(torch.compile(block, fullgraph=True) for block in blocks)
        try:
            with self.use(linear_layers, backend):
                return timed(lambda: _no_grad(self.model, **self.arguments), self.device)
        finally:
            self.model.blocks = blocks

    def _block_arguments(self) -> tuple:
        """Return the arguments of the first block in a forward of the model."""
        found: list[tuple] = []
        handle = self.model.blocks[0].register_forward_pre_hook(lambda _, arguments: found.append(arguments))
        blocks, self.model.blocks = self.model.blocks, self.model.blocks[:1]
        try:
            _no_grad(self.model, **self.arguments)
        finally:
            handle.remove()
            self.model.blocks = blocks
        return found[0]


@torch.no_grad()
def _no_grad(call: Callable, *args, **kwargs):
    return call(*args, **kwargs)


def rows_of(
    name: str,
    suites: set[str],
    compiled: bool,
    device: str,
    dtype: torch.dtype,
    wan: WanModel,
    attempt: Callable = attempt,
) -> Iterator[dict]:
    """Yield the rows of the suites "block" and "model" for one Wan model, eager or compiled."""
    torch._dynamo.reset()
    parts = Parts(name, device, dtype, wan, attempt)
    blocks = []
    for row in parts.block_rows(compiled):
        blocks.append(row)
        if "block" in suites:
            yield row
    if "model" in suites:
        yield from parts.composed_rows(blocks)
        fastest = _fastest(blocks)
        for count in parts.wan.linear_layers if fastest else ():
            yield parts.whole_row(fastest, count, compiled)
            if count < wan.layers:
                yield parts.whole_row(f"{WINDOW}{fastest}", count, compiled)


def _fastest(block_rows: list[dict]) -> str | None:
    """Return the fastest exact softmax backend."""
    times = {row["attention"]: row["ms"][0] for row in block_rows if "ms" in row}
    exact = [backend for backend in BACKENDS if backend in times and backend not in NOT_EXACT]
    return min(exact, key=times.get) if exact else None
