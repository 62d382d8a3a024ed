"""Window attention in torch.library: `linvideo::window_attn` and its `_backward`.

The near part is softmax by a library (softmax_backends.py), whose calls `Layout` lists. The far part is linear
attention on states of single frames, summed for each frame over those outside of its window. The sums are a product
with a matrix of zeros and ones rather than differences from a total, which would cancel.

The backward calls the library's backward with the merged output and the log of the whole normaliser: the weights that
it computes again are then those of the whole sum, and do.o is that of the merged output, so its gradients are exact.
Linear attention gets its gradients as one part of that sum (row_gradient.py in the kernels, chunked.py on the CPU).
"""

import torch
from torch import Tensor

from linvideo.ops import chunked, softmax_backends
from linvideo.ops.library import (
    applied,
    below_autograd,
    differentiate,
    differentiate_never,
    dispatch,
    fake,
    given,
    keep,
    kernels,
    new,
    operator,
    tensors,
    uses_kernels,
    without_autocast,
)
from linvideo.ops.over_heads import over_heads
from linvideo.ops.reference import sum_dtype
from linvideo.ops.unfused import rotate_rows
from linvideo.ops.window_layout import Layout, SoftmaxCall

TINY = 1e-30  # instead of eps: the softmax part keeps the whole normaliser from vanishing
# Limit of log(g / T), as in the kernels. Where the far part has any weight, T > g den keeps g / T below it; elsewhere
# it is multiplied by 0, and must be finite.
MAX_LOG_SHARE = 60.0


@operator("window_attn")
def forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gain: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    key_mask: Tensor | None,
    window: list[int],
    feature_map: str,
    scale: float,
    backend: str | None,
    precision: str,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return o and, in training, the log of the normaliser [B, H, N] and, with rope, the rotated q and k.

    `window` holds the fields of a `Layout`.
    """
    if not q.shape[0]:
        lse = q.new_empty((0, q.shape[2], q.shape[1]) if training else 0, dtype=sum_dtype(q))
        return torch.empty_like(q), lse, *(x.new_empty(x.shape if training and cos is not None else 0) for x in (q, k))
    layout = Layout(*window)
    with without_autocast(q):
        rotated = None, None
        if cos is not None:
            q, k = rotated = tuple(kernels(x).rotate(x, cos, sin) for x in (q, k))
        softmax = _Softmax(q, k, v, key_mask, layout, scale, backend, training)
        o, lse = softmax.forward(layout.window_calls(q.shape[0]))
        common = [softmax.call(call) for call in layout.common_calls]
        far = _Far(q, k, v, q_weight, k_weight, layout, feature_map, precision).forward() if layout.has_far else None
        if common or far:
            _merge(o, lse, common[0] if common else None, far, log_gain, layout)
    return o, lse if training else lse.new_empty(0), *tensors(q, *(rotated if training else (None, None)))


@operator("window_attn_backward")
def backward_op(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gain: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    key_mask: Tensor | None,
    o: Tensor,
    lse: Tensor,
    window: list[int],
    feature_map: str,
    scale: float,
    backend: str | None,
    precision: str,
    rows: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return dq, dk, dv, dlog_gain, dq_weight and dk_weight.

    q and k are those that the forward has rotated. Without `rows`, dq, dk and dv are empty: the softmax has no weights,
    so that fitting the weights needs no backward of it.
    """
    if not q.shape[0]:
        weights = (None if x is None else torch.zeros_like(x) for x in (q_weight, k_weight))
        return tensors(
            q, *([torch.empty_like(x) for x in (q, k, v)] if rows else [None] * 3), torch.zeros_like(log_gain), *weights
        )
    layout = Layout(*window)
    with without_autocast(q):
        if layout.has_far:
            far = _Far(q, k, v, q_weight, k_weight, layout, feature_map, precision)
            grads, small = far.backward(do, o, lse, log_gain)
            if layout.text:
                text = 0, 0, 0, 0, layout.prefix_tokens, layout.suffix_tokens
                grads = [torch.nn.functional.pad(x, text) for x in grads]
        else:
            grads = [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
            small = [None if x is None else torch.zeros_like(x) for x in (log_gain, q_weight, k_weight)]
        if rows:
            softmax, do = _Softmax(q, k, v, key_mask, layout, scale, backend, True), softmax_backends.aligned(do)
            for call in [*layout.window_calls(q.shape[0]), *layout.common_calls]:
                softmax.backward(call, do, o, lse, grads)
        if rows and cos is not None:
            grads[:2] = (kernels(x).rotate(x, cos, -sin) for x in grads[:2])
    small = [None if x is None else x.contiguous() for x in small]
    return tensors(q, *(grads if rows else (None, None, None)), *small)


class _Softmax:
    """The near part's softmax over the rows of one sequence."""

    def __init__(self, q, k, v, key_mask, layout: Layout, scale: float, backend: str | None, training: bool):
        self.q, self.k, self.v = (softmax_backends.aligned(x) for x in (q, k, v))
        self.layout, self.scale = layout, scale
        self.group = q.shape[2] // k.shape[2]
        self.mask = None
        if key_mask is not None:
            self.mask = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device)
            self.mask[:, : layout.prefix_tokens] = key_mask[:, : layout.prefix_tokens]
            self.mask[:, layout.tokens - layout.suffix_tokens :] = key_mask[:, layout.prefix_tokens :]
        self.backends = [
            softmax_backends.choose(backend, q, masked=masked, training=training)
            for masked in (False, self.mask is not None)
        ]

    def _rows(self, call: SoftmaxCall):
        """Return the backend, q, k, v and the mask of a call; k and v have q's heads, and masked rows are 0."""
        k, v = (call.keys.take(x) for x in (self.k, self.v))
        mask = call.keys.take(self.mask) if call.masked and self.mask is not None else None
        if mask is not None:  # what masked keys hold must not matter, even NaN
            k, v = (torch.where(mask[..., None, None], x, 0.0) for x in (k, v))
        if self.group > 1:
            k, v = (x.repeat_interleave(self.group, 2) for x in (k, v))
        return self.backends[mask is not None], call.queries.take(self.q), k, v, mask

    def call(self, call: SoftmaxCall) -> tuple[Tensor, Tensor]:
        """Return the output and the log-sum-exp [B, H, N] of a call."""
        backend, *rows, mask = self._rows(call)
        return backend.forward(*rows, self.scale, mask)

    def forward(self, calls: list[SoftmaxCall]) -> tuple[Tensor, Tensor]:
        """Return the output of all rows and the log-sum-exps [B, H, N]; a row in no call has 0 and -inf."""
        if len(calls) == 1 and calls[0].queries.take(self.q).shape == self.q.shape:
            o, lse = self.call(calls[0])
            return o.contiguous(), lse.contiguous()
        batch, length, heads, _ = self.q.shape
        make = torch.zeros if self.layout.has_empty_window else torch.empty
        o = make(self.q.shape, dtype=self.q.dtype, device=self.q.device)
        lse = torch.full((batch, heads, length), float("-inf"), dtype=sum_dtype(self.q), device=self.q.device)
        for call in calls:
            out, total = self.call(call)
            call.queries.put(o, out)
            call.queries.put(lse.transpose(1, 2), total.transpose(1, 2))
        return o, lse

    def backward(self, call: SoftmaxCall, do, o, lse, grads) -> None:
        """Add the gradients of a call to those of q, k and v."""
        backend, q, k, v, mask = self._rows(call)
        do, o = (call.queries.take(x) for x in (do, o))
        lse = call.queries.take(lse.transpose(1, 2)).transpose(1, 2)
        dq, dk, dv = backend.backward(do, q, k, v, o, lse, self.scale, mask)
        if self.group > 1:
            dk, dv = (x.unflatten(2, (-1, self.group)).sum(3) for x in (dk, dv))
        for rows, x, grad in zip((call.queries, call.keys, call.keys), grads, (dq, dk, dv), strict=True):
            rows.add(x, grad)


class _Far:
    """Linear attention of each frame of the video to the frames outside of its window.

    The frames are a batch of B F sequences of P tokens, on either side.
    """

    def __init__(self, q, k, v, q_weight, k_weight, layout: Layout, feature_map: str, precision: str):
        self.layout, self.feature_map, self.precision = layout, feature_map, precision
        self.batch, self.far = q.shape[0], layout.far(q.device)
        self.q, self.k, self.v = (self._frames(x[:, layout.video]) for x in (q, k, v))
        self.q_weight, self.k_weight = q_weight, k_weight
        keys = self.k, self.v, k_weight
        if uses_kernels(q):
            self.own_state = kernels(q).state(*keys, None, None, None, feature_map, precision, False)[:2]
        else:
            self.own_state = chunked.state(*keys, None, None, feature_map)
        self.far_state = [self._sum(self.far, x) for x in self.own_state]

    def _frames(self, x: Tensor) -> Tensor:
        """Return rows [B, F P, ...] as [B F, P, ...]."""
        return x.unflatten(1, (self.layout.frames, -1)).flatten(0, 1)

    def _rows(self, x: Tensor) -> Tensor:
        """Undo `_frames`."""
        return x.unflatten(0, (self.batch, -1)).flatten(1, 2)

    def _sum(self, matrix: Tensor, x: Tensor) -> Tensor:
        """Return matrix [F, F] times x [B F, ...] in each batch entry.

        For fp32 rows the product is taken in float64: PyTorch's fp32 products may use TF32, whatever `precision` says.
        """
        frames = x.view(self.batch, len(matrix), -1)
        if self.q.dtype == torch.float32:
            frames = frames.double()
        return (matrix.type_as(frames) @ frames).type_as(x).view(x.shape)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return the output [B, F P, H, D] and the denominators [B, H, F P]."""
        queries = self.q, *self.far_state, self.q_weight
        scaling = self.feature_map, 1.0, True, TINY
        if uses_kernels(self.q):
            run = kernels(self.q).apply
            out, den, *_ = run(*queries, None, None, None, None, *scaling, self.precision, False, True)
        else:
            out, den = chunked.apply(*queries, None, *scaling, return_normalizer=True)
        return self._rows(out), self._rows(den.transpose(1, 2)).transpose(1, 2).contiguous()

    def backward(self, do, o, lse, log_gain) -> tuple[list[Tensor], tuple[Tensor | None, ...]]:
        """Return dq, dk, dv of the video's rows, and dlog_gain, dq_weight, dk_weight."""
        lse = lse[..., self.layout.video].contiguous()
        do, o = (x[:, self.layout.video] for x in (do, o))
        if uses_kernels(do):
            dot, share = kernels(do).factors(do, o, lse, log_gain.contiguous())
        else:
            dot = (do.to(lse.dtype) * o.to(lse.dtype)).sum(-1).transpose(1, 2)
            share = (log_gain.to(lse.dtype)[:, None] - lse).clamp(max=MAX_LOG_SHARE).exp()
        numbers = (self._frames(x.transpose(1, 2)).transpose(1, 2) for x in (dot, share))
        rows = self._frames(do), *numbers, self.q, *self.far_state, self.q_weight
        keys = self.k, self.v, self.k_weight
        if uses_kernels(do):
            run, last = kernels(do), (self.feature_map, self.precision)
            dq, *dstates, dq_weight, gains = run.part_backward(*rows, *last)
            dstates = [self._sum(self.far.T, x) for x in dstates]
            keys = *keys, None, None, None, *self.own_state
            dk, dv, dk_weight = run.state_backward(*dstates, *keys, *last)
        else:
            dq, *dstates, dq_weight, gains = chunked.part_backward(*rows, self.feature_map)
            dstates = [self._sum(self.far.T, x) for x in dstates]
            dk, dv, dk_weight = chunked.state_backward(*dstates, *keys, None, None, *self.own_state, self.feature_map)
        dweights = [
            None if w is None else x.to(w.dtype) for x, w in ((dq_weight, self.q_weight), (dk_weight, self.k_weight))
        ]
        small = gains.sum((0, 2)).to(log_gain.dtype), *dweights
        return [self._rows(x) for x in (dq, dk, dv)], small


def _merge(o, lse, common, far, log_gain, layout: Layout) -> None:
    """Merge the video's rows of o and lse, in place, with the softmax over the common keys and the far part."""
    rows, numbers = o[:, layout.video], lse[..., layout.video].contiguous()
    common = None if common is None else (common[0], common[1].contiguous())
    if uses_kernels(o):
        kernels(o).merge(rows, numbers, common, far, log_gain.contiguous())
    else:
        parts = [(rows, numbers), *([] if common is None else [common])]
        if far is not None:
            parts.append((far[0], far[1].log() + log_gain.to(numbers.dtype)[:, None]))
        total = torch.stack([x for _, x in parts]).logsumexp(0)
        merged = sum((x - total).exp().transpose(1, 2).unsqueeze(-1) * out.to(total.dtype) for out, x in parts)
        rows.copy_(merged)
        numbers.copy_(total)
    lse[..., layout.video] = numbers


@fake(forward_op)
def _(q, k, v, log_gain, q_weight, k_weight, cos, *inputs):
    training = inputs[-1]
    batch, length, heads, _ = q.shape
    lse = q.new_empty((batch, heads, length) if training else 0, dtype=sum_dtype(q))
    rotated = [q.new_empty(x.shape if training and cos is not None else 0) for x in (q, k)]
    return q.new_empty(q.shape), lse, *rotated


@fake(backward_op)
def _(do, q, k, v, log_gain, q_weight, k_weight, *inputs):
    rows = [x.new_empty(x.shape if inputs[-1] else 0) for x in (q, k, v)]
    return *rows, log_gain.new_empty(log_gain.shape), new(q, q_weight), new(q, k_weight)


HEADS = (2, 2, 2, 0, 0, 0, None, None, None)


@over_heads(HEADS, (2, 1, 2, 2))
class _WindowAttn(torch.autograd.Function):
    @staticmethod
    def forward(*inputs):
        return below_autograd(forward_op, *inputs[:-1], True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, *others = inputs[:9]
        o, lse, *rotated = output
        q, k = rotated if others[4] is not None else (q, k)
        keep(ctx, q, k, *others, o, lse)
        ctx.settings = inputs[9:-1]

    @staticmethod
    def backward(ctx, do, *_):
        if do is None:
            return (None,) * 15
        saved = ctx.saved_tensors  # read only once: under activation checkpointing a second read raises
        rows = any(ctx.needs_input_grad[:3])
        *grads, dlog_gain, dq_weight, dk_weight = dispatch(backward_op, do, *saved, *ctx.settings, rows)
        grads = grads if rows else (None, None, None)
        return *grads, dlog_gain, given(dq_weight, saved[4]), given(dk_weight, saved[5]), *(None,) * 9

    @staticmethod
    def jvp(ctx, *_):
        raise RuntimeError("window_attn has no forward-mode derivative: the softmax libraries that it calls have none")


def _with_gradient(*inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    o, lse, *_ = _window_attn(*inputs)
    empty = o.new_empty(0)
    return o, lse.new_empty(0), empty, empty  # autograd keeps what the backward reads


def _transformed(q, k, v, log_gain, q_weight, k_weight, cos, sin, *others) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k = rotate_rows(cos, sin, q, k)
    return _with_gradient(q, k, v, log_gain, q_weight, k_weight, None, None, *others)


_window_attn = applied(_WindowAttn)
differentiate(forward_op, _with_gradient, _transformed)
differentiate_never(backward_op, (2, *HEADS, 2, 1), (2, 2, 2, 0, 0, 0))
