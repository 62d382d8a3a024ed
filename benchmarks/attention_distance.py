"""Measure how far softmax attention reaches: `python -m benchmarks.attention_distance [MODEL] [--captions TEXT ...]`.

For each layer it prints which share of the attention weight falls on keys in the query's own latent frame and in frames
at most 1, 2, ... away, and the effective number of keys of a query, exp(entropy). A layer whose weight falls near needs
little of its linear part as a window layer; a layer that attends uniformly is cheap to make linear. The first row is
attention that is uniform over the video.

MODEL is a Wan pipeline with one transformer. It makes one video for each caption, in bf16 on a GPU if there is one;
every forward counts equally, those of guidance's negative prompt too.
"""

import argparse

import torch
from diffusers import WanTransformer3DModel

from benchmarks.tables import table_line
from linvideo.demo.teacher import FOLDER
from linvideo.demo.world import WORLDS
from linvideo.models import convert, generate_video, load_pipeline, sampling_settings
from linvideo.ops.reference import rotate
from linvideo.transfer.warmup import softmax_with_hooks

QUERIES = 64  # evenly spaced queries of each sample
HEADINGS = ("layer", "own frame", "±1 frame", "±2 frames", "±1, least and most local head", "keys")


def by_distance(
    q: torch.Tensor, k: torch.Tensor, frame_tokens: int, queries: int = QUERIES
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the attention weight per distance in frames, and the effective number of keys.

    Args:
        q, k: Rotated queries and keys [B, N, H, D] of the video's tokens.
        frame_tokens: Number of tokens per latent frame.
        queries: Number of evenly spaced queries of each sample to average over.

    Returns:
        [H, F], of which [:, d] is the mean weight on keys d frames away, and [H], the mean of exp(entropy).
    """
    tokens = q.shape[1]
    rows = torch.linspace(0, tokens - 1, min(queries, tokens), device=q.device).round().long()
    frames = torch.arange(tokens, device=q.device) // frame_tokens
    distance = (frames[rows, None] - frames).abs()  # [queries, N]
    weights, keys = [], []
    for head in range(q.shape[2]):  # one head at a time, to hold few rows of N weights
        logits = q[:, rows, head].float() @ k[:, :, head].float().mT / q.shape[-1] ** 0.5
        attention = logits.softmax(-1)
        keys.append(torch.special.entr(attention).sum(-1).exp().mean())
        sums = attention.new_zeros(*attention.shape[:2], tokens // frame_tokens)
        weights.append(sums.scatter_add_(-1, distance.expand_as(attention), attention).mean((0, 1)))
    return torch.stack(weights), torch.stack(keys)


def measure(pipeline, captions: list[str], **settings) -> tuple[dict[int, tuple], tuple]:
    """Return {layer: result of `by_distance`} over the sampling of videos, and that of uniform attention.

    Args:
        pipeline: Stock Wan pipeline with one transformer.
        captions: Captions of the videos.
        settings: Arguments of `linvideo.generate_video`.

    Raises:
        ValueError: The pipeline is of another kind.
    """
    stock = pipeline.transformer
    parts = [part for part in (stock, getattr(pipeline, "transformer_2", None)) if part is not None]
    if [type(part) for part in parts] != [WanTransformer3DModel]:
        names = " and ".join(type(part).__name__ for part in parts)
        raise ValueError(f"expected a stock pipeline with one WanTransformer3DModel, got one with {names}")
    found: dict[int, list] = {}
    uniform = []

    def see(layer: int):
        def function(branch, rows, options, softmax_out):
            q, k = rows[:2]
            if (rope := options["rope"]) is not None:
                q, k = rotate(q, *rope), rotate(k, *rope)
            found.setdefault(layer, []).append(by_distance(q, k, options["frame_tokens"]))
            if not uniform:
                uniform.append(by_distance(torch.zeros_like(q), k, options["frame_tokens"]))

        return function

    pipeline.transformer = convert(stock, mode="window", copy=False)
    try:
        with softmax_with_hooks(pipeline.transformer, see):
            for number, caption in enumerate(captions):
                generator = torch.Generator("cpu").manual_seed(number)
                generate_video(pipeline, caption, output_type="latent", generator=generator, **settings)
    finally:
        pipeline.transformer = stock
    means = {layer: tuple(torch.stack(x).mean(0) for x in zip(*seen, strict=True)) for layer, seen in found.items()}
    return means, uniform[0]


def line(name: str | int, weights: torch.Tensor, keys: torch.Tensor) -> str:
    """Return a row of the table, with weights in per cent."""
    within = 100 * weights.cumsum(-1)
    at_most = [within[:, min(d, within.shape[-1] - 1)] for d in range(3)]
    cells = [f"{share.mean():.0f}" for share in at_most]
    cells += [f"{at_most[1].min():.0f}, {at_most[1].max():.0f}", f"{keys.mean():.0f}"]
    return table_line([str(name), *cells])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.attention_distance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", nargs="?", default=FOLDER, help="folder or Hub id (default: the embedded model)")
    parser.add_argument(
        "--captions", nargs="+", metavar="TEXT", help="captions of the videos (default: 8 of the small world)"
    )
    args = parser.parse_args(arguments)
    cuda = torch.cuda.is_available()
    pipeline = load_pipeline(args.model, dtype=torch.bfloat16 if cuda else torch.float32).to("cuda" if cuda else "cpu")
    pipeline.set_progress_bar_config(disable=True)
    captions = args.captions or WORLDS["small"].evaluation_captions(8)
    layers, uniform = measure(pipeline, captions, **sampling_settings(pipeline))
    print(f"Share of the attention weight in %, {len(captions)} videos\n")
    print(f"{table_line(HEADINGS)}\n|{'---|' * len(HEADINGS)}")
    print(line("uniform", *uniform))
    for layer, seen in layers.items():
        print(line(layer, *seen))


if __name__ == "__main__":
    main()
