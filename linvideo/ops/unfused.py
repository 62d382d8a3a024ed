"""The rotary embedding and the mixture in plain PyTorch, for where no kernel computes them."""

from torch import Tensor

from linvideo.ops.reference import rotate, sum_dtype


def rotate_rows(cos: Tensor | None, sin: Tensor | None, *rows: Tensor) -> tuple[Tensor, ...]:
    """Return the rows [B, N, H, D] rotated by the tables [N, D/2], or as they are without tables."""
    if cos is None:
        return rows
    dtype = sum_dtype(rows[0])
    return tuple(rotate(x, cos.to(dtype), sin.to(dtype)) for x in rows)


def mix_rows(out: Tensor, softmax_out: Tensor | None, r: Tensor | None) -> Tensor:
    """Return r softmax_out + (1 - r) out in out's dtype, or out without a softmax_out."""
    if softmax_out is None:
        return out
    r = r.to(sum_dtype(out)).reshape(1)  # one axis, not zero: promotes the mixture to r's dtype
    return (r * softmax_out + (1 - r) * out).to(out.dtype)
