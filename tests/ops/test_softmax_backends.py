"""The softmax backends: the CPU's against float64, and how the others call their libraries, which need a GPU."""

import inspect
import math
import types

import pytest
import torch
from cases import LAYOUTS, _place
from numerics import unit_roundoff

from linvideo.ops import softmax_backends
from linvideo.ops.softmax_backends import BACKENDS, PACKAGES, choose

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCALE = 0.3
CPU = softmax_backends._FUNCTIONS["cpu"]


def rows(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make(dtype, queries=37, keys=50, batch=2):
    """Return q, k, v and do; k and v are overlapping windows of one video."""
    q, do = (rows(batch, queries, 3, 16, dtype=dtype, seed=seed) for seed in (0, 1))
    long = [rows(keys + 20 * (batch - 1), 3, 16, dtype=dtype, seed=seed) for seed in (2, 3)]
    return q, *(x.unfold(0, keys, 20).permute(0, 3, 1, 2) for x in long), do


def keys_to_keep(batch, keys):
    """Return a mask that leaves no key of the second entry."""
    mask = torch.rand(batch, keys, generator=torch.Generator().manual_seed(4)) < 0.7
    mask[1] = False
    return mask


def exact(q, k, v, do, mask=None):
    """Return o, lse, dq, dk and dv of dense attention in float64."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    logits = SCALE * torch.einsum("bnhd,bmhd->bhnm", q, k)
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, None], softmax_backends.LEFT_OUT)
    o = torch.einsum("bhnm,bmhd->bnhd", logits.softmax(-1), v)
    return o.detach(), logits.logsumexp(-1).detach(), *torch.autograd.grad(o, (q, k, v), do.double())


def results(functions, q, k, v, do, mask=None):
    forward, backward = functions[-2:]
    o, lse = forward(q, k, v, SCALE, mask)
    assert lse.dtype == torch.float32
    return o, lse, *backward(do, q, k, v, o, lse, SCALE, mask)


def assert_close(actual, expected, dtype):
    """A few roundings of the largest value: probabilities, o and do . o are rounded to the dtype on the way.

    PyTorch's 16-bit kernel approximates exp to about 16 bits, which is what its lse shows.
    """
    for name, x, y in zip(("o", "lse", "dq", "dk", "dv"), actual, expected, strict=True):
        assert x.shape == y.shape, name
        unit = unit_roundoff(dtype) if name != "lse" else 2**-24 if dtype == torch.float32 else 2**-18
        assert (x.double() - y).abs().max() <= 16 * unit * max(y.abs().max().item(), 1), name


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cpu_against_float64(dtype, masked):
    q, k, v, do = make(dtype)
    mask = keys_to_keep(*k.shape[:2]) if masked else None
    got = results(choose(None, q, masked, training=True), q, k, v, do, mask)
    assert all(x.isfinite().all() for x in got)
    assert not masked or got[1][1].max() < -1e4
    some = slice(0, 1) if masked else slice(None)  # a row without keys only has to be finite
    assert_close(
        [x[some] for x in got],
        exact(*(x[some] for x in (q, k, v, do)), None if mask is None else mask[some]),
        dtype,
    )


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_a_share_of_the_keys(masked):
    """With o and lse of all keys, the backward of some keys returns their share, which is 0 without any key."""
    q, k, v, do = make(torch.float32, batch=2)
    mask = keys_to_keep(*k.shape[:2]) if masked else None
    forward, backward = CPU
    parts = [(slice(0, 20), None), (slice(20, 50), None)]
    if masked:
        mask[1] = False
        mask[1, :3] = True  # none is left in the second part
        parts = [(keys, mask[:, keys]) for keys, _ in parts]
    o, lse, *expected = exact(q, k, v, do, mask)
    o, lse = o.float(), lse.float()
    pairs = [backward(do, q, k[:, keys], v[:, keys], o, lse, SCALE, kept) for keys, kept in parts]
    dq, dk, dv = pairs[0][0] + pairs[1][0], *(torch.cat(x, 1) for x in list(zip(*pairs, strict=True))[1:])
    assert_close((o, lse, dq, dk, dv), (o.double(), lse.double(), *expected), torch.float32)
    if masked:
        assert not dk[1, 20:].any() and not dv[1, 20:].any()


@pytest.mark.parametrize("name", ["flash", "cudnn", "efficient"])
def test_operators_accept_the_calls(name):
    """PyTorch's own shape functions of its CUDA operators, on tensors without values."""
    q, k, v, do = (torch.empty_like(x, device="meta") for x in make(torch.bfloat16))
    mask = torch.empty(k.shape[:2], dtype=torch.bool, device="meta") if name == "efficient" else None
    got = results(softmax_backends._FUNCTIONS[name], q, k, v, do, mask)
    assert [x.shape for x in got] == [q.shape, (2, 3, 37), q.shape, k.shape, v.shape]


class Stand:
    """PyTorch's CUDA operators, computed by the CPU's; arguments are bound to the real schemas."""

    def __init__(self, stats_dims=3):
        self.stats_dims = stats_dims

    def __getattr__(self, name):
        real = getattr(torch.ops.aten, name).default

        def call(*args, **kwargs):
            schema = real._schema.arguments
            given = dict(zip((x.name for x in schema), args, strict=False)) | kwargs
            assert len(given) == len(args) + len(kwargs) and set(given) <= {x.name for x in schema}
            missing = [x.name for x in schema if x.name not in given and not x.has_default_value()]
            assert not missing, missing
            return getattr(self, f"run{name}")(types.SimpleNamespace(**given))

        return call

    def forward(self, x, bias=None):
        assert all(rows.stride(-1) == 1 for rows in (x.query, x.key, x.value))
        settings = {"attn_mask": bias, "scale": x.scale}
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(x.query, x.key, x.value, **settings)

    def backward(self, x, do, lse, bias=None):
        assert lse.is_contiguous() and x.dropout_p == 0 and not x.is_causal
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        given = x.query, x.key, x.value, x.out, lse.contiguous()
        return op(do, *given, dropout_p=0.0, is_causal=False, attn_mask=bias, scale=x.scale)

    def run_scaled_dot_product_flash_attention(self, x):
        return *self.forward(x), None, None, x.query.shape[2], x.key.shape[2], None, None, None

    def run_scaled_dot_product_flash_attention_backward(self, x):
        assert (x.max_q, x.max_k, x.cum_seq_q, x.cum_seq_k) == (x.query.shape[2], x.key.shape[2], None, None)
        return self.backward(x, x.grad_out, x.logsumexp)

    def run_scaled_dot_product_cudnn_attention(self, x):
        assert x.compute_log_sumexp and x.attn_bias is None
        o, lse = self.forward(x) if "scale" in vars(x) else (x.query, x.query[..., 0])
        return o, lse.reshape(lse.shape + (1,) * (self.stats_dims - 3)), *(None,) * 7

    def run_scaled_dot_product_cudnn_attention_backward(self, x):
        assert x.logsumexp.dim() == self.stats_dims and x.attn_bias is None
        assert x.query.stride() == x.out.stride() == x.grad_out.stride()
        return self.backward(x, x.grad_out, x.logsumexp.reshape(x.logsumexp.shape[:3]))

    @staticmethod
    def check_bias(x):
        if x.attn_bias is not None:
            assert x.attn_bias.shape == (*x.query.shape[:3], x.key.shape[2])
            assert x.attn_bias.dtype == x.query.dtype and x.attn_bias.stride(-1) == 1
            assert all(stride % 16 == 0 for stride in x.attn_bias.stride()[:-1])
        return x.attn_bias

    def run_scaled_dot_product_efficient_attention(self, x):
        assert x.compute_log_sumexp
        o, lse = self.forward(x, self.check_bias(x))
        return o, torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=math.inf), None, None

    def run_scaled_dot_product_efficient_attention_backward(self, x):
        count = x.query.shape[2]
        assert x.grad_input_mask == [True, True, True, False]
        assert x.logsumexp.shape[-1] == -(-count // 32) * 32 and (x.logsumexp[..., count:] == math.inf).all()
        lse = x.logsumexp[..., :count].contiguous()
        return *self.backward(x, x.grad_out_, lse, self.check_bias(x)), None


@pytest.mark.parametrize(
    ("name", "stats_dims", "masked"),
    [("flash", 3, False), ("cudnn", 3, False), ("cudnn", 4, False), ("efficient", 3, False), ("efficient", 3, True)],
)
def test_calls_of_cuda_operators(monkeypatch, name, stats_dims, masked):
    q, k, v, do = make(torch.bfloat16)
    mask = keys_to_keep(*k.shape[:2]) if masked else None
    expected = results(CPU, q, k, v, do, mask)
    monkeypatch.setattr(softmax_backends, "aten", Stand(stats_dims))
    softmax_backends._cudnn_lse_dims.cache_clear()
    try:
        got = results(softmax_backends._FUNCTIONS[name], q, k, v, do.transpose(1, 2).contiguous().transpose(1, 2), mask)
    finally:
        softmax_backends._cudnn_lse_dims.cache_clear()
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y)


def package(name: str, monkeypatch) -> list:
    """Install a stand-in of a FlashAttention package, with the signatures of its functions; return its calls."""
    calls = []

    def forward(q, k, v, softmax_scale):
        calls.append("forward")
        return CPU[0](q, k, v, softmax_scale)

    def backward(dout, q, k, v, out, lse, softmax_scale):
        calls.append("backward")
        assert lse.is_contiguous() and lse.dtype == torch.float32
        assert all(x.stride(-1) == 1 for x in (dout, q, k, v, out))
        return CPU[1](dout, q, k, v, out, lse, softmax_scale)

    module = types.ModuleType("stand_in")
    if name == "flash_attn_2":

        def flash_attn_func(
            q,
            k,
            v,
            dropout_p=0.0,
            softmax_scale=None,
            causal=False,
            window_size=(-1, -1),
            softcap=0.0,
            alibi_slopes=None,
            deterministic=False,
            return_attn_probs=False,
        ):
            o, lse = forward(q, k, v, softmax_scale)
            return (o, lse, None) if return_attn_probs else o

        def _flash_attn_backward(
            dout,
            q,
            k,
            v,
            out,
            softmax_lse,
            dq,
            dk,
            dv,
            dropout_p,
            softmax_scale,
            causal,
            window_size_left,
            window_size_right,
            softcap,
            alibi_slopes,
            deterministic,
            rng_state=None,
        ):
            assert (dropout_p, causal, window_size_left, window_size_right, softcap) == (0, False, -1, -1, 0)
            for grad, x in zip((dq, dk, dv), backward(dout, q, k, v, out, softmax_lse, softmax_scale), strict=True):
                grad.copy_(x)

        module.flash_attn_func, module._flash_attn_backward = flash_attn_func, _flash_attn_backward
    elif name == "flash_attn_3":

        def flash_attn_func(
            q,
            k,
            v,
            softmax_scale=None,
            causal=False,
            qv=None,
            q_descale=None,
            k_descale=None,
            v_descale=None,
            window_size=(-1, -1),
            attention_chunk=0,
            softcap=0.0,
            num_splits=1,
            pack_gqa=None,
            deterministic=False,
            sm_margin=0,
            return_attn_probs=False,
        ):
            o, lse = forward(q, k, v, softmax_scale)
            return (o, lse) if return_attn_probs else o

        def _flash_attn_backward(
            dout,
            q,
            k,
            v,
            out,
            softmax_lse,
            cu_seqlens_q=None,
            cu_seqlens_k=None,
            sequed_q=None,
            sequed_k=None,
            max_seqlen_q=None,
            max_seqlen_k=None,
            dq=None,
            dk=None,
            dv=None,
            softmax_scale=None,
            is_causal=False,
            window_size_left=-1,
            window_size_right=-1,
            softcap=0.0,
            deterministic=False,
            sm_margin=0,
        ):
            packed = cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q, max_seqlen_k
            assert packed == (None,) * 6 and is_causal is False and deterministic is False
            for grad, x in zip((dq, dk, dv), backward(dout, q, k, v, out, softmax_lse, softmax_scale), strict=True):
                grad.copy_(x)

        module.flash_attn_func, module._flash_attn_backward = flash_attn_func, _flash_attn_backward
    else:

        def _flash_attn_fwd(q, k, v, qv=None, cu_seqlens_q=None, *, softmax_scale=None, causal=False, return_lse=False):
            o, lse = forward(q, k, v, softmax_scale)
            return o, lse if return_lse else None, None, None

        def _flash_attn_bwd(q, k, v, out, dout, lse, softmax_scale=None, causal=False, *, deterministic=False):
            return backward(dout, q, k, v, out, lse, softmax_scale)

        module._flash_attn_fwd, module._flash_attn_bwd = _flash_attn_fwd, _flash_attn_bwd
    complete, _ = PACKAGES[name]
    monkeypatch.setattr(softmax_backends.importlib, "import_module", {complete[0]: module}.__getitem__)
    return calls


@pytest.mark.parametrize("name", PACKAGES)
def test_calls_of_packages(monkeypatch, name):
    q, k, v, do = make(torch.bfloat16)
    expected = results(CPU, q, k, v, do)
    calls = package(name, monkeypatch)
    got = results(choose(name, on_cuda(q.dtype), masked=False, training=True), q, k, v, do)
    assert calls == ["forward", "backward"]
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def on_cuda(dtype):
    return types.SimpleNamespace(device=torch.device("cuda"), dtype=dtype)


def test_defaults(monkeypatch):
    for dtype in DTYPES:
        assert choose(None, torch.zeros(1, dtype=dtype), masked=True, training=True).name == "cpu"
        wide = dtype == torch.float32
        assert choose(None, on_cuda(dtype), masked=False, training=True).name == ("efficient" if wide else "flash")
        assert choose(None, on_cuda(dtype), masked=True, training=True).name == "efficient"
    package("flash_attn_2", monkeypatch)
    for name in ("flash", "cudnn", "flash_attn_2"):
        assert choose(name, on_cuda(torch.bfloat16), masked=False, training=True).name == name
        assert choose(name, on_cuda(torch.bfloat16), masked=True, training=True).name == "efficient"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_aligned(layout):
    x = _place(rows(2, 5, 3, 16, dtype=torch.bfloat16), layout)
    y = softmax_backends.aligned(x)
    assert torch.equal(x, y) and (y is x) == (layout not in ("guarded", "last_stride_2"))
    assert y.data_ptr() % 16 == 0 and y.stride(-1) == 1 and not any(stride % 8 for stride in y.stride()[:-1])


def test_every_backend_has_the_same_arguments():
    assert list(softmax_backends._FUNCTIONS) == list(BACKENDS)
    for forward, backward in softmax_backends._FUNCTIONS.values():
        assert list(inspect.signature(forward).parameters) == ["q", "k", "v", "scale", "mask"]
        assert list(inspect.signature(backward).parameters) == ["do", "q", "k", "v", "o", "lse", "scale", "mask"]


@pytest.mark.parametrize(
    ("name", "q", "message"),
    [
        ("sage", torch.zeros(1), "expected a softmax backend of cpu, .*, got 'sage'"),
        ("flash", torch.zeros(1), "expected tensors on cuda for the softmax backend 'flash', got cpu"),
        ("cpu", on_cuda(torch.bfloat16), "expected tensors on cpu for the softmax backend 'cpu', got cuda"),
        ("cudnn", on_cuda(torch.float32), "expected float16 or bfloat16 for the softmax backend 'cudnn', got float32"),
        ("flash_attn_4", on_cuda(torch.bfloat16), "expected flash_attn.cute.interface installed for .*, got no such"),
    ],
)
def test_refusals(monkeypatch, name, q, message):
    def missing(module):
        raise ModuleNotFoundError(name="flash_attn")

    monkeypatch.setattr(softmax_backends.importlib, "import_module", missing)
    with pytest.raises(ValueError, match=message):
        choose(name, q, masked=False, training=True)


def test_packages_without_a_backward_or_broken(monkeypatch):
    modules = {"fa3_fwd_interface": types.ModuleType("fa3_fwd_interface")}

    def load(name):
        if name not in modules:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return modules[name]

    def broken(name):
        raise ImportError("undefined symbol", name="flash_attn_2_cuda")

    monkeypatch.setattr(softmax_backends.importlib, "import_module", load)
    assert choose("flash_attn_3", on_cuda(torch.float16), masked=False, training=False).name == "flash_attn_3"
    with pytest.raises(ValueError, match="expected flash_attn_interface with a backward for .*'flash_attn_3'"):
        choose("flash_attn_3", on_cuda(torch.float16), masked=False, training=True)
    monkeypatch.setattr(softmax_backends.importlib, "import_module", broken)
    with pytest.raises(ValueError, match="to load, got: undefined symbol"):
        choose("flash_attn_2", on_cuda(torch.float16), masked=False, training=False)
