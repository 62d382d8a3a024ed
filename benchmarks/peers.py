"""What is timed at op level: linear_attn and everything that it can be compared with, where it is installed."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import windows
from benchmarks.shapes import Shape
from linvideo.ops import linear_attn, window_attn
from linvideo.ops.reference import WEIGHTED_MAPS, linear_attn_reference
from linvideo.ops.softmax_backends import BACKENDS

SPARSITY = 0.85  # share of blocks that the block-sparse peers leave out
BLOCK = 128  # tokens per block


class Inputs(NamedTuple):
    shape: Shape
    q: torch.Tensor  # [B, N, H, D], as k, v, gradient and softmax_out
    k: torch.Tensor
    v: torch.Tensor
    q_weight: torch.Tensor  # [H, D, D]
    k_weight: torch.Tensor
    softmax_out: torch.Tensor
    r: torch.Tensor
    log_gain: torch.Tensor  # [H]
    rope: tuple[torch.Tensor, torch.Tensor]
    gradient: torch.Tensor
    heads_first: tuple[torch.Tensor, ...]  # q, k, v as [B, H, N, D], for peers that need this memory layout

    @classmethod
    def random(cls, shape: Shape, dtype: torch.dtype, device: str) -> "Inputs":
        batch, tokens, heads, dim, *_ = shape
        torch.manual_seed(0)
        rows = [torch.randn(batch, tokens, heads, dim, device=device, dtype=dtype) for _ in range(5)]
        weights = [torch.eye(dim, device=device) + 0.02 * torch.randn(heads, dim, dim, device=device) for _ in "qk"]
        angles = torch.outer(torch.arange(tokens, device=device), 100.0 ** -torch.linspace(0, 1, dim // 2).to(device))
        gains = torch.full((1,), 0.5, device=device), torch.full((heads,), math.log(dim / 2), device=device)
        learned = [*rows[:4], *(weight.to(dtype) for weight in weights), *gains]
        q, k, v, softmax_out, *small = (x.requires_grad_() for x in learned)
        heads_first = tuple(x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v))
        rope = (angles.cos(), angles.sin())
        given = dict(zip(("q_weight", "k_weight", "r", "log_gain"), small, strict=True))
        given |= {"rope": rope, "gradient": rows[4], "heads_first": heads_first}
        return cls(shape, q, k, v, softmax_out=softmax_out, **given)

    def first_head(self) -> "Inputs":
        """Return the inputs of the first head alone, in fp32 and without gradients."""
        rows = {name: getattr(self, name)[:, :, :1] for name in ("q", "k", "v", "softmax_out", "gradient")}
        weights = {name: getattr(self, name)[:1] for name in ("q_weight", "k_weight", "log_gain")}
        return self._replace(**{name: x.detach().float() for name, x in (rows | weights).items()})


class Peer(NamedTuple):
    build: Callable[[Inputs], Callable[[], torch.Tensor]]  # may raise ImportError
    cost: str  # a key of COSTS
    learned: tuple[str, ...] = ("q", "k", "v")  # inputs that get gradients; empty for a peer without a backward
    cuda_only: bool = False
    heads_first: bool = False  # whether it reads Inputs.heads_first
    most_tokens: int | None = None  # largest length to time, where longer ones would take minutes
    # From the inputs of one head in fp32, what the output must be and in which rows; None for other people's peers.
    expected: Callable[[Inputs], tuple[torch.Tensor | slice, torch.Tensor]] | None = None

    def leaves(self, x: Inputs) -> list[torch.Tensor]:
        return list(x.heads_first) if self.heads_first else [getattr(x, name) for name in self.learned]


HEDGEHOG = ("q", "k", "v", "q_weight", "k_weight")
# Useful flops per row and head in a forward and in a backward, in units of D^2 (linear attention), then in units of N D
# (softmax over all pairs), then the rows of D elements that each must read or write. What a backward has to compute
# again (logits, softmax's scores) counts as useful, as in FlashAttention's own figures.
COSTS = {
    "hedgehog": ((12, 28), (0, 0), (4, 7)),
    "plain": ((4, 8), (0, 0), (4, 7)),
    "mix": ((12, 28), (0, 0), (5, 9)),
    "softmax": ((0, 0), (4, 10), (4, 7)),
    "sparse": ((0, 0), (4, 10), (4, 7)),
    "window": ((12, 28), (4, 10), (4, 7)),
    "near": ((0, 0), (4, 10), (4, 7)),
}


def kept(shape: Shape, cost: str) -> float | None:
    """Return the share of the pairs that softmax is computed for, if that is neither all nor none."""
    return 1 - SPARSITY if cost == "sparse" else windows.kept(shape) if cost in ("window", "near") else None


def gbytes(shape: Shape, cost: str, which: str, element_size: int) -> float:
    """Return the GB that must be read or written."""
    rows = _of_pass(COSTS[cost][2], which)
    return rows * shape.batch * shape.tokens * shape.heads * shape.head_dim * element_size / 1e9


def tflops(shape: Shape, cost: str, which: str) -> float:
    """Return the useful floating-point operations, in 1e12."""
    linear, softmax = (_of_pass(flops, which) for flops in COSTS[cost][:2])
    inner = linear * shape.head_dim + softmax * (kept(shape, cost) or 1) * shape.tokens
    return shape.batch * shape.tokens * shape.heads * shape.head_dim * inner / 1e12


def _of_pass(amounts: tuple[int, int], which: str) -> int:
    forward, backward = amounts
    return {"forward": forward, "backward": backward, "forward+backward": forward + backward}[which]


def _ours(feature_map: str, rope: bool = False, mix: bool = False) -> Peer:
    weighted = feature_map.startswith("hedgehog")

    def options(x: Inputs) -> dict:
        given: dict = {"feature_map": feature_map, "normalize": feature_map != "identity"}
        given |= {"q_weight": x.q_weight, "k_weight": x.k_weight} if weighted else {}
        given |= {"rope": x.rope} if rope else {}
        return given | ({"mix": (x.softmax_out, x.r)} if mix else {})

    def build(x: Inputs):
        given = options(x)
        return lambda: linear_attn(x.q, x.k, x.v, **given)

    def expected(x: Inputs):
        return slice(None), linear_attn_reference(x.q, x.k, x.v, **options(x))

    learned = (HEDGEHOG if weighted else HEDGEHOG[:3]) + (("softmax_out", "r") if mix else ())
    return Peer(build, "mix" if mix else "hedgehog" if weighted else "plain", learned, expected=expected)


def _window(backend: str | None = None) -> Peer:
    """Return window attention as models call it, with the softmax of one library; None is the default one."""

    def build(x: Inputs):
        weights = {"q_weight": x.q_weight, "k_weight": x.k_weight, "log_gain": x.log_gain}
        given = weights | {"rope": x.rope, "backend": backend} | windows.options(x.shape)
        return lambda: window_attn(x.q, x.k, x.v, **given)

    learned = (*HEDGEHOG, "log_gain")
    return Peer(build, "window", learned, cuda_only=backend is not None, expected=windows.expected)


def _formula(feature_map: str, compiled: bool) -> Peer:
    """Return what a user would write with PyTorch operations."""
    weighted = feature_map in WEIGHTED_MAPS

    def build(x: Inputs):
        attention = torch.compile(linear_attn_reference, dynamic=False) if compiled else linear_attn_reference
        given = {"q_weight": x.q_weight, "k_weight": x.k_weight} if weighted else {}
        return lambda: attention(x.q, x.k, x.v, feature_map=feature_map, **given)

    return Peer(build, "hedgehog" if weighted else "plain", HEDGEHOG if weighted else HEDGEHOG[:3])


def _sdpa(backend: SDPBackend) -> Callable:
    def build(x: Inputs):
        def run():
            with sdpa_kernel(backend):
                q, k, v = (rows.transpose(1, 2) for rows in (x.q, x.k, x.v))  # views: these kernels take any strides
                return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

        return run

    return build


def _flex_sparse(x: Inputs):
    """Build FlexAttention over a fixed random share of the key blocks, the same for all heads."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    blocks = -(-x.q.shape[1] // BLOCK)
    keep = max(1, round((1 - SPARSITY) * blocks))
    order = torch.rand(1, 1, blocks, blocks, device=x.q.device).argsort(-1).to(torch.int32)
    order[..., :keep] = order[..., :keep].sort(-1).values  # in this order the keys stay in the cache
    none, some = (torch.full((1, 1, blocks), n, dtype=torch.int32, device=x.q.device) for n in (0, keep))
    length = (x.q.shape[1], x.q.shape[1])
    mask = BlockMask.from_kv_blocks(none, order, some, order, BLOCK_SIZE=BLOCK, seq_lengths=length)
    attention = torch.compile(flex_attention, dynamic=False)
    return lambda: attention(*x.heads_first, block_mask=mask).transpose(1, 2)


def _fla(x: Inputs):
    from fla.ops.linear_attn import chunk_linear_attn

    return lambda: chunk_linear_attn(x.q, x.k, x.v, normalize=False)[0]


def _flash_bla(x: Inputs):
    from flash_bla.ops.linear_attn.fused import linear_attention

    return lambda: linear_attention(*x.heads_first).transpose(1, 2)


def _sla(x: Inputs):
    from sparse_linear_attention import SparseLinearAttention

    module = SparseLinearAttention(x.q.shape[-1], topk=1 - SPARSITY, use_bf16=x.q.dtype == torch.bfloat16)
    module = module.to(x.q.device)
    return lambda: module(*x.heads_first).transpose(1, 2)


def _flash_attn_2(x: Inputs):
    from flash_attn import flash_attn_func

    return lambda: flash_attn_func(x.q, x.k, x.v)


def _flash_attn_3(x: Inputs):
    from flash_attn_interface import flash_attn_func

    return lambda: _first(flash_attn_func(x.q, x.k, x.v))


def _flash_attn_3_forward(x: Inputs):
    """Build FlashAttention-3 from the wheel fa3-fwd, which has bf16 and no backward."""
    from fa3_fwd_interface import flash_attn_func

    return lambda: _first(flash_attn_func(x.q, x.k, x.v))


def _flash_attn_4(x: Inputs):
    from flash_attn.cute import flash_attn_func

    return lambda: _first(flash_attn_func(x.q, x.k, x.v))


def _sage(x: Inputs):
    from sageattention import sageattn

    return lambda: sageattn(x.q, x.k, x.v, tensor_layout="NHD")


def _first(out):
    return out[0] if isinstance(out, tuple) else out


OURS, WINDOW, EAGER, COMPILED = (
    "linvideo hedgehog",
    "linvideo window, RoPE",
    "eager hedgehog",
    "compiled hedgehog",
)
PEERS = {
    OURS: _ours("hedgehog"),
    "linvideo hedgehog, RoPE": _ours("hedgehog", rope=True),
    "linvideo hedgehog, mix": _ours("hedgehog", mix=True),
    "linvideo hedgehog_joint": _ours("hedgehog_joint"),
    "linvideo elu": _ours("elu"),
    "linvideo relu": _ours("relu"),
    "linvideo softmax map": _ours("softmax"),
    "linvideo identity": _ours("identity"),
    WINDOW: _window(),
    **{f"{WINDOW}, {backend}": _window(backend) for backend in BACKENDS if backend not in ("cpu", "flash")},
    EAGER: _formula("hedgehog", compiled=False),
    COMPILED: _formula("hedgehog", compiled=True),
    "eager elu": _formula("elu", compiled=False),
    "compiled elu": _formula("elu", compiled=True),
    "flash_bla linear_attention (no map)": Peer(_flash_bla, "plain", cuda_only=True, heads_first=True),
    "softmax SDPA flash": Peer(_sdpa(SDPBackend.FLASH_ATTENTION), "softmax"),
    "softmax SDPA cuDNN": Peer(_sdpa(SDPBackend.CUDNN_ATTENTION), "softmax", cuda_only=True),
    "softmax SDPA efficient": Peer(
        _sdpa(SDPBackend.EFFICIENT_ATTENTION), "softmax", cuda_only=True, most_tokens=40_000
    ),
    "softmax flash-attn 2": Peer(_flash_attn_2, "softmax", cuda_only=True),
    "softmax flash-attn 3": Peer(_flash_attn_3, "softmax", cuda_only=True),
    "softmax flash-attn 3 (fa3-fwd, forward)": Peer(_flash_attn_3_forward, "softmax", (), cuda_only=True),
    "softmax flash-attn 4": Peer(_flash_attn_4, "softmax", cuda_only=True),
    "softmax SageAttention (8 bit, forward)": Peer(_sage, "softmax", (), cuda_only=True),
    f"FlexAttention, {SPARSITY:.0%} of blocks left out": Peer(_flex_sparse, "sparse", cuda_only=True, heads_first=True),
    "FlexAttention, the windows alone": Peer(windows.flex, "near", cuda_only=True, heads_first=True),
    f"SLA, {SPARSITY:.0%} of blocks linear": Peer(_sla, "sparse", cuda_only=True, heads_first=True),
    # Comes last because it first tries 159 configurations, which takes minutes.
    "fla chunk_linear_attn (causal, no map)": Peer(_fla, "plain", cuda_only=True),
}


def formulas(name: str) -> tuple[str, str]:
    """Return the eager and the compiled peer that a peer is compared with: those of its map, if there are any."""
    return ("eager elu", "compiled elu") if name.endswith(" elu") else (EAGER, COMPILED)


def is_exact_softmax(name: str) -> bool:
    """Whether the peer is softmax attention over all tokens, without rounding to 8 bits."""
    return name.startswith("softmax") and "8 bit" not in name


def named(words: list[str] | None) -> list[str]:
    """Return the peers whose names contain one of the words; all peers if there are no words."""
    return [name for name in PEERS if not words or any(word.lower() in name.lower() for word in words)]


# The peers in sweeps over the number of tokens; the others are measured only at the shapes of models.
SWEEP = (
    OURS,
    WINDOW,
    "linvideo elu",
    EAGER,
    COMPILED,
    "eager elu",
    "compiled elu",
    "softmax SDPA flash",
    "softmax SDPA cuDNN",
    "softmax flash-attn 3",
    f"FlexAttention, {SPARSITY:.0%} of blocks left out",
    "fla chunk_linear_attn (causal, no map)",
)
