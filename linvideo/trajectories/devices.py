"""Whether a device asked for is there, before anything slow starts; and models that go to one for a while."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def check_device(name: str | None) -> None:
    """Raise ValueError, in one line, when PyTorch does not know the device `name` or has none here; None passes."""
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
        raise ValueError(f"device {name!r} asked for, but PyTorch sees no {kind} here")
    if device.type != "cpu" and device.index is not None and device.index >= backend.device_count():
        raise ValueError(f"device {name!r} asked for, but PyTorch sees only {backend.device_count()} {kind}(s) here")


def device_name(device: torch.device | str) -> str:
    """The device in words, for the caption of a measurement."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


@contextmanager
def on_device(device: torch.device | None, *models: torch.nn.Module | None) -> Iterator[None]:
    """The models on `device` meanwhile, and back where they were; nothing moves where one or the device is None."""
    homes = [(model, model.device) for model in models if model is not None and device is not None]
    try:
        for model, _ in homes:
            model.to(device)
        yield
    finally:
        for model, home in homes:
            model.to(home)
