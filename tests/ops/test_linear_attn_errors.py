"""Bad input gives one line that says what was expected and what came, from the op and from its two halves."""

import inspect
import re

import pytest
import torch

from linvideo.ops import checks, linear_attn, linear_attn_apply, linear_attn_state

B, N, H, D = 2, 5, 3, 16
F = 2 * D


def rows(*shape: int, **settings) -> torch.Tensor:
    return torch.randn(*(shape or (B, N, H, D)), **settings)


def table(*shape: int, **settings) -> tuple[torch.Tensor, torch.Tensor]:
    shape = shape or (N, D // 2)
    return torch.ones(*shape, **settings), torch.ones(N, D // 2)


def ends(*values: int, dtype=torch.int32, **settings) -> torch.Tensor:
    return torch.tensor(values or (0, 2, N), dtype=dtype, **settings)


def given(good: dict, changes: dict) -> dict:
    return {name: x for name, x in (good | changes).items() if x is not None}


def arguments(**changes) -> dict:
    weights = {name: torch.randn(H, D, D) for name in ("q_weight", "k_weight")}
    return given({name: rows() for name in ("q", "k", "v")} | weights, changes)


def plain(feature_map: str = "elu", **changes) -> dict:
    return arguments(**{"q_weight": None, "k_weight": None, "feature_map": feature_map} | changes)


def packed(**changes) -> dict:
    """Return good arguments with two packed sequences, rows [total, H, D]."""
    good = {"cu_seqlens_q": ends(), "cu_seqlens_k": ends()} | {name: rows(N, H, D) for name in ("q", "k", "v")}
    return arguments(**good | changes)


def state(**changes) -> dict:
    return given({"k": rows(), "v": rows(), "k_weight": torch.randn(H, D, D)}, changes)


def apply(**changes) -> dict:
    good = {"q": rows(), "S": rows(B, H, F, D), "z": torch.ones(B, H, F), "q_weight": torch.randn(H, D, D)}
    return given(good, changes)


def same_d(d: int) -> dict:
    return plain(**{name: torch.randn(B, N, H, d) for name in ("q", "k", "v")})


def cast(dtype: torch.dtype) -> dict:
    return plain(**{name: torch.ones(B, N, H, D, dtype=dtype) for name in ("q", "k", "v")})


def mixed(softmax_out=None, r=None) -> dict:
    return {"mix": (rows() if softmax_out is None else softmax_out, torch.tensor([0.5]) if r is None else r)}


META = {"device": "meta"}
ROWS = {
    "q 3-D": (arguments(q=rows(N, H, D)), r"q of shape \[B, N, H, D\], got 3"),
    "k 5-D": (arguments(k=rows(1, B, N, H, D)), r"k of shape \[B, N, H, D\], got 5"),
    "v 2-D": (arguments(v=rows(N, D)), r"v of shape \[B, N, H, D\], got 2"),
    "int64": (cast(torch.int64), r"one dtype of float32, float16, bfloat16 and, .* float64, got q torch.int64"),
    "k float64": (arguments(k=rows().double()), r"one dtype of .*, got torch.float32 and k torch.float64"),
    "q list": (arguments(q=[1.0]), r"q to be a tensor, got list"),
    "k number": (arguments(k=1.0), r"k to be a tensor, got float"),
    "v array": (arguments(v=rows().numpy()), r"v to be a tensor, got ndarray"),
    "k mixed": (arguments(k=rows().bfloat16()), r"one dtype .*, got torch.float32 and k torch.bfloat16"),
    "v mixed": (arguments(v=rows().half()), r"one dtype .*, got torch.float32 and v torch.float16"),
    "k device": (arguments(k=rows(**META)), r"q, k, v on one device, got cpu and k on meta"),
    "v device": (arguments(v=rows(**META)), r"q, k, v on one device, got cpu and v on meta"),
    "D 12": (same_d(12), r"multiple of 8 up to 128, got 12"),
    "D 4": (same_d(4), r"multiple of 8 up to 128, got 4"),
    "D 136": (same_d(136), r"multiple of 8 up to 128, got 136"),
    "D 0": (same_d(0), r"multiple of 8 up to 128, got 0"),
    "k batch": (arguments(k=rows(1, N, H, D), v=rows(1, N, H, D)), r"k of shape \[2, Nk, Hk, 16\].*\(1, 5, 3, 16\)"),
    "k heads": (arguments(k=rows(B, N, 2, D), v=rows(B, N, 2, D)), r"Hk a divisor of 3, .* got \(2, 5, 2, 16\)"),
    "k more heads": (arguments(k=rows(B, N, 6, D), v=rows(B, N, 6, D)), r"Hk a divisor of 3, .* got \(2, 5, 6, 16\)"),
    "k D": (arguments(k=rows(B, N, H, 8), v=rows(B, N, H, 8)), r"k of shape \[2, Nk, Hk, 16\].* got \(2, 5, 3, 8\)"),
    "v length": (arguments(v=rows(B, N + 1, H, D)), r"v of .* \(2, 5, 3, 16\), got \(2, 6, 3, 16\)"),
    "v heads": (arguments(v=rows(B, N, 1, D)), r"v of .* \(2, 5, 3, 16\), got \(2, 5, 1, 16\)"),
    "v D": (arguments(v=rows(B, N, H, 32)), r"v of .* \(2, 5, 3, 16\), got \(2, 5, 3, 32\)"),
    "no heads": (plain(**{x: rows(B, N, 0, D) for x in "qkv"}), r"at least one head, got q \(2, 5, 0, 16\)"),
    "no key heads": (plain(**{x: rows(B, N, 0, D) for x in "kv"}), r"at least one head, got k \(2, 5, 0, 16\)"),
}
FEATURES = {
    "unknown map": (arguments(feature_map="taylor"), r"feature_map to be one of hedgehog, .*, got 'taylor'"),
    "no q_weight": (arguments(q_weight=None), r"q_weight of shape \[3, 16, 16\] with .*, got None"),
    "no k_weight": (arguments(k_weight=None), r"k_weight of shape \[3, 16, 16\] with .*, got None"),
    "joint without": (arguments(feature_map="hedgehog_joint", q_weight=None), r"q_weight .*'hedgehog_joint', got None"),
    "needless q_weight": (plain(q_weight=torch.randn(H, D, D)), r"no q_weight with the parameter-free .*'elu'"),
    "needless k_weight": (plain(k_weight=torch.randn(H, D, D)), r"no k_weight with the parameter-free .*'elu'"),
    "shared weight": (arguments(q_weight=torch.randn(D, D)), r"q_weight of shape \[3, 16, 16\], got \(16, 16\)"),
    "wide weight": (arguments(k_weight=torch.randn(H, D, 8)), r"k_weight of shape \[3, 16, 16\], got \(3, 16, 8\)"),
    "grouped weight": (arguments(k=rows(B, N, 1, D), v=rows(B, N, 1, D)), r"k_weight of shape \[1, 16, 16\], got \(3"),
    "int weight": (arguments(q_weight=torch.ones(H, D, D).long()), r"q_weight in float32.*, got torch.int64"),
    "weight device": (arguments(k_weight=torch.ones(H, D, D, **META)), r"k_weight on .*cpu, got meta"),
    "precision": (arguments(fp32_precision="tf32"), r"fp32_precision to be one of ieee, tf32x3, got 'tf32'"),
    "eps 0": (arguments(eps=0.0), r"eps > 0, got 0"),
    "eps < 0": (arguments(eps=-1e-6), r"eps > 0, got -1e-06"),
    "eps below float32": (arguments(eps=1e-50), r"eps > 0, got 1e-50"),
    "eps nan": (arguments(eps=float("nan")), r"finite eps, got nan"),
    "scale inf": (plain(normalize=False, scale=float("inf")), r"finite scale, got inf"),
}
OPTIONS = {
    "rope one": (arguments(rope=torch.ones(N, D // 2)), r"rope to be two tensors \(cos, sin\), got Tensor"),
    "rope three": (arguments(rope=(*table(), rows())), r"rope to be two tensors \(cos, sin\), got tuple"),
    "rope numbers": (arguments(rope=(1.0, 0.0)), r"rope to be two tensors \(cos, sin\), got tuple"),
    "rope width": (arguments(rope=table(N, D)), r"rope's cos of shape \[5, 8\], \[N, D/2\], got \(5, 16\)"),
    "rope length": (arguments(rope=table()[::-1][:1] + table(4, 8)[:1]), r"rope's sin of shape \[5, 8\].*got \(4, 8\)"),
    "rope batch": (arguments(rope=table(B, N, D // 2)), r"rope's cos of shape \[5, 8\].*got \(2, 5, 8\)"),
    "rope dtype": (arguments(rope=table(dtype=torch.float64)), r"rope's cos in float32, .*, got torch.float64"),
    "rope device": (arguments(rope=table(**META)), r"rope's cos on the rows' device cpu, got meta"),
    "rope of two": (arguments(k=rows(B, 7, H, D), v=rows(B, 7, H, D), rope=table()), r"rope, got 7 keys, 5 queries"),
    "mix one": (arguments(mix=rows()), r"mix to be two tensors \(softmax_out, r\), got Tensor"),
    "mix number": (arguments(mix=(rows(), 0.5)), r"mix to be two tensors \(softmax_out, r\), got tuple"),
    "mix short": (arguments(mix=(rows(),)), r"mix to be two tensors \(softmax_out, r\), got tuple"),
    "mix shape": (arguments(**mixed(rows(B, N, 1, D))), r"softmax_out like q, .*, got \(2, 5, 1, 16\) torch.float32"),
    "mix dtype": (arguments(**mixed(rows().half())), r"softmax_out like q, .*, got \(2, 5, 3, 16\) torch.float16"),
    "mix device": (arguments(**mixed(rows(**META))), r"softmax_out on the rows' device cpu, got meta"),
    "r of two": (arguments(**mixed(r=torch.ones(2))), r"r to be one number in float32, .*, got \(2,\) torch.float32"),
    "r of none": (arguments(**mixed(r=torch.ones(0))), r"r to be one number in float32, .*, got \(0,\)"),
    "r int": (arguments(**mixed(r=torch.tensor(1))), r"r to be one number in float32, .*, got \(\) torch.int64"),
    "r device": (arguments(**mixed(r=torch.ones(1, **META))), r"r on the rows' device cpu, got meta"),
    "mask int": (arguments(key_mask=torch.ones(B, N).int()), r"key_mask to be bool of shape \[2, 5\], .* torch.int32"),
    "mask shape": (arguments(key_mask=torch.ones(N).bool()), r"key_mask to be bool of shape \[2, 5\].*\(5,\)"),
    "mask per head": (arguments(key_mask=torch.ones(B, H, N).bool()), r"key_mask to be bool .*\(2, 3, 5\)"),
    "mask device": (arguments(key_mask=torch.ones(B, N, **META).bool()), r"key_mask on .* cpu, got meta"),
}
PACKED = {
    "q alone": (packed(cu_seqlens_k=None), r"cu_seqlens_q and cu_seqlens_k of one shape, or neither"),
    "k alone": (arguments(cu_seqlens_k=ends()), r"cu_seqlens_q and cu_seqlens_k of one shape, or neither"),
    "other lengths": (packed(cu_seqlens_k=ends(0, N)), r"cu_seqlens_q and cu_seqlens_k of one shape, or neither"),
    "float": (packed(cu_seqlens_q=ends().float()), r"cu_seqlens_q to be int32 or int64 .*, got torch.float32 \(3,\)"),
    "list": (packed(cu_seqlens_k=[0, 2, N]), r"cu_seqlens_k to be a tensor, got list"),
    "2-D": (packed(**{f"cu_seqlens_{x}": ends()[None] for x in "qk"}), r"cu_seqlens_k to be int32 or int64 .*\(1, 3\)"),
    "no sequence": (packed(**{f"cu_seqlens_{x}": ends()[:1] for x in "qk"}), r"of shape \[sequences \+ 1\].*\(1,\)"),
    "device": (packed(cu_seqlens_k=ends(**META)), r"cu_seqlens_k on the rows' device cpu, got meta"),
    "batch": (arguments(cu_seqlens_q=ends(), cu_seqlens_k=ends()), r"a batch of 1 \(or \[total, H, D\]\).*of 2"),
    "from 1": (packed(cu_seqlens_q=ends(1, 2, N)), r"cu_seqlens_q to rise from 0 to 5, got \[1, 2, 5\]"),
    "short of N": (packed(cu_seqlens_k=ends(0, 2, 4)), r"cu_seqlens_k to rise from 0 to 5, got \[0, 2, 4\]"),
    "falls": (packed(cu_seqlens_q=ends(0, 6, N)), r"cu_seqlens_q to rise from 0 to 5, got \[0, 6, 5\]"),
    "q 4-D, k 3-D": (packed(q=rows(1, N, H, D)), r"k of shape \[B, N, H, D\], got 3"),
    "q 3-D, k 4-D": (packed(k=rows(1, N, H, D), v=rows(1, N, H, D)), r"k of shape \[B, N, H, D\], got 5"),
    "rope": (packed(rope=table(4, 8)), r"rope's cos of shape \[5, 8\].*got \(4, 8\)"),
    "mask": (packed(key_mask=torch.ones(N).bool()), r"key_mask to be bool of shape \[1, 5\]"),
    "mix": (packed(**mixed()), r"expected .*softmax_out"),
    "mix one": (packed(mix=rows(N, H, D)), r"mix to be two tensors \(softmax_out, r\), got Tensor"),
    "mix short": (packed(mix=(rows(N, H, D),)), r"mix to be two tensors \(softmax_out, r\), got tuple"),
    "mix number": (packed(mix=(0.5, torch.ones(1))), r"mix to be two tensors \(softmax_out, r\), got tuple"),
}
STATE = {
    "k 3-D": (state(k=rows(N, H, D)), r"k of shape \[B, N, H, D\], got 3"),
    "k list": (state(k=[[1.0]]), r"k to be a tensor, got list"),
    "k dtype": (state(k=rows().int(), v=rows().int()), r"one dtype of float32, .*, got k torch.int32"),
    "k D": (state(k=rows(B, N, H, 12), v=rows(B, N, H, 12)), r"multiple of 8 up to 128, got 12"),
    "v 5-D": (state(v=rows(1, B, N, H, D)), r"v of shape \[B, N, H, D\], got 5"),
    "v dtype": (state(v=rows().half()), r"one dtype .*, got torch.float32 and v torch.float16"),
    "v device": (state(v=rows(**META)), r"on one device, got cpu and v on meta"),
    "v shape": (state(v=rows(B, N, 1, D)), r"v of k's shape \(2, 5, 3, 16\), got \(2, 5, 1, 16\)"),
    "map": (state(feature_map="taylor"), r"feature_map to be one of .*, got 'taylor'"),
    "precision": (state(fp32_precision="tf32"), r"fp32_precision to be one of ieee, tf32x3, got 'tf32'"),
    "no weight": (state(k_weight=None), r"k_weight of shape \[3, 16, 16\] with .*, got None"),
    "needless weight": (state(feature_map="relu"), r"no k_weight with the parameter-free .*'relu'"),
    "weight shape": (state(k_weight=rows(1, D, D)), r"k_weight of shape \[3, 16, 16\], got \(1, 16, 16\)"),
    "weight dtype": (state(k_weight=torch.ones(H, D, D).long()), r"k_weight in float32, .*, got torch.int64"),
    "weight device": (state(k_weight=rows(H, D, D, **META)), r"k_weight on .* cpu, got meta"),
    "rope": (state(rope=(table()[0],)), r"rope to be two tensors"),
    "rope shape": (state(rope=table(N + 1, D // 2)), r"rope's cos of shape \[5, 8\].*got \(6, 8\)"),
    "rope dtype": (state(rope=table(dtype=torch.int32)), r"rope's cos in float32, .*, got torch.int32"),
    "rope device": (state(rope=table(**META)), r"rope's cos on .* cpu, got meta"),
    "mask": (state(key_mask=torch.ones(B, N)), r"key_mask to be bool of shape \[2, 5\]"),
    "mask device": (state(key_mask=torch.ones(B, N, **META).bool()), r"key_mask on .* cpu, got meta"),
    "packed dtype": (state(cu_seqlens_k=ends(dtype=torch.int16)), r"cu_seqlens_k to be int32"),
    "packed device": (state(cu_seqlens_k=ends(**META)), r"cu_seqlens_k on .* cpu, got meta"),
    "packed batch": (state(cu_seqlens_k=ends()), r"a batch of 1 .* with cu_seqlens_k, got a batch of 2"),
    "packed ends": (state(k=rows(N, H, D), v=rows(N, H, D), cu_seqlens_k=ends(0, 2)), r"from 0 to 5, got \[0, 2\]"),
}
APPLY = {
    "q 3-D": (apply(q=rows(N, H, D)), r"q of shape \[B, N, H, D\], got 3"),
    "q none": (apply() | {"q": None}, r"q to be a tensor, got NoneType"),
    "S list": (apply(S=[1.0]), r"S to be a tensor, got list"),
    "z list": (apply(z=[1.0]), r"z to be a tensor, got list"),
    "q dtype": (apply(q=rows().int()), r"one dtype of float32, .*, got q torch.int32"),
    "q D": (apply(q=rows(B, N, H, 20)), r"multiple of 8 up to 128, got 20"),
    "map": (apply(feature_map="taylor"), r"feature_map to be one of .*, got 'taylor'"),
    "precision": (apply(fp32_precision="bf16"), r"fp32_precision to be one of ieee, tf32x3, got 'bf16'"),
    "no weight": (apply(q_weight=None), r"q_weight of shape \[3, 16, 16\] with .*, got None"),
    "needless weight": (apply(feature_map="relu"), r"no q_weight with the parameter-free .*'relu'"),
    "weight shape": (apply(q_weight=rows(D, D)), r"q_weight of shape \[3, 16, 16\], got \(16, 16\)"),
    "weight dtype": (apply(q_weight=torch.ones(H, D, D).bool()), r"q_weight in float32, .*, got torch.bool"),
    "weight device": (apply(q_weight=rows(H, D, D, **META)), r"q_weight on .* cpu, got meta"),
    "rope": (apply(rope=1.0), r"rope to be two tensors \(cos, sin\), got float"),
    "rope shape": (apply(rope=table(N, D)), r"rope's cos of shape \[5, 8\].*got \(5, 16\)"),
    "rope dtype": (apply(rope=table(dtype=torch.float64)), r"rope's cos in float32, .*, got torch.float64"),
    "rope device": (apply(rope=table(**META)), r"rope's cos on .* cpu, got meta"),
    "mix": (apply(mix=rows()), r"mix to be two tensors"),
    "mix shape": (apply(**mixed(rows(B, N, H, 8))), r"softmax_out like q, .*, got \(2, 5, 3, 8\)"),
    "mix device": (apply(**mixed(rows(**META))), r"softmax_out on .* cpu, got meta"),
    "r": (apply(**mixed(r=torch.ones(3))), r"r to be one number .*, got \(3,\)"),
    "r device": (apply(**mixed(r=torch.ones(1, **META))), r"r on .* cpu, got meta"),
    "packed dtype": (apply(cu_seqlens_q=ends(dtype=torch.int16)), r"cu_seqlens_q to be int32"),
    "packed device": (apply(cu_seqlens_q=ends(**META)), r"cu_seqlens_q on .* cpu, got meta"),
    "packed batch": (apply(cu_seqlens_q=ends()), r"a batch of 1 .* with cu_seqlens_q, got a batch of 2"),
    "packed ends": (apply(q=rows(N, H, D), cu_seqlens_q=ends(0, 9, N)), r"rise from 0 to 5, got \[0, 9, 5\]"),
    "S batch": (apply(S=rows(1, H, F, D)), r"S of shape \[2, Hk, 32, 16\], Hk a divisor of 3, got \(1, 3, 32, 16\)"),
    "S sequences": (apply(q=rows(1, N, H, D), cu_seqlens_q=ends(0, 1, 2, N)), r"S of shape \[3, Hk, 32.*got \(2, 3"),
    "S heads": (apply(S=rows(B, 2, F, D)), r"S of shape \[2, Hk, 32, 16\], Hk a divisor of 3, got \(2, 2, 32, 16\)"),
    "S no heads": (apply(S=rows(B, 0, F, D)), r"S of shape \[2, Hk, 32, 16\], Hk a divisor of 3, got \(2, 0, 32, 16\)"),
    "S features": (apply(S=rows(B, H, D, D)), r"S of shape \[2, Hk, 32, 16\].*got \(2, 3, 16, 16\)"),
    "S of another map": (apply(feature_map="elu", q_weight=None), r"S of shape \[2, Hk, 16, 16\].*\(2, 3, 32, 16\)"),
    "S 3-D": (apply(S=rows(H, F, D)), r"S of shape \[2, Hk, 32, 16\].*got \(3, 32, 16\)"),
    "S dtype": (apply(S=rows(B, H, F, D).bfloat16()), r"S in torch.float32 for .*, got torch.bfloat16"),
    "S device": (apply(S=rows(B, H, F, D, **META)), r"S on the rows' device cpu, got meta"),
    "z shape": (apply(z=torch.ones(B, H, D)), r"z of shape \[2, 3, 32\], got \(2, 3, 16\)"),
    "z dtype": (apply(z=torch.ones(B, H, F).double()), r"z in torch.float32 for .*, got torch.float64"),
    "z device": (apply(z=torch.ones(B, H, F, **META)), r"z on the rows' device cpu, got meta"),
    "eps": (apply(eps=0.0), r"eps > 0, got 0"),
    "eps inf": (apply(eps=float("inf")), r"finite eps, got inf"),
    "scale": (apply(normalize=False, scale=float("nan")), r"finite scale, got nan"),
    "normalizer": (apply(normalize=False, return_normalizer=True), r"return_normalizer=True, got normalize=False"),
    "normalizer mix": (apply(**mixed(), return_normalizer=True), r"no mix .*, got a mix"),
}
GROUPS = {
    "rows": (linear_attn, ROWS),
    "features": (linear_attn, FEATURES),
    "options": (linear_attn, OPTIONS),
    "packed": (linear_attn, PACKED),
    "state": (linear_attn_state, STATE),
    "apply": (linear_attn_apply, APPLY),
}


@pytest.mark.parametrize(("group", "name"), [(group, name) for group, (_, bad) in GROUPS.items() for name in bad])
def test_says_what_was_expected_and_what_came(group, name):
    op, table = GROUPS[group]
    bad, message = table[name]
    with pytest.raises(ValueError, match=message) as error:
        op(**bad)
    assert str(error.value).startswith("expected ") and "\n" not in str(error.value)


@pytest.mark.parametrize("mix", [(rows(),), (0.5, torch.ones(1)), 0.5], ids=["short", "number", "float"])
@pytest.mark.parametrize("op", [linear_attn, linear_attn_apply])
def test_says_so_under_autocast_too(op, mix):
    good = arguments() if op is linear_attn else apply()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="mix to be two tensors"):
        op(**good, mix=mix)


def test_every_error_is_seen():
    """Each `raise ValueError` in checks.py and linear_attn.py is reached by a case above."""
    seen = set()
    for op, table in GROUPS.values():
        for bad, _ in table.values():
            try:
                op(**bad)
            except (ValueError, IndexError, AttributeError) as error:
                frame = error.__traceback__
                while frame.tb_next is not None:
                    frame = frame.tb_next
                seen.add((frame.tb_frame.f_code.co_filename, frame.tb_lineno))
    for source in (checks, inspect.getmodule(linear_attn)):
        lines, _ = inspect.getsourcelines(source)
        raises = [number for number, line in enumerate(lines, 1) if re.match(r"\s*raise ValueError", line)]
        # for a call over several lines the traceback names any of them
        spans = {number: range(number, number + 4) for number in raises}
        missed = [n for n, span in spans.items() if not any((source.__file__, line) in seen for line in span)]
        assert raises and not missed, f"{source.__name__}, lines {missed}"


def test_the_unchanged_arguments_are_good():
    for good in (arguments(), plain(), plain("identity", normalize=False), arguments(rope=table(), **mixed())):
        assert linear_attn(**good).shape == (B, N, H, D)
    masked = arguments(key_mask=torch.ones(B, N).bool())
    assert linear_attn(**masked).shape == (B, N, H, D)
    assert linear_attn(**packed()).shape == (N, H, D)
    assert [x.shape for x in linear_attn_state(**state())] == [(B, H, F, D), (B, H, F)]
    assert linear_attn_apply(**apply()).shape == (B, N, H, D)
