"""Checks that a requested device exists, before anything slow starts; its name and memory; models moved for a while."""

import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def check_device(name: str | None) -> None:
    """Raise ValueError if PyTorch does not know the device `name`, or this machine does not have it. None passes."""
    if name is None:
        return
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    backend = getattr(torch, device.type, None) if device else None
    if not hasattr(backend, "is_available"):
        raise ValueError(f"device must be a torch device such as cpu or cuda, got {name!r}")
    kind = "GPU" if device.type == "cuda" else f"{device.type} device"
    if not backend.is_available():
        raise ValueError(f"device {name!r} was requested, but PyTorch sees no {kind} here")
    if device.type != "cpu" and device.index is not None and device.index >= backend.device_count():
        count = backend.device_count()
        raise ValueError(f"device {name!r} was requested, but PyTorch sees only {count} {kind}{'s' * (count > 1)} here")


def device_name(device: torch.device | str) -> str:
    """Return the device in words, for the caption of a measurement."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


def peak_memory(device: torch.device | str) -> int | None:
    """Return the peak memory in bytes: on a GPU, of tensors since the last reset of its statistics; elsewhere, of this
    process since its start, or None if the system does not tell."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else 1024 * used


@contextmanager
def on_device(device: torch.device | None, *models: torch.nn.Module | None) -> Iterator[None]:
    """Move the models to `device` for the duration of the context, and back afterwards.

    A model that is None is skipped; with a device of None nothing moves.
    """
    homes = [(model, model.device) for model in models if model is not None and device is not None]
    try:
        for model, _ in homes:
            model.to(device)
        yield
    finally:
        for model, home in homes:
            model.to(home)
