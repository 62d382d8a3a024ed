"""The ranks of a run: how they divide the work and how they agree on decisions.

torchrun starts one process per GPU. The ranks are grouped in two ways, which are independent of each other:

    data     ranks of a group share the tokens of the same samples (context parallelism), each group has other samples
    weights  ranks of a group share one copy of all weights (FSDP2), each group has its own copy (HSDP)

In both, a group consists of neighbouring ranks. Every rank calls the same collectives in the same order, whatever was
drawn at random: each decision that affects them (the step, its objective, whether a loss was finite, whether to stop)
is either computed identically on all ranks or agreed on first.
"""

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

T = TypeVar("T")
# Long, because ranks wait while the first one writes the exported model. When a rank dies, torchrun ends the others.
PATIENCE = timedelta(hours=3)


@dataclass
class ParallelConfig:
    """Division of the work among the processes that torchrun starts. Without torchrun these options have no effect.

    Args:
        shard_degree: Number of ranks that share one copy of the weights, gradients, optimizer state and teacher
            (FSDP2). None means all ranks. A smaller number is HSDP, 1 gives every rank a whole copy (data parallelism).
        ulysses_degree: Number of ranks that share the tokens of a sample by exchanging heads in softmax layers
            (Ulysses). Linear layers exchange their state, whose size doesn't depend on the number of tokens. Window
            layers exchange heads as well, over all ranks that share a sample.
        ring_degree: Number of ranks that share the tokens of a sample by passing keys and values around (ring
            attention), which needs an attention_backend that supports it. The product of ulysses_degree and ring_degree
            is the context-parallel degree; groups of that size work on different samples.
    """

    shard_degree: int | None = None
    ulysses_degree: int = 1
    ring_degree: int = 1

    def __post_init__(self):
        for name in ("shard_degree", "ulysses_degree", "ring_degree"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"parallel.{name} must be at least 1, got {value}")

    @property
    def context_degree(self) -> int:
        return self.ulysses_degree * self.ring_degree

    def check(self, processes: int) -> int:
        """Return the shard degree on this number of processes. Raise ValueError when it doesn't divide them."""
        shard = processes if self.shard_degree is None else self.shard_degree
        for name, degree in (("shard_degree", shard), ("ulysses_degree * ring_degree", self.context_degree)):
            if processes % degree:
                raise ValueError(
                    f"parallel.{name} must divide the number of processes, got {degree} with {processes}"
                    f" process{'' if processes == 1 else 'es'} (torchrun starts the processes)"
                )
        return shard


class Ranks:
    """This process among the processes of the run; by default the only one.

    Args:
        config: Division of the work.
        device: Device of this process.
        rank: Number of this process. Only `connected` sets it.
        size: Number of processes. Only `connected` sets it.

    Attributes:
        context_size: Number of ranks that share a sample.
        data_rank: Number of this rank's group among the groups that share a sample.
        data_size: Number of these groups.
        samples: Device mesh (data, ring, ulysses), None in a run of one process.
        weights: Device mesh (replicate, shard), None in a run of one process.

    Raises:
        ValueError: A degree doesn't divide the number of processes.
    """

    def __init__(self, config: ParallelConfig, device: torch.device, rank: int = 0, size: int = 1):
        self.config, self.device, self.rank, self.size = config, device, rank, size
        shard = config.check(size)
        self.context_size, self.data_size = config.context_degree, self.size // config.context_degree
        self.data_rank = rank // self.context_size
        self.samples: DeviceMesh | None = None
        self.weights: DeviceMesh | None = None
        if self.size > 1:
            shape = (self.data_size, config.ring_degree, config.ulysses_degree)
            self.samples = init_device_mesh(device.type, shape, mesh_dim_names=("data", "ring", "ulysses"))
            shape = (self.size // shard, shard)
            self.weights = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))

    @classmethod
    def connected(cls, config: ParallelConfig, device: torch.device) -> "Ranks":
        """Return the ranks of the processes that `connect` has joined."""
        rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        return cls(config, device, rank, size)

    @classmethod
    def alone(cls, device: torch.device | str = "cpu") -> "Ranks":
        """Return this process by itself, even if others have been joined."""
        return cls(ParallelConfig(), torch.device(device))

    @property
    def first(self) -> bool:
        """Whether this is the first rank, which writes the files and shows progress."""
        return self.rank == 0

    def on_first(self, function: Callable[[], T]) -> T:
        """Call `function` on the first rank only, and return or raise its outcome on all ranks."""
        if self.size == 1:
            return function()
        outcome, original = [None], None
        if self.first:
            try:
                outcome = [(function(), None, "")]
            except Exception as error:  # must reach the others, which would wait forever
                kind = next((kind for kind in (ValueError, OSError) if isinstance(error, kind)), RuntimeError)
                outcome, original = [(None, kind, str(error) or repr(error))], error
        dist.broadcast_object_list(outcome, src=0)
        value, kind, text = outcome[0]
        if kind is not None:
            raise original or kind(text)
        return value

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is true on any rank."""
        return self.size > 1 and bool(self.sum(torch.tensor(float(flag), device=self.device))) or flag

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum over all ranks, without gradient."""
        if self.size > 1:
            x = x.detach().clone()
            dist.all_reduce(x)
        return x

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """Return the mean over all ranks, without gradient."""
        return self.sum(x) / self.size

    def wait(self) -> None:
        """Wait until all ranks have reached this call."""
        self.any(False)

    def micro_batch(self, micro: int, size: int) -> range:
        """Return the positions of this data rank's micro-batch number `micro` in the global batch."""
        start = (micro * self.data_size + self.data_rank) * size
        return range(start, start + size)

    def part(self, count: int) -> tuple[list[int], bool]:
        """Return this data rank's contiguous, near-equal part of range(count), and whether its result counts.

        With more ranks than items, a rank without an item gets ([0], False): it has to run the same collectives, but
        its result doesn't count.
        """
        bounds = [count * rank // self.data_size for rank in (self.data_rank, self.data_rank + 1)]
        return (list(range(*bounds)), True) if bounds[0] < bounds[1] else ([0], False)

    def average_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Average the gradients of parameters that FSDP2 doesn't manage over all ranks, in one collective."""
        whole = [p for p in parameters if p.grad is not None and not isinstance(p, DTensor)]
        if self.size == 1 or not whole:
            return
        flat = torch.cat([p.grad.flatten() for p in whole])
        dist.all_reduce(flat)
        for parameter, mean in zip(whole, flat.div_(self.size).split([p.numel() for p in whole]), strict=True):
            parameter.grad.copy_(mean.view_as(parameter))

    def gather_samples(self, x: torch.Tensor) -> torch.Tensor:
        """Return the x of all data ranks, stacked in their order to [data_size, ...], on the device of x."""
        if self.data_size == 1:
            return x.unsqueeze(0)
        mine = x.to(self.device).contiguous()  # NCCL takes CUDA tensors only
        parts = [torch.empty_like(mine) for _ in range(self.data_size)]
        dist.all_gather(parts, mine, group=self.samples.get_group("data"))
        return torch.stack(parts).to(x.device)

    def gather_objects(self, value: T) -> list[T]:
        """Return the plain values of all ranks, in order of rank."""
        values = [value]
        if self.size > 1:
            values = [None] * self.size
            dist.all_gather_object(values, value)
        return values


def check_divisible(model: Any, latents: tuple[int, int, int, int], parallel: ParallelConfig) -> None:
    """Raise ValueError when context parallelism cannot divide the tokens of `latents` (C, F, H, W) or the heads."""
    tokens = math.prod(size // patch for size, patch in zip(latents[1:], model.patch_size, strict=True))
    if tokens % parallel.context_degree:
        raise ValueError(
            f"parallel.ulysses_degree * ring_degree must divide the {tokens} tokens of a video, got"
            f" {parallel.context_degree}"
        )
    if model.num_attention_heads % parallel.ulysses_degree:
        raise ValueError(
            f"parallel.ulysses_degree must divide the {model.num_attention_heads} heads, got {parallel.ulysses_degree}"
        )


def check_window_heads(heads: int, parallel: ParallelConfig) -> None:
    """Raise ValueError when context parallelism cannot divide the heads of window layers."""
    if heads % parallel.context_degree:
        raise ValueError(
            f"parallel.ulysses_degree * ring_degree must divide the {heads} heads of window layers, got"
            f" {parallel.context_degree}"
        )


def connect(device: str | None = None) -> torch.device:
    """Join the other processes if torchrun has started any, and return this process's device.

    Args:
        device: "cpu" or "cuda". None means CUDA if a GPU is available. Under torchrun each process takes the GPU of its
            local rank.
    """
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return kind
    if kind.type == "cuda":
        kind = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(kind)
    if not dist.is_initialized():
        # gloo is for the plain values that ranks agree on
        backend = "cpu:gloo,cuda:nccl" if kind.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)
    return kind


def disconnect() -> None:
    """Leave the group that `connect` joined, if it did."""
    if dist.is_initialized():
        dist.destroy_process_group()
