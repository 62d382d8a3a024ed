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
_DTYPE = "dtype" if Version(diffusers.__version__) >= Version("0.40.0") else "torch_dtype"  # as diffusers calls it
ONLY_WAN = (
    "training knows Wan's rectified flow only, other families just convert (CogVideoX, for one, predicts v of a DDPM)"
)


def wan_dtypes(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """dtype for `load_pipeline`: all in `dtype` but Wan's VAE and image encoder, which are published in fp32."""
    return {"default": dtype, "vae": torch.float32, "image_encoder": torch.float32}


def load_pipeline(path_or_repo: str | os.PathLike, **kwargs) -> DiffusionPipeline:
    """Load a diffusers pipeline, converted or stock, from a local folder or a Hugging Face Hub repository.

    Args:
        path_or_repo: a folder with model_index.json, a repository id "owner/name", or a folder of the package; see
            `linvideo.packaged.packaged`.
        kwargs: passed to `DiffusionPipeline.from_pretrained`, for instance `dtype`, which diffusers below 0.40 calls
            `torch_dtype`; either name does with every version.

    Files from others are data: weights come from safetensors only, and code in the folder is run only with
    trust_remote_code=True.

    Raises:
        ValueError: no pipeline is there, a part of it is missing or damaged, use_safetensors=False was asked for, a
            model is given that the pipeline has no part for, or the folder is a converted one that names the stock
            class for its transformer.
    """
    if not kwargs.pop("use_safetensors", True):
        raise ValueError("weights are read from safetensors only, got use_safetensors=False")
    if "dtype" in kwargs and "torch_dtype" in kwargs:
        raise ValueError("expected dtype or torch_dtype, two names for the same, got both")
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
        # diffusers trusts what it reads: a damaged model_index.json surfaces as any of these
        clear = isinstance(error, OSError | SafetensorError | ValueError) and str(error).strip()
        reason = str(error).strip().splitlines()[0] if clear else repr(error)
        raise ValueError(f"cannot load a pipeline from {location}: {reason}") from error
    for name, component in pipeline.components.items():
        # a stock class keeps config keys that it does not know
        if type(component) in FAMILIES and "attention_types" in component.config:
            raise ValueError(
                f"{location}: {name} has linear attention layers, but {_INDEX} names {type(component).__name__} for it;"
                f' expected ["linvideo", "{FAMILIES[type(component)].__name__}"]'
            )
    return pipeline


def _pipeline_class(location: str, kwargs: dict) -> type[DiffusionPipeline]:
    """The class that the folder names, where diffusers has it: `DiffusionPipeline.from_pretrained` itself ignores what
    it is given for a part that is optional in that class, such as Wan's transformer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers still passes the Hub's client an argument that it has given up
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
    """Save a pipeline so that `folder` is only ever absent, the old one, or complete.

    It is written to a temporary folder next to the target, read back, and then renamed. With `overwrite` the old
    pipeline is moved away just before that rename, and deleted after it; what a kill in between has moved away is put
    back by the next call.

    Args:
        folder: the target; it may exist if it is empty.
        overwrite: replace a pipeline that is there, but for a README.md that linvideo has not written.
        training: what the model card, README.md, is to say of how the model was made; see linvideo.models.card.
        settings: what its videos are to be made with by default: height, width, num_frames, num_inference_steps,
            guidance_scale, fps, any of them. None is what the folder has said that the pipeline was loaded from.

    Raises:
        ValueError: the target is a file, a folder with content and overwrite is False, or one with content that is no
            pipeline (never replaced). Or a model that no folder could give back: with LoRA adapters (fuse and unload
            them first), with weights that are not in memory (offloaded to disk, in shards) or not finite, or with
            layers of other names than its config makes. Nothing is changed then.
        OSError: what is read back is not what was written. Nothing is changed then.
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
    """An empty temporary folder next to `target` to write into; on a clean exit it becomes `target`.

    What stood there is moved away just before and deleted just after; if the move fails it is put back. An exception
    inside leaves the target as it was and nothing else behind. What a kill leaves is put right by
    `workspace.remove_dead(target.parent)`, which belongs before the caller looks at the target.

    Raises:
        ValueError: with overwrite False, content has come to the target meanwhile. It stays.
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
            raise ValueError(f"{target} has been written meanwhile, by another process; choose another folder")
        else:
            os.rename(new, target)  # fails on a folder with content


def _sync(folder: Path) -> None:
    """Wait until the files are on the disk: else the name could outlive a power cut without the content."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def wan_transformer(pipeline: DiffusionPipeline, component: str = "transformer") -> WanTransformer3DModel:
    """The pipeline's transformer, stock or converted; of Wan 2.2's two, `component` names one. Of one that
    torch.compile has wrapped, the model inside.

    Raises:
        ValueError: it has none, or another family's.
    """
    transformer = unwrap_module(getattr(pipeline, component, None))
    if not isinstance(transformer, WanTransformer3DModel):
        raise ValueError(
            f"expected a pipeline with a Wan transformer, got {type(pipeline).__name__} with"
            f" {type(transformer).__name__}; {ONLY_WAN}"
        )
    return transformer
