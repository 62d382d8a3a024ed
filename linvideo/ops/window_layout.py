"""Which rows window attention reads together: the windows of all chunks, the keys in every window, and the text.

Everything here is arithmetic with frame and row numbers, without tensors' values. Softmax runs once per `SoftmaxCall`.
In one batch entry, chunks with equally placed windows share a call: their keys are one overlapping view of k.
"""

from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor


class Ranges(NamedTuple):
    """Rows of all batch entries: one or more ranges [start, stop), one after another."""

    ranges: tuple[tuple[int, int], ...]

    def take(self, x: Tensor) -> Tensor:
        """Return these rows of x [B, N, ...], as a view if they are one range."""
        parts = [x[:, start:stop] for start, stop in self.ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def put(self, x: Tensor, rows: Tensor) -> None:
        for (start, stop), part in zip(self.ranges, self._split(rows), strict=True):
            x[:, start:stop] = part

    def add(self, x: Tensor, rows: Tensor) -> None:
        for (start, stop), part in zip(self.ranges, self._split(rows), strict=True):
            x[:, start:stop] += part

    def _split(self, rows: Tensor) -> tuple[Tensor, ...]:
        return rows.split([stop - start for start, stop in self.ranges], 1)


class Strided(NamedTuple):
    """`count` windows of `rows` rows in one batch entry, `step` rows apart; they are a batch of their own."""

    entry: int
    start: int
    rows: int
    count: int
    step: int

    def take(self, x: Tensor) -> Tensor:
        """Return a view [count, rows, ...] of x [B, N, ...]; the windows may overlap."""
        stop = self.start + (self.count - 1) * self.step + self.rows
        return x[self.entry, self.start : stop].unfold(0, self.rows, self.step).movedim(-1, 1)

    def put(self, x: Tensor, rows: Tensor) -> None:
        """Write windows that do not overlap."""
        self.take(x).copy_(rows)

    def add(self, x: Tensor, rows: Tensor) -> None:
        apart = -(-self.rows // self.step)  # windows as far apart as this do not overlap
        windows = self.take(x)
        for i in range(min(apart, self.count)):
            windows[i::apart] += rows[i::apart]


class SoftmaxCall(NamedTuple):
    queries: Ranges | Strided
    keys: Ranges | Strided
    masked: bool  # whether text is among the keys, so that a key mask applies


class Layout(NamedTuple):
    """The division of a sequence; the numbers are those of `window_attn`."""

    frames: int
    frame_tokens: int
    chunk: int
    overlap: int
    prefix_tokens: int
    suffix_tokens: int
    first_anchor: bool
    last_anchor: bool
    causal: bool

    @property
    def tokens(self) -> int:
        return self.prefix_tokens + self.frames * self.frame_tokens + self.suffix_tokens

    @property
    def chunks(self) -> int:
        return -(-self.frames // self.chunk)

    @property
    def video(self) -> slice:
        """The rows of the video."""
        return slice(self.prefix_tokens, self.tokens - self.suffix_tokens)

    @property
    def _free(self) -> tuple[int, int]:
        """First and last + 1 of the frames that are no anchors."""
        first = int(self.first_anchor)
        return first, max(first, self.frames - self.last_anchor)

    def window(self, chunk: int) -> tuple[int, int]:
        """Return the first and last + 1 of a chunk's window, without the anchors."""
        first, last = self._free
        ahead = 0 if self.causal else self.overlap
        return max(chunk * self.chunk - self.overlap, first), min((chunk + 1) * self.chunk + ahead, last)

    @property
    def has_far(self) -> bool:
        """Whether any chunk has frames outside of its window, for linear attention."""
        return any(
            start > self._free[0] or (stop < self._free[1] and not self.causal)
            for start, stop in map(self.window, range(self.chunks))
        )

    @property
    def has_empty_window(self) -> bool:
        """Whether some chunk has no frame in its window, because all of them are anchors."""
        return any(start == stop for start, stop in map(self.window, range(self.chunks)))

    @property
    def is_plain(self) -> bool:
        """Whether every token attends to every token with softmax."""
        text = self.prefix_tokens + self.suffix_tokens
        return all(self.window(c) == self._free for c in range(self.chunks)) and not (self.causal and text)

    @property
    def softmax_pairs(self) -> float:
        """The share of all pairs of frames that are within a window."""
        first, last = self._free
        anchors = self.frames - (last - first)
        kept = 0
        for chunk in range(self.chunks):
            start, stop = self.window(chunk)
            kept += min(self.chunk, self.frames - chunk * self.chunk) * (stop - start + anchors)
        return kept / self.frames**2

    @property
    def text(self) -> tuple[tuple[int, int], ...]:
        """The ranges of the tokens that belong to no frame."""
        ranges = (0, self.prefix_tokens), (self.tokens - self.suffix_tokens, self.tokens)
        return tuple(rows for rows in ranges if rows[1] > rows[0])

    @property
    def common(self) -> tuple[tuple[int, int], ...]:
        """The ranges of the keys that are in every window: the text and the anchors."""
        first, last = (self.prefix_tokens + frame * self.frame_tokens for frame in self._free)
        return tuple(rows for rows in ((0, first), (last, self.tokens)) if rows[1] > rows[0])

    def window_calls(self, batch: int) -> list[SoftmaxCall]:
        """Return the calls whose queries are, together, all rows, except those of chunks with an empty window."""
        if self.is_plain:
            everything = Ranges(((0, self.tokens),))
            return [SoftmaxCall(everything, everything, True)]
        calls = []
        if self.text:
            keys = self.text if self.causal else ((0, self.tokens),)
            calls.append(SoftmaxCall(Ranges(self.text), Ranges(keys), True))

        def shape(chunk: int) -> tuple[int, int, int]:
            """Return the chunk's number of frames, where its window begins relative to it, and how long that is."""
            start, stop = self.window(chunk)
            return min(self.chunk, self.frames - chunk * self.chunk), start - chunk * self.chunk, stop - start

        for (frames, offset, length), chunks in groupby(range(self.chunks), shape):
            chunks = list(chunks)
            if length:
                query = chunks[0] * self.chunk
                pairs = ((query, frames), (query + offset, length))
                calls += [SoftmaxCall(*rows, False) for rows in self._rows(batch, len(chunks), *pairs)]
        return calls

    @property
    def common_calls(self) -> list[SoftmaxCall]:
        """The call of the video's queries with the keys that are in every window, if there are such keys."""
        if not self.common or self.is_plain:
            return []
        return [SoftmaxCall(Ranges(((self.video.start, self.video.stop),)), Ranges(self.common), bool(self.text))]

    def _rows(self, batch: int, count: int, *pairs: tuple[int, int]):
        """Yield (queries, keys) of `count` chunks in as few calls as possible, from (first frame, frames) of both."""
        size, step = self.frame_tokens, self.chunk * self.frame_tokens
        starts = [self.prefix_tokens + first * size for first, _ in pairs]
        lengths = [frames * size for _, frames in pairs]
        if batch < count:
            for entry in range(batch):
                rows = zip(starts, lengths, strict=True)
                yield tuple(Strided(entry, start, length, count, step) for start, length in rows)
            return
        for i in range(count):
            rows = zip(starts, lengths, strict=True)
            yield tuple(Ranges(((start + i * step, start + i * step + length),)) for start, length in rows)

    def far(self, device: torch.device) -> Tensor:
        """Return 1.0 where linear attention leads from a query's frame to a key's frame, else 0, [F, F] in fp32."""
        first, last = self._free
        frame = torch.arange(self.frames, device=device)
        chunk = frame[:, None] // self.chunk * self.chunk
        far = frame < chunk - self.overlap
        if not self.causal:
            far = far | (frame >= chunk + self.chunk + self.overlap)
        return (far & (frame >= first) & (frame < last)).float()
