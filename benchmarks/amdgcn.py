"""Reader of AMD's machine code as the compiler prints it (`compiled.asm["amdgcn"]`): figures and loops."""

import re

from benchmarks.sass import hottest

# Instructions for matrix products, of CDNA and of RDNA.
MATRIX = r"v_s?mfma|v_wmma"


def figure(text: str, name: str) -> int:
    """Return a figure of the kernel's metadata: "vgpr_count" (with AGPRs), "vgpr_spill_count",
    "private_segment_fixed_size"."""
    return int(re.search(rf"^ .*\.{name}: +(\d+)$", text, re.MULTILINE).group(1))


def occupancy(text: str) -> int:
    """Return the number of waves that fit on one of the four SIMDs by their registers, as the compiler counts them."""
    return int(re.search(r"^; Occupancy: (\d+)$", text, re.MULTILINE).group(1))


def parse(text: str) -> list[str]:
    """Return the instructions and the labels, which end in a colon."""
    body = text[: text.index("s_endpgm")]
    lines = (line.split(";", 1)[0].strip() for line in body.splitlines())
    return [line for line in lines if re.match(r"[a-z]+_\w+|\.LBB\w+:", line) and not line.startswith(".set")]


def hot_loop(code: list[str]) -> list[str]:
    """Return the smallest loop with most of the products and exponentials, or the longest loop if none has any.

    Code without a loop is returned whole.
    """
    at = {line[:-1]: i for i, line in enumerate(code) if line.endswith(":")}
    branches = [(at.get(line.split()[-1], i), i) for i, line in enumerate(code) if re.match(r"s_c?branch", line)]
    work = {
        (first, last): sum(bool(re.match(rf"{MATRIX}|v_exp_f32", line)) for line in code[first:last])
        for first, last in branches
        if first < last
    }
    if not work:
        return instructions(code)
    first, last = hottest(work)
    return instructions(code[first : last + 1])


def instructions(code: list[str]) -> list[str]:
    return [line for line in code if not line.endswith(":")]
