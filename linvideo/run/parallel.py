"""The ranks of one run: what each of them works on, and how they agree.

torchrun starts one process per GPU. The ranks divide twice, and the two divisions are independent of each other:

    data     neighbouring ranks hold the tokens of the same samples (context parallelism), the groups different samples
    weights  neighbouring ranks hold one copy of all weights between them (FSDP2); the groups hold copies of that (HSDP)

Collectives are called by every rank in the same order whatever was drawn, because all that decides about them (the
step, its objective, whether a loss was finite, whether to stop) is either computed alike or agreed upon first.
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
# a rank that waits while the first one writes the exported model is not stuck; one whose peer died is ended by torchrun
PATIENCE = timedelta(hours=3)


@dataclass
class ParallelConfig:
    """How the processes that torchrun started divide the work. Started by plain python there is one, and this says
    nothing.

    Args:
        shard_degree: ranks that hold one copy of the weights, gradients and optimizer state, and of the teacher,
            between them (FSDP2). None is all ranks; fewer is HSDP; 1 gives every rank a whole copy (data parallel).
        ulysses_degree: ranks that share one sample's tokens by exchanging heads in softmax layers (Ulysses). Linear
            layers exchange their state, whose size does not depend on the number of tokens.
        ring_degree: the same by passing keys and values round (ring attention), which needs an attention_backend that
            can do it. The product of both is the context parallel degree; the other ranks hold other samples.
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
        """The shard degree on so many processes; ValueError when they cannot be divided so."""
        shard = processes if self.shard_degree is None else self.shard_degree
        for name, degree in (("shard_degree", shard), ("ulysses_degree * ring_degree", self.context_degree)):
            if processes % degree:
                raise ValueError(
                    f"parallel.{name} must divide the number of processes, got {degree} with {processes}"
                    f" process{'' if processes == 1 else 'es'}, which torchrun starts"
                )
        return shard


class Ranks:
    """This process among those of the run: by default the only one.

    Args:
        rank, size: from `connected`; not to be given otherwise.

    Attributes:
        context_size: ranks that share a sample. data_rank, data_size: of the groups that do.
        samples: mesh (data, ring, ulysses) and weights: mesh (replicate, shard), both None in a run of one process.

    Raises:
        ValueError: degrees that do not divide the number of processes.
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
        """Of the processes that `connect` has joined."""
        rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        return cls(config, device, rank, size)

    @classmethod
    def alone(cls, device: torch.device | str = "cpu") -> "Ranks":
        """This process by itself, whatever others there are."""
        return cls(ParallelConfig(), torch.device(device))

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes what is written once, and shows progress."""
        return self.rank == 0

    def on_first(self, function: Callable[[], T]) -> T:
        """Call it on the first rank only; what it returns or raises comes back, or is raised, on all."""
        if self.size == 1:
            return function()
        outcome, original = [None], None
        if self.first:
            try:
                outcome = [(function(), None, "")]
            except Exception as error:  # the others would wait for ever
                kind = next((kind for kind in (ValueError, OSError) if isinstance(error, kind)), RuntimeError)
                outcome, original = [(None, kind, str(error) or repr(error))], error
        dist.broadcast_object_list(outcome, src=0)
        value, kind, text = outcome[0]
        if kind is not None:
            raise original or kind(text)
        return value

    def any(self, flag: bool) -> bool:
        """Whether any rank's is true."""
        return self.size > 1 and bool(self.sum(torch.tensor(float(flag), device=self.device))) or flag

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, without gradient."""
        if self.size > 1:
            x = x.detach().clone()
            dist.all_reduce(x)
        return x

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """The mean over all ranks, without gradient."""
        return self.sum(x) / self.size

    def wait(self) -> None:
        """Until all ranks have come here."""
        self.any(False)

    def micro_batch(self, micro: int, size: int) -> range:
        """Where this data rank's micro-batch number `micro` stands in the global batch."""
        start = (micro * self.data_size + self.data_rank) * size
        return range(start, start + size)

    def part(self, count: int) -> tuple[list[int], bool]:
        """This data rank's part of range(count), near-equal and in order. Where there are more ranks than items one
        without any gets ([0], False), so that it runs the same collectives, and its result does not count."""
        bounds = [count * rank // self.data_size for rank in (self.data_rank, self.data_rank + 1)]
        return (list(range(*bounds)), True) if bounds[0] < bounds[1] else ([0], False)

    def average_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """The mean over all ranks of the gradients of parameters that FSDP2 does not manage, in one collective."""
        whole = [p for p in parameters if p.grad is not None and not isinstance(p, DTensor)]
        if self.size == 1 or not whole:
            return
        flat = torch.cat([p.grad.flatten() for p in whole])
        dist.all_reduce(flat)
        for parameter, mean in zip(whole, flat.div_(self.size).split([p.numel() for p in whole]), strict=True):
            parameter.grad.copy_(mean.view_as(parameter))

    def gather_samples(self, x: torch.Tensor) -> torch.Tensor:
        """[data_size, ...] of the data ranks' x, in their order, on x's device."""
        if self.data_size == 1:
            return x.unsqueeze(0)
        mine = x.to(self.device).contiguous()  # NCCL takes CUDA tensors only
        parts = [torch.empty_like(mine) for _ in range(self.data_size)]
        dist.all_gather(parts, mine, group=self.samples.get_group("data"))
        return torch.stack(parts).to(x.device)

    def gather_objects(self, value: T) -> list[T]:
        """Every rank's plain value, in order of rank."""
        values = [value]
        if self.size > 1:
            values = [None] * self.size
            dist.all_gather_object(values, value)
        return values


def check_divisible(model: Any, latents: tuple[int, int, int, int], parallel: ParallelConfig) -> None:
    """Raise ValueError when context parallelism cannot divide the tokens of `latents` (C, F, H, W), or the heads."""
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


def connect(device: str | None = None) -> torch.device:
    """Join the processes torchrun has started, if it has; returns this process's device.

    device: "cpu" or "cuda"; None is CUDA when there is a GPU. Under torchrun each process takes the GPU of its local
    rank.
    """
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return kind
    if kind.type == "cuda":
        kind = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(kind)
    if not dist.is_initialized():
        # gloo carries the plain values that ranks agree on
        backend = "cpu:gloo,cuda:nccl" if kind.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)
    return kind


def disconnect() -> None:
    """Leave the group that `connect` joined, if it did."""
    if dist.is_initialized():
        dist.destroy_process_group()
