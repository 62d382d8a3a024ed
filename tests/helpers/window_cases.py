"""Cases of window attention, their inputs, and how exact the results have to be."""

import dataclasses
from dataclasses import dataclass

import torch
from cases import DTYPES, WEIGHTED, _place
from numerics import _features, clean, rotated

from linvideo.ops.window_reference import kept_keys, window_attn_reference, window_weights


@dataclass(frozen=True)
class WindowCase:
    """One call of the op."""

    frames: int = 8
    frame_tokens: int = 5
    chunk: int = 2
    overlap: int = 1
    prefix: int = 0
    suffix: int = 0
    anchors: tuple[str, ...] = ()
    causal: bool = False
    masked: bool = False  # whether some tokens before and after the video are no keys, and hold NaN
    batch: int = 2
    heads: int = 2  # key heads
    group: int = 1  # query heads per key head
    head_dim: int = 16
    feature_map: str = "hedgehog"
    rope: bool = False
    gain: float = 0.0  # the mean of log_gain
    far_apart: float = 0.0  # the first channel of all queries, and minus that of all keys: the logits are low
    dtype: str = "fp32"
    layout: str = "contiguous"  # one of cases.LAYOUTS; other than contiguous, log_gain has a stride, too

    @property
    def tokens(self) -> int:
        return self.prefix + self.frames * self.frame_tokens + self.suffix

    @property
    def options(self) -> dict:
        """The op's keyword arguments, other than the differentiable ones."""
        names = ("frame_tokens", "chunk", "overlap", "anchors", "causal", "feature_map")
        options = {name: getattr(self, name) for name in names}
        options |= {"prefix_tokens": self.prefix, "suffix_tokens": self.suffix}
        if self.rope:
            angles = torch.rand(self.tokens, self.head_dim // 2, generator=torch.Generator().manual_seed(1)) * 6.3
            options["rope"] = angles.cos(), angles.sin()
        if self.masked:
            rng = torch.Generator().manual_seed(2)
            options["key_mask"] = torch.rand(self.batch, self.prefix + self.suffix, generator=rng) < 0.6
            options["key_mask"][0] = True
            options["key_mask"][-1, 0] = False
        return options

    def __str__(self) -> str:
        default = type(self)()
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return "-".join(f"{name}_{x}" for name, x in fields.items() if x != getattr(default, name)) or "default"


CASES = [
    WindowCase(),
    WindowCase(frames=7, chunk=3, layout="packed_qkv"),  # a short last chunk
    WindowCase(chunk=1, overlap=0, feature_map="hedgehog_joint"),
    WindowCase(overlap=3, batch=1, frames=10),  # windows that overlap more than their neighbours
    WindowCase(batch=5, frames=5, frame_tokens=3, rope=True),
    WindowCase(heads=1, group=3, rope=True, layout="last_stride_2"),
    WindowCase(prefix=4, feature_map="elu", layout="guarded"),
    WindowCase(suffix=4, feature_map="relu", heads=1, group=2),
    WindowCase(prefix=3, suffix=4, masked=True, feature_map="softmax"),
    WindowCase(prefix=6, masked=True, rope=True, heads=1, group=2),
    WindowCase(anchors=("first",), layout="shared_batch"),
    WindowCase(anchors=("last",), suffix=2, masked=True),
    WindowCase(anchors=("first", "last"), prefix=2, frames=9, chunk=3, overlap=0),
    WindowCase(causal=True),
    WindowCase(causal=True, chunk=1, overlap=0, prefix=3, suffix=2, masked=True),
    WindowCase(causal=True, anchors=("first",), frames=7, chunk=3, overlap=2, batch=1, layout="heads_first"),
    WindowCase(gain=30.0),
    WindowCase(gain=-30.0, prefix=2),
    WindowCase(anchors=("first", "last"), chunk=1, overlap=0, frames=4),  # chunks that only have common keys
    WindowCase(frames=3, chunk=2, overlap=2, layout="last_stride_2"),  # every window is the whole video
    WindowCase(frames=3, chunk=2, overlap=2, prefix=3, masked=True, rope=True),
    WindowCase(frames=1, causal=True, prefix=2),
    # g / T is beyond fp32, and multiplied by 0: in rows without far frames, and in those without features
    WindowCase(frames=3, chunk=1, gain=2.0, far_apart=21.0),
    WindowCase(causal=True, chunk=1, overlap=0, gain=2.0, far_apart=21.0),
    WindowCase(frames=4, chunk=1, overlap=0, gain=2.0, far_apart=21.0, feature_map="relu"),
]


def make_window_inputs(case: WindowCase, device: str = "cpu") -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return the inputs {"q", "k", "v", "log_gain"[, "q_weight", "k_weight"]} and the gradient of the output."""
    rng = torch.Generator().manual_seed(0)
    dtype, dim, key_heads = DTYPES[case.dtype], case.head_dim, case.heads
    heads = key_heads * case.group

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    rows = normal(case.batch, case.tokens, heads + 2 * key_heads, dim)
    if case.far_apart:
        rows[:, :, : heads + key_heads, 0] = case.far_apart
        rows[:, :, heads : heads + key_heads, 0] *= -1
        if case.feature_map == "relu":  # then no query has a feature
            rows[:, :, :heads, 0] *= -1
            rows[:, :, heads : heads + key_heads, 0] *= -1
            rows[:, :, :heads] = -rows[:, :, :heads].abs()
    if case.masked:
        keep = kept_keys(rows, case.options["key_mask"], case.prefix)
        rows[:, :, heads:][~keep] = float("nan")
    if case.layout == "shared_batch":
        rows = rows[:1]
    parts = rows.to(device, dtype).split([heads, key_heads, key_heads], 2)
    if case.layout != "packed_qkv":
        parts = (_place(part, case.layout) for part in parts)
    inputs = {name: x.expand(case.batch, -1, -1, -1) for name, x in zip("qkv", parts, strict=True)}
    log_gain = (case.gain + 0.3 * normal(heads)).to(device, torch.float32)
    inputs["log_gain"] = log_gain if case.layout == "contiguous" else log_gain.repeat_interleave(2)[::2]
    if case.feature_map in WEIGHTED:
        for name, count in (("q_weight", heads), ("k_weight", key_heads)):
            weight = torch.eye(dim, dtype=torch.float64) + 0.5 * dim**-0.5 * normal(count, dim, dim)
            inputs[name] = weight.to(device, dtype)
    grad = normal(case.batch, case.tokens, heads, dim).to(device, dtype)
    return {name: x.detach().requires_grad_() for name, x in inputs.items()}, grad


def on(device: torch.device, options: dict) -> dict:
    """Return the options with their tensors on `device`."""
    moved = {name: x.to(device) if torch.is_tensor(x) else x for name, x in options.items()}
    return moved | ({"rope": tuple(x.to(device) for x in options["rope"])} if "rope" in options else {})


def run_window(op, inputs: dict, grad: torch.Tensor, options: dict) -> dict[str, torch.Tensor]:
    """Return the output and all gradients of `op` in float64: {"o", "dq", "dk", "dv", "dlog_gain"[, ...]}."""
    out = op(**inputs, **on(grad.device, options))
    assert out.shape == grad.shape and out.dtype == grad.dtype
    grads = torch.autograd.grad(out, list(inputs.values()), grad)
    for x, dx in zip(inputs.values(), grads, strict=True):
        assert x.shape == dx.shape and x.dtype == dx.dtype
    return {"o": out.detach().double()} | {f"d{name}": dx.double() for name, dx in zip(inputs, grads, strict=True)}


def window_truth(inputs: dict, grad: torch.Tensor, options: dict) -> dict[str, torch.Tensor]:
    """Run the reference in float64 on the same values. RoPE rounds its result to the inputs' dtype, as in `rotated`."""
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    options, dtype = dict(options), inputs["q"].dtype
    rope = options.pop("rope", None)

    def reference(**arguments):
        if rope is not None:
            arguments |= {name: rotated(arguments[name], rope, dtype) for name in "qk"}
        return window_attn_reference(**arguments)

    return run_window(reference, exact, grad.double(), options)


def clean_window(inputs: dict, device: torch.device, options: dict) -> tuple[dict, dict]:
    """Return the inputs as `clean` makes them, and the options other than rope on `device`."""
    options = on(device, options)
    rope = {"rope": options.pop("rope")} if "rope" in options else {}
    keep = kept_keys(inputs["k"], options.get("key_mask"), options["prefix_tokens"])
    return clean(inputs, rope | {"key_mask": keep}), options


@torch.no_grad()
def window_terms(inputs: dict, grad: torch.Tensor, options: dict, power: int) -> dict[str, torch.Tensor]:
    """Return, for each number of the results, (sum |term|^power)^(1/power) over the terms of the sums that lead to it.

    With weights w_ij and o = sum_j w_ij v_j, all gradients are sums of w_ij (do_i.v_j - do_i.o_i), which may cancel:
    with a single key, all but dv vanish. The terms don't.
    """
    u, options = clean_window(inputs, grad.device, options)
    group = u["q"].shape[2] // u["k"].shape[2]
    weights = {name: x for name, x in u.items() if name not in "qkv"}
    near, products, factor = window_weights(u["q"], u["k"], **weights, **options)
    do, (k, v) = grad.double(), (u[name].repeat_interleave(group, 2) for name in "kv")
    phi_q, pull_q = _features(options["feature_map"], u["q"], u.get("q_weight"), power)
    phi_k, pull_k = _features(options["feature_map"], u["k"], u.get("k_weight"), power)

    def sized(equation: str, *factors: torch.Tensor) -> torch.Tensor:
        return torch.einsum(equation, *(x.abs() ** power for x in factors))

    def over_group(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (-1, group)).sum(3)

    far = factor * products
    o = torch.einsum("bhnm,bmhd->bnhd", near + far, v)
    dot = torch.einsum("bnhd,bmhd->bhnm", do, v).abs() ** power
    dot = (dot + (do * o).sum(-1).transpose(1, 2)[..., None].abs() ** power) ** (1 / power)
    shares = factor * (products != 0) * dot  # of dphi_q and dphi_k
    scale = options.get("scale", u["q"].shape[-1] ** -0.5)
    dq, dq_weight = pull_q(sized("bhnm,bmhf->bnhf", shares, phi_k.repeat_interleave(group, 2)))
    dk, dk_weight = pull_k(over_group(sized("bhnm,bnhf->bmhf", shares, phi_q)))
    sizes = {
        "o": sized("bhnm,bmhd->bnhd", near + far, v),
        "dq": dq + sized("bhnm,bmhd->bnhd", scale * near * dot, k),
        "dk": dk + over_group(sized("bhnm,bnhd->bmhd", scale * near * dot, u["q"])),
        "dv": over_group(sized("bhnm,bnhd->bmhd", near + far, do)),
        "dlog_gain": ((far * dot).abs() ** power).sum((0, 2, 3)),
        "dq_weight": dq_weight,
        "dk_weight": dk_weight,
    }
    return {name: x ** (1 / power) for name, x in sizes.items() if x is not None}


def check_float32(case, inputs: dict, grad: torch.Tensor, actual: dict, of_terms: bool = False) -> None:
    """Assert that each error is at most 1e-5 of the largest value of its tensor or, with `of_terms`, of its terms.

    dlog_gain, whose few values are sums over all rows, is always compared with the root of the sum of its squared
    terms, since independent errors add in quadrature.
    """
    true, terms = window_truth(inputs, grad, case.options), window_terms(inputs, grad, case.options, 1)
    sizes = (terms if of_terms else true) | {"dlog_gain": window_terms(inputs, grad, case.options, 2)["dlog_gain"]}
    lines = []
    for name, x in true.items():
        error, size = (actual[name] - x).abs().max().item(), sizes[name].abs().max().item()
        if not error <= 1e-5 * size:
            lines.append(f"{name}: error {error:.2e}, largest value {x.abs().max():.2e}, allowed {1e-5 * size:.2e}")
    assert not lines, "\n".join([str(case), *lines])


def check_16_bits(case, inputs: dict, grad: torch.Tensor, actual: dict, softmax: dict) -> None:
    """Assert that the relative errors of o, dq, dk and dv are at most twice those of `softmax`, and bound the others.

    softmax: {name: relative error} of PyTorch's own softmax attention on the same q, k, v and do. The other gradients
        have no counterpart there. They are sums of terms whose factors are rounded once each, so that their errors add
        in quadrature, to u times the root of the sum of squares (see numerics.py); 2.5 u for single numbers, and for
        what rounding o causes (`rounding_o`), which may come from a few rows.
    """
    true, terms = window_truth(inputs, grad, case.options), window_terms(inputs, grad, case.options, 2)
    from_o = rounding_o(inputs, grad, true["o"], case.options)
    info, lines = torch.finfo(DTYPES[case.dtype]), []
    u = info.eps / 2
    for name, x in true.items():
        error, size = (actual[name] - x).norm().item(), x.norm().item()
        if name in softmax:
            bound = 2 * softmax[name] * size
        else:
            single = 2.5 if name == "dlog_gain" else 1
            squares = size**2 + terms[name].norm().item() ** 2
            bound = u * (single**2 * squares + (2.5 * from_o[name]) ** 2) ** 0.5
        bound += u * info.tiny * x.numel() ** 0.5  # half a step between subnormal results
        if not error <= bound:
            lines.append(f"{name}: error {error:.2e} of {size:.2e}, allowed {bound:.2e}")
    assert not lines, "\n".join([str(case), *lines])


def rounding_o(inputs: dict, grad: torch.Tensor, o: torch.Tensor, options: dict) -> dict[str, float]:
    """Return the norms of the errors of dlog_gain and of the gradients of the weights that rounding o causes, over u.

    A backward subtracts do_i.o_i, with the rounded o_i, for every key of query i, so that its errors do not average out
    over the keys. An error e_i of do_i.o_i changes the gradients by those of -sum_i e_i log T_i, T being the
    normaliser. The e_i are independent, and of size u |do_i o_i|: random signs give the root of the sum of squares.
    """
    u, options = clean_window(inputs, grad.device, options)
    small = {name: x.requires_grad_() for name, x in u.items() if name not in "qkv"}
    _, products, factor = window_weights(u["q"], u["k"], **small, **options)
    has_far = (products > 0).any(-1)
    log_t = (small["log_gain"][:, None] - factor.squeeze(-1).log())[has_far]
    sizes = (grad.double() * o).norm(dim=-1).transpose(1, 2)[has_far]
    rng, draws, squares = torch.Generator().manual_seed(3), 8, dict.fromkeys(small, 0.0)
    for _ in range(draws):
        signs = torch.randint(2, sizes.shape, generator=rng).to(sizes) * 2 - 1
        grads = torch.autograd.grad((signs * sizes * log_t).sum(), list(small.values()), retain_graph=True)
        for name, dx in zip(small, grads, strict=True):
            squares[name] += dx.norm().item() ** 2 / draws
    return {f"d{name}": x**0.5 for name, x in squares.items()}


def softmax_errors(inputs: dict, grad: torch.Tensor, options: dict) -> dict[str, float]:
    """Return the relative errors of o, dq, dk and dv of PyTorch's softmax attention over all tokens, in this dtype."""
    q, k, v = (inputs[name].detach().contiguous() for name in "qkv")  # else it may be computed in another way
    keep = kept_keys(k, options.get("key_mask"), options["prefix_tokens"]).to(grad.device)
    mask = None if keep.all() else keep[:, None, None]
    rows = q, *(torch.where(keep[..., None, None], x, 0.0) for x in (k, v))
    group = q.shape[2] // k.shape[2]

    def attention(dtype):
        q, k, v = (x.to(dtype).requires_grad_() for x in rows)
        heads = (q, *(x.repeat_interleave(group, 2) for x in (k, v)))
        out = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in heads), attn_mask=mask)
        out = out.transpose(1, 2)
        return [x.double() for x in (out, *torch.autograd.grad(out, (q, k, v), grad.to(dtype)))]

    pairs = zip(("o", "dq", "dk", "dv"), attention(grad.dtype), attention(torch.float64), strict=True)
    return {name: ((x - true).norm() / true.norm()).item() for name, x, true in pairs}
