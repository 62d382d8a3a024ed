"""Checks that a saved pipeline will load again with the same weights.

A pipeline that could not is refused before anything is written. What was written is read back before it replaces an
existing folder.
"""

import json
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils.torch_utils import unwrap_module
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor

_CHUNK = 1 << 24  # number of values checked at a time


def check_saveable(pipeline: DiffusionPipeline) -> None:
    """Raise ValueError for a model whose weights are not all in memory, or not under the names that loading expects."""
    for name, model in _models(pipeline).items():
        if any(type(module).__module__.startswith("peft.") for module in model.modules()):
            raise ValueError(
                f"{name} has LoRA adapters, which a pipeline folder cannot hold: fuse and unload them first, with"
                " pipeline.fuse_lora() and pipeline.unload_lora_weights()"
            )
        if any(_is_on_disk(module) for module in model.modules()):
            raise ValueError(f"{name} is under group offload to disk: save the pipeline before enabling it")
        tensors = [tensor for tensor in model.state_dict().values() if isinstance(tensor, torch.Tensor)]
        if any(tensor.is_meta for tensor in tensors):
            raise ValueError(f"{name} has weights that are not in memory: save the pipeline before enabling offloading")
        if any(isinstance(tensor, DTensor) for tensor in tensors):
            raise ValueError(f"{name} is sharded: gather its weights before saving")


def check_saved(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Compare the folder with the pipeline, with one tensor in memory at a time.

    Raises:
        ValueError: A part is missing, loading would lack a weight, or a value is not finite.
        OSError: A weight differs from what was written.
    """
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    for name, part in pipeline.components.items():
        if part is not None and index.get(name, [None])[0] is None:
            raise ValueError(
                f"diffusers has not saved {name}, a {type(part).__name__}: it cannot save that class, or {name} was"
                f" None when the pipeline was made; in that case call pipeline.register_modules({name}=pipeline.{name})"
            )
    for name, model in _models(pipeline).items():
        try:
            saved = _compare(model, folder / name)
        except SafetensorError as error:
            raise OSError(f"{folder / name} was damaged while it was written: {error}") from error
        if getattr(model, "hf_quantizer", None) is not None:
            continue  # quantized weights have other names
        if isinstance(model, ModelMixin):
            for key, shape in _needed(model, folder / name).items():
                if saved.get(key) != shape:
                    raise ValueError(
                        f"{name} cannot be saved like this: loading expects {key} {list(shape)}, the model has"
                        f" {list(saved[key]) if key in saved else 'none'}; undo what has changed its layers, such as"
                        " torch.compile around a block"
                    )
        # transformers renames weights and drops tied ones, so only their total size can be compared
        elif sum(shape.numel() for shape in saved.values()) != _size(model):
            raise OSError(f"{folder / name} does not hold all weights of {name}")


def _models(pipeline: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    parts = {name: unwrap_module(part) for name, part in pipeline.components.items()}
    return {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}


def _is_on_disk(module: torch.nn.Module) -> bool:
    registry = getattr(module, "_diffusers_hook", None)
    hook = None if registry is None else registry.get_hook("group_offloading")
    return hook is not None and hook.group.offload_to_disk_path is not None


def _compare(model: torch.nn.Module, folder: Path) -> dict[str, torch.Size]:
    """Check all values in the folder, and return the shape of each tensor in it."""
    held, shapes = model.state_dict(), {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(key)
                shapes[key] = tensor.shape
                if not _is_finite(tensor):
                    raise ValueError(f"{folder.name} has values in {key} that are not finite: nothing was saved")
                if isinstance(held.get(key), torch.Tensor) and not _same(tensor, held[key]):
                    raise OSError(f"{path} does not hold {key} as it was written")
    return shapes


def _is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    chunks = tensor.flatten().split(_CHUNK)
    return all(bool(torch.isfinite(chunk.float() if chunk.itemsize == 1 else chunk).all()) for chunk in chunks)


def _same(saved: torch.Tensor, held: torch.Tensor) -> bool:
    """Return whether two tensors are equal bit for bit."""
    if (saved.shape, saved.dtype) != (held.shape, held.dtype):
        return False
    bits = (tensor.detach().cpu().contiguous().flatten().view(torch.uint8) for tensor in (saved, held))
    return torch.equal(*bits)


def _needed(model: ModelMixin, folder: Path) -> dict[str, torch.Size]:
    """Return the names and shapes of the weights that `from_pretrained(folder)` will expect."""
    with torch.random.fork_rng(devices=[]), init_empty_weights():
        fresh = type(model).from_config(type(model).load_config(folder))
    return {key: tensor.shape for key, tensor in fresh.state_dict().items()}


def _size(model: torch.nn.Module) -> int:
    """Return the number of values in a model's weights, counting tied weights once."""
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    tensors = [tensor for key, tensor in model.state_dict().items() if key not in ignored]
    return sum({(tensor.data_ptr(), tensor.shape): tensor.numel() for tensor in tensors}.values())
