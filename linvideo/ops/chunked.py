"""Linear attention in plain PyTorch, for CPU tensors. It works in fp32, or float64 for float64 rows, on one slice of
rows at a time, so that nothing of size N F is ever in memory.

These are the functions of the kernels (linvideo_kernels/linear_attn/passes.py) without the rotary embedding and
the mixture, which unfused.py computes with plain operations when no kernel runs:
    state           S = sum_m phi(k_m)^T v_m [B, Hk, F, D], z = sum_m phi(k_m) [B, Hk, F]
    apply           o = phi(q) S / den with den = phi(q) z + eps
    apply_backward  with a = 1 / den, delta = do.o: dphi(q) = a (do S^T - delta z), dS = sum a phi(q)^T do,
                    dz = -sum a delta phi(q)
    part_backward   the same with a and do.o from outside: o is one part of a sum with another normaliser
    state_backward  dv = phi(k) dS, dphi(k) = v dS^T + dz
The backward functions compute phi again instead of keeping it.

A mean in v would cost the gradients precision. So the backward functions take the overall mean of v off first, as the
kernels do: with c = sum_f S_f / sum_f z_f and T = S - z c^T, dphi(q) = a (do T^T - delta' z), where
delta' = do.(o - c), and dphi(k) = (v - c) dS^T + (dz + dS c). T is a small difference then; so S is summed without the
mean of v's first rows, which is added at the end.

Within a slice the tensors have three axes, [B H, n, .], which is what a batched product takes. Features are a list of
parts, which need not lie next to each other: "hedgehog" has two. What a slice computes on the way goes to memory that
is kept from slice to slice and from call to call, because to fill fresh memory, which the system clears page by page,
takes a CPU as long as to compute.
"""

import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from linvideo.ops.reference import feature_count, spans, sum_dtype

CHUNK_ELEMENTS = 1 << 19  # features in memory at a time: 2 MB, enough that calls from Python cost little
_kept = threading.local()


class Slice:
    """A slice of rows, the states that it belongs to, and memory for what is computed from it.

    Args:
        like: Rows [B, N, H, D], which give the shape and dtype.
        entries: Batch entries of the slice.
        rows: Rows of the slice in each of them.
        states: States of the slice: those of its entries, or that of one packed sequence.
        first: Whether it is the first of several slices of its states.
    """

    def __init__(self, like: Tensor, entries: slice, rows: slice, states: slice, first: bool):
        self.entries, self.rows, self.states, self.first = entries, rows, states, first
        self.batch, self.length = entries.stop - entries.start, rows.stop - rows.start
        self.heads, self.dim = like.shape[2:]
        self.dtype, self.device = sum_dtype(like), like.device
        self.in_place = self.batch == 1 and like.dtype == self.dtype  # whether rows need no conversion
        self.used = 0

    def new(self, width: int | None = None) -> Tensor:
        """Return memory [B H, n, width] that this slice has not used yet; the width is D if it is None."""
        shape = self.batch * self.heads, self.length, self.dim if width is None else width
        start, step = self.used, shape[1] * shape[2]
        self.used += -(-shape[0] * step // 16) * 16  # in steps of a cache line
        if self.device.type != "cpu":  # other devices' allocators keep memory themselves
            return torch.empty(shape, dtype=self.dtype, device=self.device)
        memory = getattr(_kept, str(self.dtype), None)
        if memory is None or memory.numel() < self.used:
            with torch.inference_mode(False):  # a tensor made in inference mode could not be written outside of it
                memory = torch.empty(self.used, dtype=self.dtype, device="cpu")
            setattr(_kept, str(self.dtype), memory)
        return memory.as_strided(shape, (step, shape[2], 1), start)

    def take(self, x: Tensor) -> Tensor:
        """Return the slice of rows x [B, N, H, D] as [B H, n, D], in the sums' dtype."""
        x = self._view(x)
        if self.in_place:
            return x[0]
        out = self.new()
        out.view(x.shape).copy_(x)
        return out

    def target(self, x: Tensor) -> Tensor:
        """Return where to compute the slice of rows x: in x itself if possible, else in memory for `put` to convert."""
        return self._view(x)[0] if self.in_place else self.new()

    def put(self, x: Tensor, rows: Tensor) -> None:
        """Write [B H, n, D] to the slice of rows x, unless they were computed there."""
        out = self._view(x)
        if rows.data_ptr() != out.data_ptr():
            out.copy_(rows.view(out.shape))

    def _view(self, x: Tensor) -> Tensor:
        return x[self.entries, self.rows].transpose(1, 2)

    def numbers(self, x: Tensor) -> Tensor:
        """Return the slice of numbers x [B, H, N] as [B H, n, 1]."""
        return x[self.entries, :, self.rows].reshape(self.batch * self.heads, self.length, 1)

    def put_numbers(self, out: Tensor, x: Tensor) -> None:
        out[self.entries, :, self.rows] = x.reshape(self.batch, self.heads, self.length)

    def weight(self, weight: Tensor | None) -> Tensor | None:
        """Return the weight [H, D, D] as [B H, D, D]."""
        return None if weight is None else weight.expand(self.batch, *weight.shape).flatten(0, 1)

    def sums(self, x: Tensor) -> Tensor:
        """Return the slice's S or z of x [B, H, ...] as [B H, ...]."""
        return x[self.states].flatten(0, 1)

    def add_sums(self, out: Tensor, x: Tensor, group: int) -> None:
        """Add x [B H, ...] to the slice's sums `out` [B, Hk, ...]."""
        x = x if group == 1 else x.unflatten(0, (-1, group)).sum(1)
        out = out[self.states]
        out += x.view(out.shape)

    def masked(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return x [B H, n, .] with 0 where mask [B, N] is False. A factor 0 would not do: masked keys may hold NaN."""
        keep = mask[self.entries, self.rows].repeat_interleave(self.heads, 0)
        return torch.where(keep.unsqueeze(-1), x, 0.0)


def state(k, v, weight, key_mask, cu_seqlens, feature_map: str):
    """Return S and z. B is the number of sequences if they are packed."""
    state, z = new_state(k, cu_seqlens, feature_map)
    weight = rounded(weight, k)
    shift = None
    for part in slices(k, cu_seqlens, feature_map):
        phi = features(part, part.take(k), part.weight(weight), feature_map)
        values = part.take(v)
        if key_mask is not None:
            *phi, values = (part.masked(x, key_mask) for x in (*phi, values))
        if part.first:  # of several slices: in a short sum the mean costs no more than the rounding of S itself
            shift = torch.zeros_like(state[:, :, :1]) if shift is None else shift
            # Only a mean well above the noise: leaving out a smaller one would add an error to S. A few rows show it,
            # and std_mean is slow.
            spread, average = torch.std_mean(values[:, :64], -2, keepdim=True)
            part.sums(shift).copy_(torch.where(average.abs() > spread / 2, average, 0.0))
        if shift is not None:
            values = torch.sub(values, part.sums(shift), out=part.new())
        for f, s, mass in zip(phi, split(part.sums(state), phi), split(part.sums(z), phi), strict=True):
            s.baddbmm_(f.mT, values)
            mass += f.sum(-2)
    return state if shift is None else state.addcmul_(z.unsqueeze(-1), shift), z


def state_backward(dstate, dz, k, v, weight, key_mask, cu_seqlens, state, z, feature_map: str):
    """Return dk and dv in the dtypes of k and v, and dweight in the sums' dtype (None without a weight)."""
    dk, dv, dweight = new_rows(k, cu_seqlens), new_rows(v, cu_seqlens), _new_weight_grad(k, weight)
    weight = rounded(weight, k)
    center = mean(state, z, feature_map)
    if center is not None:
        dz = dz + (dstate * center).sum(-1)
    for part in slices(k, cu_seqlens, feature_map):
        u, values = part.take(k), part.take(v)
        w = part.weight(weight)
        phi = features(part, u, w, feature_map)
        if center is not None:
            values = torch.sub(values, part.sums(center), out=part.new())
        grads = list(zip(split(part.sums(dstate), phi), split(part.sums(dz), phi), strict=True))
        dvalues = product(phi, [s for s, _ in grads], part.target(dv))
        dphi = [torch.baddbmm(mass.unsqueeze(-2), values, s.mT, out=part.new(s.shape[1])) for s, mass in grads]
        dx = _activate_grad(part, phi, dphi, feature_map)
        if key_mask is not None:
            u, dx = (part.masked(x, key_mask) for x in (u, dx))
            dvalues.copy_(part.masked(dvalues, key_mask))
        part.put(dv, dvalues)
        _put_input_grad(part, dk, dweight, dx, u, w)
    return dk, dv, dweight


def apply(
    q, state, z, weight, cu_seqlens, feature_map: str, scale: float, normalize: bool, eps: float,
    return_normalizer: bool = False,
):  # fmt: skip
    """Return o in q's dtype and, with return_normalizer, phi(q) z [B, H, N] (else None)."""
    group = q.shape[2] // state.shape[1]
    o, den = new_rows(q, cu_seqlens), new_numbers(q, cu_seqlens) if return_normalizer else None
    weight = rounded(weight, q)
    state, z = over_group(state, group), over_group(z, group)
    for part in slices(q, cu_seqlens, feature_map):
        phi = features(part, part.take(q), part.weight(weight), feature_map)
        out = product(phi, split(part.sums(state), phi), part.target(o))
        if normalize:
            mass = weighed(phi, split(part.sums(z), phi))
            if den is not None:
                part.put_numbers(den, mass)
            out *= (mass + eps).reciprocal_()
        elif scale != 1:
            out *= scale
        part.put(o, out)
    return o, den


def apply_backward(
    do, q, state, z, weight, cu_seqlens, feature_map: str, scale: float, normalize: bool, eps: float, den_grad=None
):  # fmt: skip
    """Return dq in q's dtype, and dstate, dz and dweight in the sums' dtype (dweight is None without a weight).

    den_grad [B, H, N] is the gradient of the denominator phi(q) z, if it was returned.
    """

    def row_factor(part, den):
        return (den + eps).reciprocal_() if normalize else scale

    def delta(part, a, inner, g_center, den):
        d = (inner - eps * g_center).mul_(a)
        return d if den_grad is None else d.sub_(part.numbers(den_grad))

    settings = {"cu_seqlens": cu_seqlens, "feature_map": feature_map, "normalize": normalize}
    return _queries_backward(row_factor, delta, do, q, state, z, weight, **settings)


def part_backward(do, dot, a, q, state, z, weight, feature_map: str):
    """Return dq, dstate, dz, dweight and the gradients [B, H, N] of log G, if o is one part of a sum.

    As in window attention, o = (G sum_f phi_f S_f + other terms) / total, where `a` is G / total and `dot` is do.o,
    both [B, H, N].
    """
    gains = new_numbers(q, None)

    def row_factor(part, den):
        return part.numbers(a)

    def delta(part, share, inner, g_center, den):
        d = (share * part.numbers(dot)).sub_(g_center)
        part.put_numbers(gains, inner - d * den)
        return d

    settings = {"cu_seqlens": None, "feature_map": feature_map, "normalize": True}
    return *_queries_backward(row_factor, delta, do, q, state, z, weight, **settings), gains


def _queries_backward(row_factor, delta, do, q, state, z, weight, *, cu_seqlens, feature_map: str, normalize: bool):
    """Return dq, dstate, dz and dweight.

    row_factor(slice, phi z) returns a of each row. With g = a do and t = g T^T,
    delta(slice, a, <phi, t>, g.c, phi z) returns a delta': dphi(q) = t - a delta' z. It is not called if nothing is
    normalised.
    """
    group = q.shape[2] // state.shape[1]
    dq, dweight = new_rows(q, cu_seqlens), _new_weight_grad(q, weight)
    weight = rounded(weight, q)
    dstate, dz = torch.zeros_like(state), torch.zeros_like(z)
    center = mean(state, z, feature_map, normalize)
    state = over_group(centered(state, z, center), group)
    z, centers = over_group(z, group), over_group(center, group)
    for part in slices(q, cu_seqlens, feature_map):
        u = part.take(q)
        w = part.weight(weight)
        phi = features(part, u, w, feature_map)
        mass = split(part.sums(z), phi)
        den = weighed(phi, mass) if normalize else None
        a = row_factor(part, den)
        g = torch.mul(part.take(do), a, out=part.new())
        t = [torch.bmm(g, s.mT, out=part.new(s.shape[1])) for s in split(part.sums(state), phi)]
        g_center = 0.0 if center is None else torch.bmm(g, part.sums(centers).mT)
        d = delta(part, a, _inner(phi, t), g_center, den) if normalize else None
        if d is not None:
            t = [f.addcmul_(d, y.unsqueeze(-2), value=-1) for f, y in zip(t, mass, strict=True)]
            part.add_sums(dz, torch.cat([torch.bmm(d.mT, f) for f in phi], -1).neg_(), group)
        part.add_sums(dstate, torch.cat([torch.bmm(f.mT, g) for f in phi], 1), group)
        _put_input_grad(part, dq, dweight, _activate_grad(part, phi, t, feature_map), u, w)
    if center is not None:
        dz -= (dstate * center).sum(-1)
    return dq, dstate, dz, dweight


def empty_state(k, cu_seqlens, feature_map: str) -> tuple[Tensor, Tensor]:
    """Allocate S and z of keys k."""
    heads, dim = k.shape[2:]
    sequences = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    z = sequences, heads, feature_count(feature_map, dim)
    return tuple(k.new_empty(shape, dtype=sum_dtype(k)) for shape in ((*z, dim), z))


def new_state(k, cu_seqlens, feature_map: str) -> tuple[Tensor, Tensor]:
    """Allocate S and z, which start at 0."""
    return tuple(x.zero_() for x in empty_state(k, cu_seqlens, feature_map))


def new_rows(x, cu_seqlens):
    """Allocate rows like x [B, N, H, D]; they start at 0 if packed, since sequences may not cover all of them."""
    make = torch.empty if cu_seqlens is None else torch.zeros
    return make(x.shape, dtype=x.dtype, device=x.device)


def new_numbers(q, cu_seqlens):
    """Allocate numbers [B, H, N], one for each row of q [B, N, H, D]; they start at 0 as in `new_rows`."""
    batch, length, heads, _ = q.shape
    make = torch.empty if cu_seqlens is None else torch.zeros
    return make(batch, heads, length, dtype=sum_dtype(q), device=q.device)


def _new_weight_grad(x, weight):
    return None if weight is None else torch.zeros(weight.shape, dtype=sum_dtype(x), device=x.device)


def rounded(weight, x):
    """Return the weight in the sums' dtype, rounded to the dtype of its rows x."""
    return None if weight is None else weight.to(x.dtype).to(sum_dtype(x))


def mean(state, z, feature_map: str, normalize: bool = True):
    """Return c [B, Hk, 1, D], the mean of v over all keys, weighted by their features.

    It is None, for 0, if nothing is normalised, and for features that may be negative, whose sum can vanish.
    """
    if not normalize or feature_map == "identity":
        return None
    return state.sum(-2, keepdim=True) / z.sum(-1).clamp(min=1e-25)[..., None, None]


def centered(state, z, center):
    """Return T = S - z c^T."""
    return state if center is None else torch.addcmul(state, z.unsqueeze(-1), center, value=-1)


def over_group(x: Tensor | None, group: int) -> Tensor | None:
    """Repeat x [B, Hk, ...] for the query heads of each key head."""
    return x if x is None or group == 1 else x.repeat_interleave(group, 1)


def split(x: Tensor, phi: list[Tensor]) -> tuple[Tensor, ...]:
    """Split S or z, [B H, F, ...], by the parts of phi."""
    return (x,) if len(phi) == 1 else x.split([f.shape[-1] for f in phi], 1)


def product(phi: list[Tensor], state: list[Tensor], out: Tensor) -> Tensor:
    """Compute phi S in `out` [B H, n, D]."""
    torch.bmm(phi[0], state[0], out=out)
    for f, s in zip(phi[1:], state[1:], strict=True):
        out.baddbmm_(f, s)
    return out


def weighed(phi: list[Tensor], z: list[Tensor]) -> Tensor:
    """Return phi z [B H, n, 1]."""
    return sum(torch.bmm(mass.unsqueeze(-2), f.mT) for f, mass in zip(phi, z, strict=True)).mT


def _inner(phi: list[Tensor], t: list[Tensor]) -> Tensor:
    """Return <phi, t> of each row, [B H, n, 1]."""
    return sum(torch.linalg.vecdot(f, x) for f, x in zip(phi, t, strict=True)).unsqueeze(-1)


def features(part: Slice, u: Tensor, weight: Tensor | None, feature_map: str) -> list[Tensor]:
    """Return the parts of phi(u W). Their operations are those of `activate`, or faster ones."""
    x = u if weight is None else torch.bmm(u, weight, out=part.new())
    if feature_map == "hedgehog":
        plus = torch.softmax(x, -1, out=part.new())
        return [plus, torch.softmax(x.neg_(), -1, out=part.new())]
    if feature_map == "hedgehog_joint":
        both = part.new(2 * part.dim)
        for x2, sign in zip(both.chunk(2, -1), (2, -2), strict=True):
            torch.mul(x, sign, out=x2)
        return [torch.softmax(both, -1, out=part.new(2 * part.dim))]
    if feature_map == "elu":
        return [torch.clamp(x, max=0, out=part.new()).exp_().add_(torch.clamp(x, min=0, out=part.new()))]
    if feature_map == "relu":
        return [torch.clamp(x, min=0, out=part.new())]
    if feature_map == "softmax":
        return [torch.softmax(x, -1, out=part.new())]
    return [x]


def _activate_grad(part: Slice, phi: list[Tensor], dphi: list[Tensor], feature_map: str) -> Tensor:
    """Return the gradient with respect to the logits, given that of phi, which it may overwrite."""
    if feature_map == "hedgehog":
        plus, minus = (_jacobian(part, f, g, "softmax") for f, g in zip(phi, dphi, strict=True))
        return plus.sub_(minus)
    if feature_map == "hedgehog_joint":
        plus, minus = _jacobian(part, phi[0], dphi[0], "softmax").chunk(2, -1)
        return torch.sub(plus, minus, out=part.new()).mul_(2)
    return _jacobian(part, phi[0], dphi[0], feature_map)


def activate_tangent(part: Slice, phi: list[Tensor], dx: Tensor, feature_map: str) -> list[Tensor]:
    """Return the tangent of the parts of phi, given that of the logits, which it may overwrite."""
    if feature_map == "hedgehog":
        return [_jacobian(part, phi[0], dx, "softmax"), _jacobian(part, phi[1], -dx, "softmax")]
    if feature_map == "hedgehog_joint":
        return [_jacobian(part, phi[0], torch.cat([2 * dx, -2 * dx], -1), "softmax")]
    return [_jacobian(part, phi[0], dx, feature_map)]


def _jacobian(part: Slice, phi: Tensor, g: Tensor, feature_map: str) -> Tensor:
    """Multiply g by the Jacobian of elu, relu, softmax or identity; it is symmetric. It may overwrite g."""
    if feature_map == "elu":
        return g.mul_(torch.clamp(phi, max=1, out=part.new()))  # the slope is 1 above 0 and exp(x) = phi below
    if feature_map == "relu":
        return torch.ops.aten.threshold_backward.grad_input(g, phi, 0, grad_input=part.new())
    if feature_map == "softmax":
        return torch._softmax_backward_data(g, phi, -1, phi.dtype, grad_input=part.new(phi.shape[-1]))
    return g


def _put_input_grad(part: Slice, du: Tensor, dweight: Tensor | None, dx: Tensor, u: Tensor, weight: Tensor | None):
    """For x = u W, write dx W^T to the slice of du and add u^T dx to dweight [H, D, D]."""
    if weight is not None:
        dweight += torch.bmm(u.mT, dx).unflatten(0, (part.batch, part.heads)).sum(0)
        dx = torch.bmm(dx, weight.mT, out=part.target(du))
    part.put(du, dx)


def slices(x: Tensor, cu_seqlens: Tensor | None, feature_map: str) -> Iterator[Slice]:
    """Divide rows x [B, N, H, D] into slices that have rows."""
    if not x.numel():
        return
    batch, _, heads, dim = x.shape
    features = heads * feature_count(feature_map, dim)
    elements = CHUNK_ELEMENTS if x.device.type == "cpu" else 64 * CHUNK_ELEMENTS  # to keep a GPU busy
    entries = min(batch, max(1, elements // (64 * features)))
    step = max(64, elements // (entries * features))
    for sequence, span in enumerate(spans(x, cu_seqlens)):
        for entry in range(0, batch, entries):
            of_batch = slice(entry, min(entry + entries, batch))
            states = of_batch if cu_seqlens is None else slice(sequence, sequence + 1)
            for start in range(span.start, span.stop, step):
                stop = min(start + step, span.stop)
                yield Slice(x, of_batch, slice(start, stop), states, start == span.start and stop < span.stop)
