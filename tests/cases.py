"""The axes on which the tests of linear attention vary, and inputs for a point on them."""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NORMALIZED = ("hedgehog", "elu", "relu", "softmax")
# (feature map, normalize), every pair the op accepts
MAPS = [(name, True) for name in NORMALIZED] + [(name, False) for name in (*NORMALIZED, "identity")]
LAYOUTS = ("contiguous", "packed_qkv", "heads_first", "guarded", "shared_batch", "last_stride_2")
GRAD_LAYOUTS = ("contiguous", "sum", "per_head", "heads_first")


@dataclass(frozen=True)
class Case:
    """One call of the op; every field is an axis of the tests."""

    head_dim: int = 64
    nq: int = 63
    nk: int = 63
    map: tuple[str, bool] = ("hedgehog", True)
    dtype: str = "bf16"
    layout: str = "contiguous"
    grad_layout: str = "contiguous"
    input_scale: float = 1.0
    v_mean: float = 0.0
    eps: float = 1e-6
    batch: int = 2
    heads: int = 2

    @property
    def options(self) -> dict:
        name, normalize = self.map
        options = {"feature_map": name, "normalize": normalize, "eps": self.eps}
        # without a denominator the output grows with Nk; 1 / (4 Nk) keeps it in fp16's range
        return options if normalize else options | {"scale": 0.25 / self.nk}

    def __str__(self) -> str:
        name, normalize = self.map
        shape = f"B{self.batch}-H{self.heads}-D{self.head_dim}-N{self.nq}x{self.nk}"
        return (
            f"{shape}-{name}{'' if normalize else '_raw'}-{self.dtype}-{self.layout}-grad_{self.grad_layout}"
            f"-x{self.input_scale:g}-v{self.v_mean:g}"
        )


def pairwise(axes: dict[str, list], seed: int = 0) -> Iterator[dict]:
    """Rows that together hold every pair of values of every two axes (greedy: best of 30 random rows each time)."""
    rng = random.Random(seed)
    pairs = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(axes, 2)
        for i in range(len(axes[a]))
        for j in range(len(axes[b]))
    }
    while pairs:
        seeds = rng.choices(sorted(pairs), k=30)
        rows = [{name: rng.randrange(len(values)) for name, values in axes.items()} | dict(pair) for pair in seeds]
        covered = [pairs & set(itertools.combinations(row.items(), 2)) for row in rows]
        best = max(range(len(rows)), key=lambda i: len(covered[i]))
        pairs -= covered[best]
        yield {name: axes[name][i] for name, i in rows[best].items()}


def _place(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of x [B, N, H, D] in memory of another layout."""
    b, n, h, d = x.shape
    if layout == "heads_first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "guarded":  # NaN before, after and between the rows, and an odd storage offset
        room = x.new_full((b, n + 133, h, d + 9), float("nan"))[:, 3 : n + 3, :, 1 : d + 1]
        return room.copy_(x)
    if layout == "last_stride_2":
        return torch.stack([x, torch.full_like(x, float("nan"))], dim=-1).flatten(-2)[..., ::2]
    return x.contiguous()


def make_inputs(case: Case, device: str, seed: int = 0) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """({"q", "k", "v"[, "q_weight", "k_weight"]}, gradient of the output) in the case's dtype and layout.

    The inputs are leaves that require gradients.
    """
    rng = torch.Generator().manual_seed(seed)
    dtype, d, h = DTYPES[case.dtype], case.head_dim, case.heads

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    nmax = max(case.nq, case.nk)
    qkv = normal(case.batch, nmax, 3, h, d) * torch.tensor([case.input_scale, case.input_scale, 1.0])[:, None, None]
    qkv[:, :, 2] += case.v_mean
    if case.layout == "shared_batch":
        qkv = qkv[:1]
    qkv = qkv.to(device, dtype)
    if case.layout == "packed_qkv":
        q, k, v = qkv.unbind(2)
    else:
        q, k, v = (_place(part, case.layout) for part in qkv.unbind(2))
    q, k, v = (x.expand(case.batch, -1, -1, -1) for x in (q, k, v))
    inputs = {"q": q[:, : case.nq], "k": k[:, : case.nk], "v": v[:, : case.nk]}
    if case.map[0] == "hedgehog":
        for name in ("q_weight", "k_weight"):
            weight = torch.eye(d, dtype=torch.float64) + 0.5 * d**-0.5 * normal(h, d, d)
            inputs[name] = weight.to(device, dtype)
    inputs = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    grad = normal(case.batch, case.nq, h, d).to(device, dtype)
    if case.grad_layout == "sum":
        grad = grad.flatten()[0].expand_as(grad)  # what out.sum().backward() gives: every stride 0
    elif case.grad_layout == "per_head":
        grad = grad[:, :1, :, :1].expand_as(grad)
    elif case.grad_layout == "heads_first":
        grad = _place(grad, "heads_first")
    return inputs, grad
