"""The axes along which the tests of linear attention vary, and inputs for a point on them."""

import dataclasses
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NORMALIZED = ("hedgehog", "hedgehog_joint", "elu", "relu", "softmax")
WEIGHTED = ("hedgehog", "hedgehog_joint")
# (feature map, normalize): all pairs that the op accepts
MAPS = [(name, True) for name in NORMALIZED] + [(name, False) for name in (*NORMALIZED, "identity")]
LAYOUTS = ("contiguous", "packed_qkv", "heads_first", "guarded", "shared_batch", "last_stride_2")
GRAD_LAYOUTS = ("contiguous", "sum", "per_head", "heads_first")
OPTIONS = {
    "map": [("hedgehog", True), ("hedgehog_joint", True), ("hedgehog_joint", False), ("elu", True), ("elu", False)],
    "rope": [False, True],
    "mix": [None, 0.0, 0.3, 1.0],
    "mask": ["none", "some", "whole"],
    "packed": ["no", "rows", "flat"],
    "group": [1, 3],
}


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
    weight_scale: float = 1.0
    v_mean: float = 0.0
    eps: float = 1e-6
    batch: int = 2
    heads: int = 2  # key heads
    group: int = 1  # query heads per key head
    rope: bool = False  # whether to rotate; sets nk = nq
    mix: float | None = None  # r
    mask: str = "none"  # "some": some keys are masked; "whole": also all keys of one sequence
    packed: str = "no"  # "rows": sequences in [1, N, H, D]; "flat": in [N, H, D]. Both set batch = 1
    lengths: tuple[tuple[int, int], ...] = ()  # (queries, keys) of each packed sequence; sets nq and nk

    def __post_init__(self):
        if self.lengths:
            nq, nk = (sum(side) for side in zip(*self.lengths, strict=True))
            object.__setattr__(self, "nq", nq)
            object.__setattr__(self, "nk", nk)
        if self.rope:
            object.__setattr__(self, "nk", self.nq)
        if self.packed != "no":
            object.__setattr__(self, "batch", 1)

    @property
    def logits(self) -> float:
        """The typical size of the logits, the arguments of the exponentials."""
        weight = self.weight_scale if self.map[0] in WEIGHTED else 1.0
        return self.input_scale * weight * (2 if self.map[0] == "hedgehog_joint" else 1)

    @property
    def options(self) -> dict:
        """The op's keyword arguments, on the CPU, and "flat" (see numerics.call)."""
        name, normalize = self.map
        options = {"feature_map": name, "normalize": normalize, "eps": self.eps}
        if not normalize:  # the output grows with Nk, and 1 / (4 Nk) keeps it in fp16's range
            options["scale"] = 0.25 / max(1, self.nk)
        if self.rope:
            angles = torch.rand(self.nq, self.head_dim // 2, generator=torch.Generator().manual_seed(1)) * 6.3
            options["rope"] = angles.cos(), angles.sin()
        if self.mask != "none":
            options["key_mask"] = self._key_mask()
        if self.packed != "no":
            ends = zip(("cu_seqlens_q", "cu_seqlens_k"), self._ends(), strict=True)
            options |= {side: torch.tensor(values, dtype=torch.int32) for side, values in ends}
            options["flat"] = self.packed == "flat"
        return options

    def _ends(self) -> tuple[list[int], list[int]]:
        """Return the boundaries of `lengths`, or of five sequences, one without queries and one without keys."""
        if self.lengths:
            return tuple([0, *itertools.accumulate(side)] for side in zip(*self.lengths, strict=True))
        q = [0, 0, 1, self.nq // 3, self.nq // 3, self.nq]
        k = [0, self.nk // 4, self.nk // 4, self.nk // 4 + 1, self.nk // 2 + 1, self.nk]
        return sorted(min(end, self.nq) for end in q), sorted(min(end, self.nk) for end in k)

    def _key_mask(self) -> torch.Tensor:
        keep = torch.rand(self.batch, self.nk, generator=torch.Generator().manual_seed(2)) < 0.7
        keep[-1:, -1:] = False
        if self.mask == "whole":
            keep[:1, self._ends()[1][-2] if self.packed != "no" else 0 :] = False
        return keep

    def __str__(self) -> str:
        name, normalize = self.map
        words = [
            f"B{self.batch}-H{self.heads}-D{self.head_dim}-N{self.nq}x{self.nk}",
            name if normalize else f"{name}_raw",
            self.dtype,
            self.layout,
            f"grad_{self.grad_layout}",
            f"x{self.input_scale:g}-v{self.v_mean:g}",
            f"w{self.weight_scale:g}" if self.weight_scale != 1 else "",
            f"group{self.group}" if self.group > 1 else "",
            "rope" if self.rope else "",
            f"mix{self.mix:g}" if self.mix is not None else "",
            f"mask_{self.mask}" if self.mask != "none" else "",
            f"packed_{self.packed}" if self.packed != "no" else "",
            f"{len(self.lengths)}_sequences" if self.lengths else "",
        ]
        return "-".join(word for word in words if word)


def pairwise(axes: dict[str, list], seed: int = 0) -> Iterator[dict]:
    """Yield rows that together contain every pair of values of any two axes.

    The search is greedy: each row is the best of 30 random ones.
    """
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


def sample(axes: dict[str, list], count: int, seed: int = 1) -> list[dict]:
    """Return `count` rows of independent random values."""
    rng = random.Random(seed)
    return [{name: rng.choice(values) for name, values in axes.items()} for _ in range(count)]


def of_many_terms(case: Case, rows: int = 15) -> Case:
    """Adapt a case to the error model, in which results are sums of many independent terms.

    The case gets at least `rows` rows, and a mean of v only if the op subtracts it (the product of do with a mean is
    one large number, which a single rounding changes as a whole). This is for random samples; test_accuracy covers the
    other values, alone and in pairs.
    """
    v_mean = case.v_mean if case.map[1] else 0.0
    return dataclasses.replace(case, nq=max(case.nq, rows), nk=max(case.nk, rows), v_mean=v_mean)


def _place(x: torch.Tensor, layout: str) -> torch.Tensor:
    """Return the values of x [B, N, H, D] in memory with another layout."""
    b, n, h, d = x.shape
    if layout == "heads_first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "guarded":  # NaN before, after and between the rows, and an odd storage offset
        inside = x.new_full((b, n + 133, h, d + 9), float("nan"))[:, 3 : n + 3, :, 1 : d + 1]
        return inside.copy_(x)
    if layout == "last_stride_2":
        return torch.stack([x, torch.full_like(x, float("nan"))], dim=-1).flatten(-2)[..., ::2]
    return x.contiguous()


def _poison(k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor) -> None:
    """Write NaN and infinity to masked keys; to a shared row, only if all batch entries mask it."""
    left_out = ~key_mask if k.shape[0] == key_mask.shape[0] else ~key_mask.any(0, keepdim=True)
    rows = torch.nn.functional.pad(left_out, (0, k.shape[1] - left_out.shape[1]))
    k[rows], v[rows] = float("nan"), float("inf")


def make_inputs(case: Case, device: str, seed: int = 0) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return the inputs {"q", "k", "v"[, "q_weight", "k_weight"][, "softmax_out", "r"]} and the gradient of the output.

    They have the dtype and layout of the case. The inputs are leaves that require gradients.
    """
    rng = torch.Generator().manual_seed(seed)
    dtype, d, h = DTYPES[case.dtype], case.head_dim, case.heads
    h_q = h * case.group

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    qkv = normal(case.batch, max(case.nq, case.nk), h_q + 2 * h, d)
    qkv[:, :, : h_q + h] *= case.input_scale
    qkv[:, :, h_q + h :] += case.v_mean
    if case.layout == "shared_batch":
        qkv = qkv[:1]
    if case.mask != "none":
        _poison(qkv[:, :, h_q : h_q + h], qkv[:, :, h_q + h :], case.options["key_mask"])
    parts = qkv.to(device, dtype).split([h_q, h, h], 2)
    if case.layout != "packed_qkv":
        parts = (_place(part, case.layout) for part in parts)
    q, k, v = (x.expand(case.batch, -1, -1, -1) for x in parts)
    inputs = {"q": q[:, : case.nq], "k": k[:, : case.nk], "v": v[:, : case.nk]}
    if case.map[0] in WEIGHTED:
        for name, heads in (("q_weight", h_q), ("k_weight", h)):
            weight = torch.eye(d, dtype=torch.float64) + 0.5 * d**-0.5 * normal(heads, d, d)
            inputs[name] = (weight * case.weight_scale).to(device, dtype)
    grad = normal(case.batch, case.nq, h_q, d).to(device, dtype)
    if case.grad_layout == "sum":
        grad = grad.flatten()[0].expand_as(grad)  # as out.sum().backward() gives it, with all strides 0
    elif case.grad_layout == "per_head":
        grad = grad[:, :1, :, :1].expand_as(grad)
    elif case.grad_layout == "heads_first":
        grad = _place(grad, "heads_first")
    if case.mix is not None:
        inputs["softmax_out"] = _place(normal(case.batch, case.nq, h_q, d).to(device, dtype), case.layout)
        inputs["r"] = torch.tensor([case.mix], device=device)
    inputs = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    return inputs, grad
