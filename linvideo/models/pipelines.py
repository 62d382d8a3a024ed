"""Loading and saving whole pipelines as ordinary diffusers folders."""

import contextlib
import inspect
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, WanTransformer3DModel
from diffusers.utils.torch_utils import unwrap_module
from packaging.version import Version
from safetensors import SafetensorError

from linvideo import _diffusers_hook
from linvideo.models.attention import FAMILIES
from linvideo.models.card import Training, write_card
from linvideo.models.read_back import check_saveable, check_saved
from linvideo.models.sampling_settings import write_settings
from linvideo.packaged import packaged
from linvideo.workspace import move_into_place, remove_dead, use_umask, workspace

_INDEX = "model_index.json"
_DTYPE = "dtype" if Version(diffusers.__version__) >= Version("0.40.0") else "torch_dtype"  # diffusers' name for it
ONLY_WAN = (
    "training knows Wan's rectified flow only, other families just convert (CogVideoX, for one, predicts v of a DDPM)"
)


def wan_dtypes(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return `dtype` for `load_pipeline`: all in `dtype`, except Wan's VAE and image encoder, published in fp32."""
    return {"default": dtype, "vae": torch.float32, "image_encoder": torch.float32}


def load_pipeline(path_or_repo: str | os.PathLike, **kwargs) -> DiffusionPipeline:
    """Load a diffusers pipeline, converted or stock, from a local folder or a Hugging Face Hub repository.

    Files from others are treated as data: weights are read from safetensors only, and code in the folder is run only
    with trust_remote_code=True.

    Args:
        path_or_repo: Folder with model_index.json, repository id "owner/name", or folder of the installed package (see
            `linvideo.packaged.packaged`).
        kwargs: Arguments for `DiffusionPipeline.from_pretrained`, for instance `dtype`, which diffusers before 0.40
            calls `torch_dtype`; here both names work with every version.

    Returns:
        A pipeline of the class that the folder names.

    Raises:
        ValueError: There is no pipeline; a part is missing or damaged; use_safetensors=False is given; a model is given
            for a part that the pipeline does not have; or the folder holds a converted model but names the stock class
            for its transformer.
    """
    if not kwargs.pop("use_safetensors", True):
        raise ValueError("expected use_safetensors=True, since weights are read from safetensors only, got False")
    if "dtype" in kwargs and "torch_dtype" in kwargs:
        raise ValueError("expected dtype or torch_dtype, two names of one argument, got both")
    kwargs = {_DTYPE if name in ("dtype", "torch_dtype") else name: value for name, value in kwargs.items()}
    if not isinstance(path_or_repo, str | os.PathLike):
        raise ValueError(f"expected a path or a repository id, got {path_or_repo!r}")
    location = packaged(os.fspath(path_or_repo))
    if os.path.exists(location) and not os.path.isfile(os.path.join(location, _INDEX)):
        raise ValueError(f"expected a pipeline folder with {_INDEX}, got {location} without one")
    if not os.path.exists(location) and (location.count("/") != 1 or location.startswith((".", "/", "~"))):
        raise ValueError(f'expected a pipeline folder or a repository id "owner/name", got {location!r}')

    _diffusers_hook.install()
    try:
        kind = _pipeline_class(location, kwargs)
        pipeline = kind.from_pretrained(location, use_safetensors=True, **kwargs)
    except (OSError, SafetensorError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        # diffusers does not check what it reads, and a damaged model_index.json can raise any of these
        clear = isinstance(error, OSError | SafetensorError | ValueError) and str(error).strip()
        reason = str(error).strip().splitlines()[0] if clear else repr(error)
        raise ValueError(f"cannot load a pipeline from {location}: {reason}") from error
    for name, component in pipeline.components.items():
        # a stock class keeps unknown config keys
        if type(component) in FAMILIES and "attention_types" in component.config:
            raise ValueError(
                f"{location}: {name} has linear attention layers, but {_INDEX} names {type(component).__name__} for it;"
                f' expected ["linvideo", "{FAMILIES[type(component)].__name__}"]'
            )
    return pipeline


def _pipeline_class(location: str, kwargs: dict) -> type[DiffusionPipeline]:
    """Return the class that the folder names, if diffusers has it, else DiffusionPipeline.

    `DiffusionPipeline.from_pretrained` ignores models that are passed for parts that are optional in the class, such as
    Wan's transformer; the class itself does not.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers still passes an argument that the Hub's client has deprecated
        name = DiffusionPipeline.load_config(location, **kwargs)["_class_name"]
    kind = getattr(diffusers, name, None) if isinstance(name, str) and "custom_pipeline" not in kwargs else None
    if not isinstance(kind, type) or not issubclass(kind, DiffusionPipeline):
        return DiffusionPipeline
    parts = inspect.signature(kind.__init__).parameters
    if unknown := [part for part, model in kwargs.items() if isinstance(model, torch.nn.Module) and part not in parts]:
        raise ValueError(f"{name} has no part {' and no part '.join(unknown)}")
    return kind


def save_pipeline(
    pipeline: DiffusionPipeline,
    folder: str | os.PathLike,
    overwrite: bool = False,
    training: Training | None = None,
    settings: dict[str, Any] | None = None,
) -> None:
    """Save a pipeline as a diffusers folder, which is at any moment absent, the old pipeline or the complete new one.

    The pipeline is written to a temporary folder next to the target, read back, and then renamed. With `overwrite`, the
    old pipeline is moved away just before the rename and deleted after it. If the process is killed in between, the
    next call puts it back.

    Args:
        pipeline: Pipeline to save, converted or stock.
        folder: Target folder. It may exist if it is empty.
        overwrite: Whether to replace an existing pipeline. Its README.md is kept unless linvideo has written it.
        training: Description of how the model was made, for the model card README.md; see linvideo.models.card.
        settings: Default settings for making videos with it, any of height, width, num_frames, num_inference_steps,
            guidance_scale and fps. None keeps the settings of the folder that the pipeline was loaded from.

    Raises:
        ValueError: The target is a file, a folder with content (unless `overwrite`), or a folder with content other
            than a pipeline, which is never replaced. Or the model cannot be loaded again: it has LoRA adapters (fuse
            and unload them first), weights that are not in memory (offloaded to disk, sharded) or not finite, or layers
            whose names differ from those of its config. Nothing is changed then.
        OSError: What was read back is not what was written. Nothing is changed then.
    """
    check_saveable(pipeline)
    target = Path(folder).resolve()
    remove_dead(target.parent)
    if target.exists() and not target.is_dir():
        raise ValueError(f"expected a folder to save to, got the file {folder}")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise ValueError(f"{folder} exists and is not empty; choose another folder or pass overwrite=True")
        if not (target / _INDEX).is_file():
            raise ValueError(f"refusing to overwrite {folder}: it has content but no {_INDEX}, so it is no pipeline")

    with new_folder(target, overwrite) as folder:
        pipeline.save_pretrained(folder, safe_serialization=True)
        check_saved(pipeline, folder)
        write_settings(pipeline, folder, settings)
        write_card(pipeline, folder, training, kept=target)


@contextlib.contextmanager
def new_folder(target: str | os.PathLike, overwrite: bool = True) -> Iterator[Path]:
    """Yield an empty temporary folder next to `target` to write into; on a clean exit it becomes `target`.

    An existing target is moved away just before that and deleted just after; if the move fails it is put back. After an
    exception inside, the target is unchanged and nothing else is left behind. What a killed process leaves is cleaned
    up by `workspace.remove_dead(target.parent)`, which callers should call before they look at the target.

    Raises:
        ValueError: `overwrite` is False and another process has written to the target meanwhile. It is not changed.
    """
    target = Path(target).resolve()
    with workspace(target) as space:
        new = space / "new"
        new.mkdir()
        yield new
        use_umask(new)
        _sync(new)
        if overwrite:
            move_into_place(new, target, space)
        elif target.is_dir() and any(target.iterdir()):
            raise ValueError(f"{target} has been written meanwhile by another process; choose another folder")
        else:
            os.rename(new, target)  # fails if the target has content


def _sync(folder: Path) -> None:
    """Wait until the files are on disk; otherwise the name could survive a power cut without the content."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def wan_transformer(pipeline: DiffusionPipeline, component: str = "transformer") -> WanTransformer3DModel:
    """Return the pipeline's Wan transformer, stock or converted.

    For a transformer that torch.compile has wrapped, this is the model inside.

    Args:
        pipeline: Pipeline with the transformer.
        component: Name of the component, "transformer" or, for the second expert of Wan 2.2, "transformer_2".

    Raises:
        ValueError: The pipeline has no such transformer, or it is not Wan's.
    """
    transformer = unwrap_module(getattr(pipeline, component, None))
    if not isinstance(transformer, WanTransformer3DModel):
        raise ValueError(
            f"expected a pipeline with a Wan transformer, got {type(pipeline).__name__} with"
            f" {type(transformer).__name__}; {ONLY_WAN}"
        )
    return transformer
