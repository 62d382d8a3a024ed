"""The op's exact promises on the CPU path."""

from claims import CLAIMS, each


@each(CLAIMS)
def test_claim(claim, case):
    claim(case, "cpu")
