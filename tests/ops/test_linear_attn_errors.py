"""Bad input gives one line that says what was expected and what came."""

import pytest
import torch

from linvideo.ops import linear_attn

B, N, H, D = 2, 5, 3, 16


def arguments(**changes) -> dict:
    weights = {name: torch.randn(H, D, D) for name in ("q_weight", "k_weight")}
    good = {name: torch.randn(B, N, H, D) for name in ("q", "k", "v")} | weights
    return {name: x for name, x in (good | changes).items() if x is not None}


def plain(feature_map: str = "elu", **changes) -> dict:
    return arguments(**{"q_weight": None, "k_weight": None, "feature_map": feature_map} | changes)


def same_d(d: int) -> dict:
    return plain(**{name: torch.randn(B, N, H, d) for name in ("q", "k", "v")})


def cast(dtype: torch.dtype) -> dict:
    return plain(**{name: torch.ones(B, N, H, D, dtype=dtype) for name in ("q", "k", "v")})


BAD = {
    "q 3-D": (arguments(q=torch.randn(N, H, D)), r"q of shape \[B, N, H, D\], got 3"),
    "k 5-D": (arguments(k=torch.randn(1, B, N, H, D)), r"k of shape \[B, N, H, D\], got 5"),
    "v 2-D": (arguments(v=torch.randn(N, D)), r"v of shape \[B, N, H, D\], got 2"),
    "float64": (cast(torch.float64), r"float32, float16, bfloat16, got torch.float64"),
    "int64": (cast(torch.int64), r"float32, float16, bfloat16, got torch.int64"),
    "mixed dtypes": (arguments(v=torch.randn(B, N, H, D).half()), r"one dtype .*, got torch.float32, v torch.float16"),
    "devices": (arguments(k=torch.randn(B, N, H, D, device="meta")), r"one device, got q on cpu, k on meta"),
    "D 12": (same_d(12), r"multiple of 8 up to 128, got 12"),
    "D 4": (same_d(4), r"multiple of 8 up to 128, got 4"),
    "D 136": (same_d(136), r"multiple of 8 up to 128, got 136"),
    "D 0": (same_d(0), r"multiple of 8 up to 128, got 0"),
    "k batch": (arguments(k=torch.randn(1, N, H, D)), r"k of shape \[2, Nk, 3, 16\].*, got \(1, 5, 3, 16\)"),
    "k heads": (arguments(k=torch.randn(B, N, 1, D)), r"k of shape \[2, Nk, 3, 16\].*, got \(2, 5, 1, 16\)"),
    "k D": (arguments(k=torch.randn(B, N, H, 8)), r"k of shape \[2, Nk, 3, 16\].*, got \(2, 5, 3, 8\)"),
    "v length": (arguments(v=torch.randn(B, N + 1, H, D)), r"v of .* \(2, 5, 3, 16\), got \(2, 6, 3, 16\)"),
    "v D": (arguments(v=torch.randn(B, N, H, 32)), r"v of .* \(2, 5, 3, 16\), got \(2, 5, 3, 32\)"),
    "no queries": (arguments(q=torch.randn(B, 0, H, D)), r"at least one .*, got q \(2, 0, 3, 16\)"),
    "no keys": (arguments(**{x: torch.randn(B, 0, H, D) for x in "kv"}), r"at least one .* k \(2, 0, 3, 16\)"),
    "unknown map": (arguments(feature_map="taylor"), r"feature_map to be one of hedgehog, .*, got 'taylor'"),
    "identity": (plain("identity"), r"normalize=False with feature_map='identity'"),
    "no q_weight": (arguments(q_weight=None), r"q_weight of shape \[3, 16, 16\] with .*, got None"),
    "no k_weight": (arguments(k_weight=None), r"k_weight of shape \[3, 16, 16\] with .*, got None"),
    "needless q_weight": (plain(q_weight=torch.randn(H, D, D)), r"no q_weight with the parameter-free .*'elu'"),
    "needless k_weight": (plain(k_weight=torch.randn(H, D, D)), r"no k_weight with the parameter-free .*'elu'"),
    "shared weight": (arguments(q_weight=torch.randn(D, D)), r"q_weight of shape \[3, 16, 16\], got \(16, 16\)"),
    "wide weight": (arguments(k_weight=torch.randn(H, D, 8)), r"k_weight of shape \[3, 16, 16\], got \(3, 16, 8\)"),
    "int weight": (arguments(q_weight=torch.ones(H, D, D).long()), r"q_weight in float32.*, got torch.int64"),
    "weight device": (arguments(k_weight=torch.ones(H, D, D, device="meta")), r"k_weight on .*cpu, got meta"),
    "eps 0": (arguments(eps=0.0), r"eps > 0, got 0"),
    "eps < 0": (arguments(eps=-1e-6), r"eps > 0, got -1e-06"),
    "eps below float32": (arguments(eps=1e-50), r"eps > 0, got 1e-50"),
    "eps nan": (arguments(eps=float("nan")), r"eps > 0, got nan"),
    "scale inf": (plain(normalize=False, scale=float("inf")), r"finite scale, got inf"),
}


@pytest.mark.parametrize("name", BAD)
def test_says_what_was_expected_and_what_came(name):
    bad, message = BAD[name]
    with pytest.raises(ValueError, match=message) as error:
        linear_attn(**bad)
    assert str(error.value).startswith("expected ") and "\n" not in str(error.value)


def test_the_unchanged_arguments_are_good():
    assert linear_attn(**arguments()).shape == (B, N, H, D)
    assert linear_attn(**plain()).shape == (B, N, H, D)
    assert linear_attn(**plain("identity", normalize=False)).shape == (B, N, H, D)
