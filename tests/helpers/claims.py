"""What the op promises to the bit, or to fp32's rounding: each claim is a function of a case and a device.

tests/ops/test_claims.py checks CLAIMS on the CPU path. tests/kernels/test_kernel_claims.py checks CLAIMS and
KERNEL_CLAIMS on the kernels.
"""

import dataclasses

import pytest
import torch
from cases import DTYPES, WEIGHTED, Case, make_inputs, pairwise
from numerics import call, check, run

from linvideo.ops import linear_attn, linear_attn_apply, linear_attn_state
from linvideo.ops.reference import rotate

STATE_OPTIONS = ("feature_map", "k_weight", "rope", "key_mask", "cu_seqlens_k")
APPLY_OPTIONS = ("feature_map", "q_weight", "rope", "mix", "cu_seqlens_q", "scale", "normalize", "eps")
BASE = Case(head_dim=16, nq=67, nk=70, heads=1)
AXES = {
    "map": [("hedgehog", True), ("hedgehog_joint", True), ("elu", False)],
    "rope": [False, True],
    "mix": [None, 0.3],
    "mask": ["none", "some"],
    "packed": ["no", "rows", "flat"],
    "group": [1, 3],
    "dtype": list(DTYPES),
}
CASES = [dataclasses.replace(BASE, **row) for row in pairwise(AXES)]


def taken(options: dict, names: tuple[str, ...]) -> dict:
    return {name: options[name] for name in names if name in options}


def halves(q, k, v, **options):
    """linear_attn, written as its two halves."""
    state = linear_attn_state(k, v, **taken(options, STATE_OPTIONS))
    return linear_attn_apply(q, *state, **taken(options, APPLY_OPTIONS))


def in_parts(q, k, v, **options):
    """linear_attn of unpacked rows, with the keys' state summed over three parts, one of which is a single key."""
    state = 0.0, 0.0
    for part in (slice(0, 30), slice(30, 31), slice(31, None)):
        keys = taken(options, STATE_OPTIONS)
        if "rope" in keys:
            keys["rope"] = tuple(table[part] for table in keys["rope"])
        if "key_mask" in keys:
            keys["key_mask"] = keys["key_mask"][:, part]
        state = [a + b for a, b in zip(state, linear_attn_state(k[:, part], v[:, part], **keys), strict=True)]
    return linear_attn_apply(q, *state, **taken(options, APPLY_OPTIONS))


def merged_parts(q, k, v, **options):
    """linear_attn of unpacked rows, merged from two parts of the keys by their normalisers."""
    total = mass = 0.0
    eps = options["eps"]
    for part in (slice(0, 30), slice(30, None)):
        keys = taken(options, STATE_OPTIONS)
        if "rope" in keys:
            keys["rope"] = tuple(table[part] for table in keys["rope"])
        if "key_mask" in keys:
            keys["key_mask"] = keys["key_mask"][:, part]
        state = linear_attn_state(k[:, part], v[:, part], **keys)
        queries = taken(options, APPLY_OPTIONS)
        out, den = linear_attn_apply(q, *state, **queries, return_normalizer=True)
        assert torch.equal(out, linear_attn_apply(q, *state, **queries))
        assert den.shape == (q.shape[0], q.shape[2], q.shape[1]) and den.dtype == torch.float32
        den = den.transpose(1, 2).unsqueeze(-1)
        total, mass = total + (den + eps) * out, mass + den
    return (total / (mass + eps)).to(q.dtype)


def assert_same_bits(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, f"other bits in {', '.join(different)}"


def halves_make_the_whole(case: Case, device: str) -> None:
    inputs, grad = make_inputs(case, device)
    whole = run(linear_attn, inputs, grad, case.options)
    assert_same_bits(whole, run(halves, inputs, grad, case.options))


def states_of_parts_add_up(case: Case, device: str) -> None:
    """Outputs and gradients computed from summed states are within the bounds of the whole op."""
    inputs, grad = make_inputs(case, device)
    check(case, inputs, grad, run(in_parts, inputs, grad, case.options))


def normalizers_merge_parts(case: Case, device: str) -> None:
    """Outputs and gradients that pass through the normalisers are within the bounds of the whole op."""
    inputs, grad = make_inputs(case, device)
    check(case, inputs, grad, run(merged_parts, inputs, grad, case.options))


def reruns_are_equal(case: Case, device: str) -> None:
    inputs, grad = make_inputs(case, device)
    assert_same_bits(*(run(linear_attn, inputs, grad, case.options) for _ in range(2)))


def a_mask_of_all_keys_is_none(case: Case, device: str) -> None:
    inputs, grad = make_inputs(case, device)
    mask = torch.ones(inputs["k"].shape[:2], dtype=torch.bool)
    whole = run(linear_attn, inputs, grad, case.options)
    assert_same_bits(whole, run(linear_attn, inputs, grad, case.options | {"key_mask": mask}))


def one_packed_sequence_is_the_unpacked(case: Case, device: str) -> None:
    inputs, grad = make_inputs(case, device)
    ends = {f"cu_seqlens_{x}": torch.tensor([0, inputs[x].shape[1]], dtype=torch.int32) for x in "qk"}
    whole = run(linear_attn, inputs, grad, case.options)
    for flat in (False, True):
        assert_same_bits(whole, run(linear_attn, inputs, grad, case.options | ends | {"flat": flat}))


def heads_first_is_the_contiguous(case: Case, device: str) -> None:
    """x.transpose(1, 2) of [B, H, N, D] changes nothing."""
    inputs, grad = make_inputs(dataclasses.replace(case, heads=2), device)
    transposed = {
        name: x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() if x.dim() == 4 else x
        for name, x in inputs.items()
    }
    assert not transposed["q"].is_contiguous()
    other = run(linear_attn, transposed, grad.transpose(1, 2).contiguous().transpose(1, 2), case.options)
    assert_same_bits(run(linear_attn, inputs, grad, case.options), other)


def the_ends_of_the_mixture_are_exact(case: Case, device: str) -> None:
    """r = 1 gives softmax_out and no gradient for q, k, v; r = 0 gives the op without mix and none for softmax_out."""
    plain = dataclasses.replace(case, mix=None)
    inputs, grad = make_inputs(plain, device)
    for r in (0.0, 1.0):
        mixed, _ = make_inputs(dataclasses.replace(case, mix=r), device)
        named = inputs | {name: mixed[name] for name in ("softmax_out", "r")}
        out = run(linear_attn, named, grad, case.options)
        if r == 1:
            assert torch.equal(out["o"], named["softmax_out"].double())
            assert torch.equal(out["dsoftmax_out"], grad.double())
            assert not any(out[f"d{name}"].any() for name in inputs)
        else:
            assert not out["dsoftmax_out"].any()
            unmixed = run(linear_attn, inputs, grad, plain.options)
            assert_same_bits(unmixed, {name: out[name] for name in unmixed})


def r_may_have_any_shape_and_dtype(case: Case, device: str) -> None:
    """r may be one number of any shape and dtype: the output is the same, and dr has r's shape and dtype."""
    inputs, grad = make_inputs(dataclasses.replace(case, mix=0.375), device)  # exact in every dtype
    with torch.no_grad():
        inputs["softmax_out"] += 1
    expected = run(linear_attn, inputs, grad, case.options)
    for shape in ((), (1, 1), (1, 1, 1, 1), (1, 1, 1, 1, 1)):
        other = inputs | {"r": inputs["r"].detach().reshape(shape).requires_grad_()}
        actual = run(linear_attn, other, grad, case.options)
        assert_same_bits(expected | {"dr": expected["dr"].reshape(shape)}, actual)
    for dtype in DTYPES.values():
        other = inputs | {"r": inputs["r"].detach().to(dtype).requires_grad_()}
        actual = run(linear_attn, other, grad, case.options)
        assert_same_bits(expected | {"dr": expected["dr"].to(dtype).double()}, actual)


def left_out_rows_may_hold_anything(case: Case, device: str) -> None:
    """Masked keys give the same bits whether they hold NaN, infinity or 0, and their gradients are 0."""
    inputs, grad = make_inputs(case, device)
    left_out = ~case.options["key_mask"].to(device)
    cleared = dict(inputs)
    for name in "kv":
        assert not inputs[name].detach()[left_out].isfinite().any()
        cleared[name] = torch.where(left_out[..., None, None], 0.0, inputs[name].detach()).requires_grad_()
    out = run(linear_attn, inputs, grad, case.options)
    assert not out["dk"][left_out].any() and not out["dv"][left_out].any()
    assert_same_bits(out, run(linear_attn, cleared, grad, case.options))


def _scattered(x: torch.Tensor) -> torch.Tensor:
    """Return the same values with the axes in reverse order in memory, and other numbers between them."""
    pairs = torch.stack([x.permute(*reversed(range(x.dim()))), x.permute(*reversed(range(x.dim()))) + 1], -1)
    return pairs[..., 0].permute(*reversed(range(x.dim())))


def strides_of_the_small_tensors_do_not_matter(case: Case, device: str) -> None:
    """Tables, mask, cu_seqlens, weights, r, S and z may have odd strides."""
    inputs, grad = make_inputs(case, device)
    options = dict(case.options)
    for name, x in options.items():
        if name.startswith("cu_seqlens"):
            options[name] = _scattered(x)
            assert options[name].stride() == (2,)
        elif name == "key_mask":
            options[name] = _scattered(x.int()) == 1 if x.shape[0] == 1 else x.T.contiguous().T
        elif name == "rope":
            options[name] = tuple(_scattered(table) for table in x)
    scattered = {name: x if x.dim() == 4 else _scattered(x.detach()).requires_grad_() for name, x in inputs.items()}

    def strided(q, k, v, **given):
        sums = linear_attn_state(k, v, **taken(given, STATE_OPTIONS))
        return linear_attn_apply(q, *(_scattered(x) for x in sums), **taken(given, APPLY_OPTIONS))

    expected = run(linear_attn, inputs, grad, case.options)
    assert_same_bits(expected, run(linear_attn, scattered, grad, options))
    assert_same_bits(expected, run(strided, scattered, grad, options))


def rope_is_the_rotation_before(case: Case, device: str) -> None:
    """rope=(cos, sin) gives the bits of rows that were first rotated in fp32 and rounded.

    A GPU fuses one of the products into the difference, so there the last bit of a rotated row may differ.
    """
    inputs, _ = make_inputs(case, device)
    options = dict(case.options)
    rotated = {name: rotate(inputs[name].detach(), *(t.to(device) for t in options["rope"])) for name in "qk"}
    assert all(x.dtype == DTYPES[case.dtype] for x in rotated.values())
    with torch.no_grad():
        inside = call(linear_attn, inputs, options)
        del options["rope"]
        before = call(linear_attn, inputs | rotated, options)
    if device == "cpu":
        assert torch.equal(inside, before)
    else:
        last_bit = torch.finfo(before.dtype).eps * before.abs().max().item()
        torch.testing.assert_close(inside, before, rtol=0, atol=2 * last_bit)


def tables_may_have_any_dtype(case: Case, device: str) -> None:
    """cos and sin are read as float32, whatever their dtype."""
    inputs, grad = make_inputs(case, device)
    for dtype in DTYPES.values():
        narrow = tuple(table.to(dtype) for table in case.options["rope"])
        wide = tuple(table.float() for table in narrow)
        results = [run(linear_attn, inputs, grad, case.options | {"rope": tables}) for tables in (narrow, wide)]
        assert_same_bits(*results)


def single_precision_weights_are_cast(case: Case, device: str) -> None:
    """With 16-bit rows, a float32 weight that holds 16-bit values gives the same output and a float32 gradient."""
    inputs, grad = make_inputs(case, device)
    wide = inputs | {n: x.detach().float().requires_grad_() for n, x in inputs.items() if "weight" in n}
    expected, actual = (run(linear_attn, x, grad, case.options) for x in (inputs, wide))
    narrow = {n: x.to(DTYPES[case.dtype]).double() if "weight" in n else x for n, x in actual.items()}
    assert case.map[0] in WEIGHTED
    assert_same_bits(expected, narrow)


UNPACKED = [case for case in CASES if case.packed == "no"]
MASKED = [case for case in CASES if case.mask != "none"]
ROTATED = [case for case in CASES if case.rope]
MIXED = [case for case in CASES if case.mix is not None]
CLAIMS = [
    (halves_make_the_whole, CASES),
    (reruns_are_equal, CASES),
    (states_of_parts_add_up, UNPACKED),
    (normalizers_merge_parts, [case for case in UNPACKED if case.map[1] and case.mix is None]),
    (a_mask_of_all_keys_is_none, [case for case in CASES if case.mask == "none"]),
    (one_packed_sequence_is_the_unpacked, [dataclasses.replace(case, batch=1) for case in UNPACKED]),
    (the_ends_of_the_mixture_are_exact, MIXED),
    (r_may_have_any_shape_and_dtype, MIXED),
    (left_out_rows_may_hold_anything, MASKED),
    (rope_is_the_rotation_before, ROTATED),
    (tables_may_have_any_dtype, ROTATED),
    (single_precision_weights_are_cast, [c for c in CASES if c.map[0] in WEIGHTED and c.dtype != "fp32"]),
]
KERNEL_CLAIMS = [  # not on the CPU path, where the strides change the order in which BLAS sums
    (heads_first_is_the_contiguous, UNPACKED),
    (strides_of_the_small_tensors_do_not_matter, CASES),
]


def each(claims: list, cases: int | None = None):
    """Return a decorator that runs a test on each claim with its cases, or with the first `cases` of them."""
    pairs = [(claim, case) for claim, every in claims for case in every[:cases]]
    return pytest.mark.parametrize("claim, case", pairs, ids=[f"{claim.__name__}-{case}" for claim, case in pairs])
