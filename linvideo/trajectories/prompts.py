"""Prompts: captions from a file, with or without images, and their embeddings, which the pipeline's own text encoder
computes once."""

import codecs
import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from linvideo.packaged import packaged
from linvideo.trajectories.atomic_files import read_cached, write_cached
from linvideo.trajectories.conditions import Conditions
from linvideo.trajectories.devices import on_device
from linvideo.trajectories.fingerprint import fingerprint

Item = TypeVar("Item")
LARGEST_FILE = 100_000_000  # bytes, about a million captions


@dataclass
class PromptConfig:
    """The prompts from which the trajectories are sampled.

    Args:
        prompts_file: Text file with one caption per line, in which '#' starts a comment line; or, for image-to-video
            models, a .jsonl file with {"caption": ..., "image": path relative to the file} on each line. None means
            linvideo's own list of captions.
        negative_prompt: Negative prompt, from which guidance pushes away. Use the one that you generate with.
        max_sequence_length: Number of text tokens per prompt. None means 512, or the tokenizer's limit if it is lower.
            Models with image embeddings need 512.
        encode_batch_size: Number of prompts per call of the text encoder.
    """

    prompts_file: str | None = None
    negative_prompt: str = ""
    max_sequence_length: int | None = None
    encode_batch_size: int = 8

    def __post_init__(self):
        if self.max_sequence_length is not None and self.max_sequence_length < 1:
            raise ValueError(f"prompts.max_sequence_length must be at least 1, got {self.max_sequence_length}")
        if self.encode_batch_size < 1:
            raise ValueError(f"prompts.encode_batch_size must be at least 1, got {self.encode_batch_size}")


class Prompt(NamedTuple):
    caption: str
    image: Path | None = None


def read_prompts(path: str | Path | None = None) -> list[str]:
    """Return the captions of a prompts file; see read_prompts_with_images."""
    return [prompt.caption for prompt in read_prompts_with_images(path)]


def read_prompts_with_images(path: str | Path | None = None) -> list[Prompt]:
    """Read the prompts of a text file with one caption per line, or of a .jsonl file with one object per line.

    The object has a "caption", and an "image" if there is one. Empty lines are skipped, and so are lines of a text file
    that start with '#'.

    Raises:
        ValueError: There is no such file, it is not UTF-8 (a byte order mark is skipped), it holds no caption, a line
            is not such an object, or an image is missing.
    """
    source = resources.files("linvideo") / "data" / "captions.txt" if path is None else Path(packaged(str(path)))
    try:
        with source.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)  # a device such as /dev/full never ends
        if len(content) > LARGEST_FILE:
            raise ValueError(f"expected at most {LARGEST_FILE} bytes, got more")
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content:
            raise ValueError("expected UTF-8, got UTF-16 or binary data")
        text = content.decode("utf-8-sig")  # some editors begin a file with a byte order mark
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the prompts file {source}: {error}") from None
    # not splitlines, which also splits at characters that a caption may hold, such as U+2028
    lines = re.split("\r\n|\r|\n", text)
    if source.name.lower().endswith(".jsonl"):
        numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        prompts = [_parse(f"{source}, line {number}", line, source.parent) for number, line in numbered]
    else:
        prompts = [Prompt(line.strip()) for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise ValueError(f"expected one caption per line in the prompts file {source}, got none")
    return prompts


def spread(length: int, count: int) -> list[int]:
    """Return `count` indices that are spread over a list of `length` items; for a shorter list, all of them in turn.

    There is one index from each of `count` equal parts, at a position that differs from part to part: a list of
    captions is often sorted by one word and periodic in another, so that the first captions of all parts would be
    alike.
    """
    if count >= length:
        return [number % length for number in range(count)]
    bounds = [number * length // count for number in range(count + 1)]
    parts = enumerate(zip(bounds, bounds[1:], strict=False))
    return [start + int(number * 0.618 % 1 * (end - start)) for number, (start, end) in parts]


def some_of(items: Sequence[Item], most: int | None) -> list[Item]:
    """Return at most `most` of the items, spread over the list and in its order; None means all of them."""
    return [items[i] for i in spread(len(items), len(items) if most is None else min(most, len(items)))]


def warn_of_unknown_words(tokenizer: Any, captions: Sequence[str]) -> None:
    """Warn about words for which the tokenizer has no tokens, so that the model cannot understand them."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    words = dict.fromkeys(word for caption in captions for word in caption.split())
    if unknown is not None and (missing := [word for word in words if unknown in tokenizer(word).input_ids]):
        shown = ", ".join(map(repr, missing[:5])) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        warnings.warn(f"the model does not know these words of the captions: {shown}", stacklevel=2)


@contextmanager
def unchanged(tokenizer: Any) -> Iterator[None]:
    """Restore the tokenizer's settings at the end of the context.

    A tokenizer of the tokenizers library remembers the padding and truncation of its last call, and saves them. Without
    this, a run that found its embeddings in the cache would export a different pipeline.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    before = None if backend is None else (backend.padding, backend.truncation)
    try:
        yield
    finally:
        if before is not None:
            padding, truncation = before
            backend.no_padding() if padding is None else backend.enable_padding(**padding)
            backend.no_truncation() if truncation is None else backend.enable_truncation(**truncation)


def choose_prompts(
    path: str | Path | None, captions: Sequence[str] | None = None, images: Sequence[Any] | None = None
) -> tuple[list[str], list[Any]]:
    """Return captions and images: those that are given, or else those of the file. A prompt without an image has None.

    Raises:
        ValueError: There are no captions, or their number differs from that of the images; see also
            read_prompts_with_images.
    """
    if captions is None:
        if images is not None:
            raise ValueError(f"expected prompts with the images in memory, got {len(images)} images without prompts")
        captions, images = zip(*read_prompts_with_images(path), strict=True)
    if not captions:
        raise ValueError("expected at least one prompt, got none")
    images = [None] * len(captions) if images is None else list(images)
    if len(images) != len(captions):
        raise ValueError(f"expected an image for each of {len(captions)} prompts, got {len(images)}")
    return list(captions), images


def _parse(place: str, line: str, folder: Path) -> Prompt:
    try:
        prompt = Prompt(**json.loads(line))
        caption, image = prompt.caption.strip(), None if prompt.image is None else folder / prompt.image
        caption.encode()  # refuses "\\ud800", which is valid JSON but not text
    except (ValueError, TypeError, AttributeError, RecursionError):
        expected = '{"caption": text} or {"caption": text, "image": path}'
        raise ValueError(f"{place}: expected {expected}, got {line[:200]}") from None
    if not caption:
        raise ValueError(f"{place}: expected a caption, got an empty text")
    if image is not None and not image.is_file():
        raise ValueError(f"{place}: there is no image {image}")
    return Prompt(caption, image)


class PromptEmbeddings:
    """Embeddings of a list of prompts and of one negative prompt; for image-to-video models, also of the images.

    The attributes latents [P, C, F, H, W] and image_embeds [P, N, D] hold the encoded images (see Conditions), or None.
    Everything stays on the CPU, and only the rows of a batch are moved to a device.

    Args:
        embeds: Embeddings of the prompts [P, L, E]. Wan pads them with zeros: trailing positions that are zero in every
            prompt are not kept in memory or on disk, and `take` adds them again.
        negative: Embedding of the negative prompt [1, L, E].
        length: Number of positions L with the padding; None means that `embeds` has it.
    """

    def __init__(self, embeds: torch.Tensor, negative: torch.Tensor, length: int | None = None):
        if embeds.dim() != 3 or negative.shape != (1, *embeds.shape[1:]):
            raise ValueError(
                "expected embeddings [P, L, E] and a negative one [1, L, E], "
                f"got {list(embeds.shape)} and {list(negative.shape)}"
            )
        self.length = embeds.shape[1] if length is None else length
        used = torch.cat([embeds, negative]).ne(0).any(dim=2).any(dim=0).nonzero()
        keep = int(used[-1]) + 1 if len(used) else 1
        self.latents: torch.Tensor | None = None
        self.image_embeds: torch.Tensor | None = None
        # one tensor with the negative prompt last, so that a batch of both kinds is a single gather
        self.table = torch.cat([embeds[:, :keep], negative[:, :keep]]).cpu().contiguous()

    def __len__(self) -> int:
        """Number of prompts, without the negative one."""
        return len(self.table) - 1

    def take(
        self, indices: torch.Tensor, negative: torch.Tensor | None = None, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """Return embeddings [B, L, E] of the prompts `indices` [B]; the negative one where `negative` [B] is true."""
        indices = indices.cpu() if negative is None else torch.where(negative.cpu(), len(self), indices.cpu())
        embeds = self.table[indices].to(device)
        return torch.nn.functional.pad(embeds, (0, 0, 0, self.length - embeds.shape[1]))

    def conditions(
        self, indices: torch.Tensor, negative: torch.Tensor | None = None, device: torch.device | str = "cpu"
    ) -> Conditions:
        """Return the same with the prompts' images. The negative prompt too gets the image of the prompt `indices`."""
        tables = (self.latents, self.image_embeds)
        images = (None if table is None else table[indices.cpu()].to(device) for table in tables)
        return Conditions(self.take(indices, negative, device), *images)

    def digest(self) -> str:
        """Return a digest that identifies these embeddings in the manifest of a trajectory store."""
        digest = hashlib.blake2b(digest_size=8)
        for table in (self.table, self.latents, self.image_embeds):
            for row in () if table is None else table:
                digest.update(row.float().numpy().tobytes())
        return digest.hexdigest()


def check_length(length: int, model: Any) -> None:
    """Raise ValueError if a transformer with the config `model` does not take `length` text tokens."""
    # the cross-attention treats everything before the last 512 tokens as the image
    if model.image_dim is not None and length != 512:
        raise ValueError(f"max_sequence_length must be 512 for a model with image embeddings, got {length}")


def encode_prompts(
    pipeline,
    prompts: list[str],
    config: PromptConfig | None = None,
    cache: str | Path | None = None,
    device: torch.device | None = None,
) -> PromptEmbeddings:
    """Return the embeddings that `pipeline.encode_prompt` makes.

    They are read from the file `cache` if it holds exactly these, otherwise computed and written there.

    Args:
        device: Device for the text encoder while it works. None leaves it where it is.

    Raises:
        ValueError: There are no prompts, or max_sequence_length does not suit the tokenizer or the model.
    """
    config = config or PromptConfig()
    if not prompts:
        raise ValueError("expected at least one prompt, got none")
    limit = pipeline.tokenizer.model_max_length
    length = min(512, limit) if config.max_sequence_length is None else config.max_sequence_length
    if length > limit:
        raise ValueError(f"max_sequence_length must be at most the tokenizer's {limit}, got {length}")
    check_length(length, pipeline.transformer.config)

    request = repr((prompts, config.negative_prompt, length, fingerprint(pipeline.text_encoder)))
    key = hashlib.blake2b(request.encode(), digest_size=16).hexdigest()
    if cache is not None and (found := read_cached(cache, key)) is not None:
        table = found["table"]
        return PromptEmbeddings(table[:-1], table[-1:], length=length)

    batches = []
    negative = None
    with unchanged(pipeline.tokenizer), on_device(device, pipeline.text_encoder), torch.no_grad():
        warn_of_unknown_words(pipeline.tokenizer, [*prompts, config.negative_prompt])
        for start in range(0, len(prompts), config.encode_batch_size):
            embeds, negatives = pipeline.encode_prompt(
                prompt=prompts[start : start + config.encode_batch_size],
                negative_prompt=config.negative_prompt,
                do_classifier_free_guidance=negative is None,
                max_sequence_length=length,
                device=device,
            )
            batches.append(embeds.cpu())
            negative = negatives[:1].cpu() if negative is None else negative
    result = PromptEmbeddings(torch.cat(batches), negative)
    if cache is not None:
        write_cached(cache, {"table": result.table}, key)
    return result
