"""The op's exact promises, kept by the kernels."""

import pytest
from ops import claims
from ops.test_claims import CLAIMS, UNPACKED

ALL = [  # the last two for kernels only: on the CPU path strides choose BLAS's order of sums
    *CLAIMS,
    (claims.heads_first_is_the_contiguous, UNPACKED),
    (claims.strides_of_the_small_tensors_do_not_matter, claims.CASES),
]
FEW = 4  # the CPU path runs every case of each claim


@pytest.mark.parametrize(
    ("claim", "case"),
    [pytest.param(claim, case, id=f"{claim.__name__}-{case}") for claim, cases in ALL for case in cases[:FEW]],
)
def test_claim(claim, case, device, request):
    if claim is claims.reruns_are_equal:
        request.getfixturevalue("gpu")
    claim(case, device)
