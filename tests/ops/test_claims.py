"""The op's exact promises on the CPU path."""

import dataclasses

import pytest
from ops import claims

MASKED = [case for case in claims.CASES if case.mask != "none"]
TURNED = [case for case in claims.CASES if case.rope]
UNPACKED = [case for case in claims.CASES if case.packed == "no"]
SINGLE = [dataclasses.replace(case, batch=1) for case in UNPACKED]
MIXED = [case for case in claims.CASES if case.mix is not None]
WEIGHTED = [case for case in claims.CASES if case.map[0] in claims.WEIGHTED and case.dtype != "fp32"]
CLAIMS = [
    (claims.halves_make_the_whole, claims.CASES),
    (claims.reruns_are_equal, claims.CASES),
    (claims.states_of_parts_add_up, UNPACKED),
    (claims.a_mask_of_all_keys_is_none, [case for case in claims.CASES if case.mask == "none"]),
    (claims.one_packed_sequence_is_the_unpacked, SINGLE),
    (claims.the_ends_of_the_mixture_are_exact, MIXED),
    (claims.r_may_have_any_shape_and_dtype, MIXED),
    (claims.left_out_rows_may_hold_anything, MASKED),
    (claims.rope_is_the_rotation_before, TURNED),
    (claims.tables_may_have_any_dtype, TURNED),
    (claims.single_precision_weights_are_cast, WEIGHTED),
]


@pytest.mark.parametrize(
    ("claim", "case"),
    [pytest.param(claim, case, id=f"{claim.__name__}-{case}") for claim, cases in CLAIMS for case in cases],
)
def test_claim(claim, case):
    claim(case, "cpu")
