"""One side of linear attention, the queries or the keys, as the functions that launch kernels see it."""

import functools
import sys
from typing import NamedTuple

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from linvideo_kernels.linear_attn import configs
from linvideo_kernels.linear_attn.launch import Target, target_of


class Side(NamedTuple):
    u: torch.Tensor  # [B, N, H, D], aligned
    weight: torch.Tensor | None  # [H, WIDTH, WIDTH] in u's dtype
    feature_map: str
    precision: str  # precision of fp32 products: "ieee" or "tf32x3"
    cos: torch.Tensor | None = None  # [N, D/2]
    sin: torch.Tensor | None = None
    keep: torch.Tensor | None = None  # [B, N] int8: 0 leaves a key out
    cu_seqlens: torch.Tensor | None = None  # [sequences + 1] int32; B is 1

    @classmethod
    def of(cls, u, weight, feature_map, precision, rope=None, keep=None, cu_seqlens=None) -> "Side":
        """Make a side from the op's arguments."""
        weight = None if weight is None else operand(weight, u)
        cos, sin = (None, None) if rope is None else (table.contiguous() for table in rope)
        cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
        keep = None if keep is None else keep.to(torch.int8).contiguous()
        return cls(aligned(u), weight, feature_map, precision, cos, sin, keep, cu_seqlens)

    def new_rows(self) -> torch.Tensor:
        """Allocate an output like u. It starts at 0 with packed sequences: no kernel writes rows outside of them."""
        make = torch.empty if self.cu_seqlens is None else torch.zeros
        return make(self.u.shape, dtype=self.u.dtype, device=self.u.device)

    def new_numbers(self, *planes: int) -> torch.Tensor:
        """Allocate fp32 numbers [*planes, B, H, N], one for each row; they start at 0 as in `new_rows`."""
        batch, length, heads, _ = self.u.shape
        make = torch.empty if self.cu_seqlens is None else torch.zeros
        return make((*planes, batch, heads, length), dtype=torch.float32, device=self.u.device)

    def covered(self) -> torch.Tensor | None:
        """Return `keep` without the rows that no packed sequence covers: those before the first or after the last."""
        if self.cu_seqlens is None:
            return self.keep
        rows = torch.arange(self.u.shape[1], dtype=torch.int32, device=self.u.device)
        inside = ((rows >= self.cu_seqlens[0]) & (rows < self.cu_seqlens[-1])).to(torch.int8).unsqueeze(0)
        return inside if self.keep is None else inside * self.keep

    @property
    def signs(self) -> int:
        return configs.signs(self.feature_map)

    @property
    def width(self) -> int:
        return configs.padded(self.u.shape[-1])

    @property
    def sequences(self) -> int:
        return self.u.shape[0] if self.cu_seqlens is None else self.cu_seqlens.numel() - 1

    @property
    def target(self) -> Target:
        return target_of(self.u)

    def tile(self, kernel: str, **more: bool) -> configs.Tile:
        tf32x3 = self.precision == "tf32x3"
        options = _options(self.cos is not None, self.keep is not None, self.cu_seqlens is not None, tf32x3, **more)
        dim, capability = self.u.shape[-1], self.target.capability
        return configs.tile(kernel, dim, self.u.dtype, capability, self.feature_map, options)

    def work(self, tile: configs.Tile, halves: int = 1, partials: bool = False) -> configs.Work:
        batch, length, heads, _ = self.u.shape
        packed = None if self.cu_seqlens is None else self.sequences
        return configs.deal_out(tile, length, batch, packed, heads * halves, self.target.sm_count, partials)


@functools.cache
def _options(rope: bool, key_mask: bool, packed: bool, tf32x3: bool, **more: bool) -> frozenset[str]:
    given = {"rope": rope, "key_mask": key_mask, "packed": packed, "tf32x3": tf32x3} | more
    return frozenset(name for name, there in given.items() if there)


def operand(weight: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Cast the weight [H, D, D] to u's dtype and pad it with zeros to [H, WIDTH, WIDTH], where it is not so already."""
    missing = configs.padded(int(u.shape[-1])) - weight.shape[-1]
    weight = weight.to(u.dtype).contiguous()
    return torch.nn.functional.pad(weight, (0, missing, 0, missing)) if missing else weight


def aligned(x: torch.Tensor) -> torch.Tensor:
    """Return x, or a copy if its last stride is not 1 or a row does not start at a multiple of 8 elements.

    Otherwise every pass would read rows 2 bytes at a time, which costs far more than the copy.
    """
    fits = x.stride(-1) == 1 and not any(stride % 8 for stride in x.stride()[:3]) and x.data_ptr() % 16 == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def strides(name: str, x: torch.Tensor | None) -> dict[str, int]:
    """Return a kernel's arguments stride_<name>b, n and h: the first three strides of x, or 0 if x is None."""
    return dict(zip(_stride_names(name), (0, 0, 0) if x is None else x.stride(), strict=False))


@functools.cache
def _stride_names(name: str) -> tuple[str, ...]:
    return tuple(sys.intern(f"stride_{name}{axis}") for axis in "bnh")  # Python binds interned names faster


def descriptor(x: torch.Tensor, tile: configs.Tile, width: int) -> TensorDescriptor:
    """Return the TMA descriptor that reads tiles of the rows of x [B, N, H, D]."""
    b, n, h, d = x.shape
    sb, sn, sh = _steps(x)
    return TensorDescriptor(x, [b, h, n, d], [sb, sh, sn, 1], [1, 1, tile.block, width])


def expanded(*tensors: torch.Tensor) -> bool:
    """Return whether TMA cannot read one of the tensors: it repeats elements in memory (a stride of 0), or is empty."""
    return any(0 in _steps(x) or not x.numel() for x in tensors)


def _steps(x: torch.Tensor) -> tuple[int, ...]:
    return _steps_of(x.shape, x.stride())


@functools.lru_cache(1024)
def _steps_of(shape: torch.Size, strides: tuple[int, ...]) -> tuple[int, ...]:
    """Return the first three strides. The stride of an axis of one element is arbitrary; make it contiguous."""
    steps, step = [], shape[3]
    for size, stride in zip(reversed(shape[:3]), reversed(strides[:3]), strict=True):
        step = stride if size > 1 else step
        steps.insert(0, step)
        step *= size
    return tuple(steps)
