"""The op's exact promises (helpers/claims.py) on the kernels."""

from claims import CLAIMS, KERNEL_CLAIMS, each, reruns_are_equal


@each(CLAIMS + KERNEL_CLAIMS, cases=4)  # the CPU path runs every case of each claim
def test_claim(claim, case, device, request):
    if claim is reruns_are_equal:
        request.getfixturevalue("gpu")
    claim(case, device)
