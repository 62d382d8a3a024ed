"""The model card (README.md) of a saved model. It states only what is known, so it never contains invented figures."""

import inspect
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils.torch_utils import unwrap_module
from huggingface_hub import ModelCardData

from linvideo.models.attention import is_converted, video_transformers
from linvideo.models.describe import describe
from linvideo.models.few_step import FewStepScheduler

CARD = "README.md"
MARK = (
    "<!-- Written by linvideo and replaced when this is saved again. Delete this line to keep a text of your own. -->"
)
TRAINING = "## Training"
WINDOWS = (
    "In window layers, a token attends with softmax to the latent frames near it and with linear attention to all"
    " other frames, under one normaliser."
)
NAMES = {"psnr": "PSNR, dB", "ssim": "SSIM", "flicker": "flicker", "teacher_flicker": "flicker of the base model"}
NAMES |= {"lpips": "LPIPS"}


@dataclass(frozen=True)
class Training:
    """How a model was made, which cannot be read from its weights.

    Args:
        method: Name of the method, for instance "selective transfer".
        steps: Number of optimizer steps in each stage.
        settings: Settings to list, {name: value}. Those that are None are left out.
        validation: Last row of validation.jsonl, with step, stage and metrics.
        earlier: Folder of the model that training started from, if it differs from the pipeline's own. The training
            history in its card is repeated in this one.
        untrained: Text to use if there are no steps.
    """

    method: str
    steps: dict[str, int] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    validation: dict[str, Any] | None = None
    earlier: str | os.PathLike | None = None
    untrained: str = "no training, its new layers are **untrained**"

    def __str__(self) -> str:
        stages = ", ".join(f"{stage} {count}" for stage, count in self.steps.items() if count)
        said = [f"{name} {value}" for name, value in self.settings.items() if value is not None]
        done = f"optimizer steps: {stages}" if stages else self.untrained
        return "; ".join([f"{self.method}: {done}", *said])


def write_card(
    model: DiffusionPipeline | ModelMixin,
    folder: str | os.PathLike,
    training: Training | None = None,
    kept: str | os.PathLike | None = None,
) -> None:
    """Write README.md into the folder of a saved pipeline or transformer; a stock model gets no card.

    Args:
        model: Pipeline or transformer.
        folder: Folder to write to.
        training: Description of how the model was made. None if that is not known: the card then repeats the card of
            the folder that the model was loaded from, or says that it is not known.
        kept: Folder with an existing README.md, which is copied instead if linvideo has not written it.
    """
    text = None if kept is None else _read(kept)
    if text is not None and MARK not in text:
        (Path(folder) / CARD).write_text(text, encoding="utf-8")
    elif training is not None or _is_ours(model):
        (Path(folder) / CARD).write_text(card(model, training), encoding="utf-8")


def card(model: DiffusionPipeline | ModelMixin, training: Training | None = None) -> str:
    """Return the text of a pipeline's or transformer's card; see `write_card`."""
    base = _base_model(model)
    inputs = inspect.signature(model.__call__).parameters if isinstance(model, DiffusionPipeline) else ()
    data = ModelCardData(
        base_model=base,
        library_name="diffusers",
        pipeline_tag="image-to-video" if "image" in inputs else "text-to-video",
        tags=["linvideo", "linear-attention"],
    )
    name = type(model).__name__ if base is None else base.split("/")[1]
    of = "" if base is None else f" [{base}](https://huggingface.co/{base})"
    sections = [
        f"---\n{data.to_yaml()}\n---\n{MARK}",
        f"# {name} with linear attention",
        f"A video model{of and ' made from' + of} in which self-attention layers are linear in the number of tokens. It"
        " was made with linvideo, an open implementation of LinVideo"
        " ([arXiv 2510.08318](https://arxiv.org/abs/2510.08318)).",
        "## Layers",
        *([WINDOWS] if any(describe(part).layers_window for part in _transformers(model).values()) else []),
        *(f"```\n{part}: {describe(transformer)}\n```" for part, transformer in _transformers(model).items()),
        TRAINING,
        "\n".join(f"- {line}" for line in _history(model, training))
        or "It is not recorded how this model was trained.",
    ]
    if training is not None and training.validation is not None:
        sections += ["## Metrics", _metrics(training.validation)]
    return "\n\n".join([*sections, "## Use", f"```python\n{_usage(model)}\n```"]) + "\n"


def _is_ours(model: DiffusionPipeline | ModelMixin) -> bool:
    parts = [*_transformers(model).values()] if isinstance(model, DiffusionPipeline) else [model]
    few_steps = isinstance(getattr(model, "scheduler", None), FewStepScheduler)
    return few_steps or any(map(is_converted, parts))


def _transformers(model: DiffusionPipeline | ModelMixin) -> dict[str, ModelMixin]:
    if not isinstance(model, DiffusionPipeline):
        return {"transformer": model}
    try:
        return video_transformers(model)
    except ValueError:  # other pipelines may be saved, too
        return {}


def _history(model: DiffusionPipeline | ModelMixin, training: Training | None) -> list[str]:
    """Return lines on what was done to the model, in the order in which it was done."""
    folders = [_folder(model), training and training.earlier]
    lines = []
    for text in (_read(folder) for folder in folders if folder is not None):
        if text is not None and MARK in text and TRAINING in text:
            section = text.split(TRAINING)[1].split("\n#")[0]
            lines += [line[2:] for line in section.splitlines() if line.startswith("- ")]
    return [*dict.fromkeys(map(_plain, lines)), *([] if training is None else [_plain(str(training))])]


def _plain(text: str) -> str:
    """Escape text to one line of Markdown without HTML, links, images, headings or code, whoever wrote it.

    Bold text is kept. Escaping a line again does not change it.
    """
    printable = "".join(letter if letter.isprintable() else " " for letter in text)
    return re.sub(r"\\*([<>\[\]`#|~])", r"\\\1", printable)


def _metrics(row: dict[str, Any]) -> str:
    where = f"after step {row['stage_step']} of {row['stage']}" if {"stage", "stage_step"} <= set(row) else "at the end"
    rows = [f"| {name} | {row[key]:.4g} |" for key, name in NAMES.items() if key in row]
    said = f"Validation {where}: means over videos, compared with the base model's videos from the same noise."
    return "\n".join([said, "", "| | |", "|---|---|", *rows])


def _usage(model: DiffusionPipeline | ModelMixin) -> str:
    if not isinstance(model, DiffusionPipeline):
        name = type(model).__name__
        return f'import linvideo\n\ntransformer = linvideo.{name}.from_pretrained("folder or repository")'
    name, scheduler = type(model).__name__, model.scheduler
    lines = ["import linvideo  # lets diffusers load linear layers", f"from diffusers import {name}", ""]
    lines += [f'pipe = {name}.from_pretrained("folder or repository")']
    if isinstance(scheduler, FewStepScheduler):  # the guidance is in the weights
        lines += [f'video = pipe("a prompt", num_inference_steps={scheduler.num_steps}, guidance_scale=1.0).frames[0]']
    return "\n".join(lines)


def _base_model(model: DiffusionPipeline | ModelMixin) -> str | None:
    """Return the Hub id of the base model, from linvideo's card in the model's folder or from the download path."""
    folder = _folder(model)
    text = None if folder is None else _read(folder)
    if text is not None and MARK in text:
        found = re.search(r"^base_model: ([\w.-]+/[\w.-]+)$", text.split(MARK)[0], re.MULTILINE)
        return found and found[1]
    parts = model.components.values() if isinstance(model, DiffusionPipeline) else [model]
    parts = [part for part in map(unwrap_module, parts) if isinstance(part, ModelMixin)]
    paths = [_path(part) for part in sorted(parts, key=lambda part: not is_converted(part))]
    # only a path in the Hub's cache is taken as a repository's name, since "a/b" may also be a folder
    found = (re.search(r"models--([\w.-]+?)--([\w.-]+)[/\\]snapshots[/\\]", path) for path in paths)
    return next((f"{match[1]}/{match[2]}" for match in found if match), None)


def _folder(model: DiffusionPipeline | ModelMixin) -> Path | None:
    """Return the local folder that the model was loaded from, if there is one."""
    path = _path(model)
    return Path(path) if path and os.path.isdir(path) else None


def _path(part: Any) -> str:
    return str(getattr(getattr(part, "config", None), "_name_or_path", None) or "")


def _read(folder: str | os.PathLike) -> str | None:
    try:
        return (Path(folder) / CARD).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
