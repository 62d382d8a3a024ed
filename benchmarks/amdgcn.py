"""Reading AMD's machine code as the compiler prints it (`compiled.asm["amdgcn"]`): its figures, its loops."""

import re

from benchmarks.sass import hottest

# Products on matrix cores: CDNA's and RDNA's.
MATRIX = r"v_s?mfma|v_wmma"


def figure(text: str, name: str) -> int:
    """Of the kernel's metadata: "vgpr_count" (AGPRs included), "vgpr_spill_count", "private_segment_fixed_size"."""
    return int(re.search(rf"^ .*\.{name}: +(\d+)$", text, re.MULTILINE).group(1))


def occupancy(text: str) -> int:
    """Waves that the registers leave room for on one of the four SIMDs, as the compiler counts them."""
    return int(re.search(r"^; Occupancy: (\d+)$", text, re.MULTILINE).group(1))


def parse(text: str) -> list[str]:
    """Instructions, and labels, which end in a colon."""
    body = text[: text.index("s_endpgm")]
    lines = (line.split(";", 1)[0].strip() for line in body.splitlines())
    return [line for line in lines if re.match(r"[a-z]+_\w+|\.LBB\w+:", line) and not line.startswith(".set")]


def hot_loop(code: list[str]) -> list[str]:
    """The smallest loop with most of the products and exponentials that any has; the longest where none has one."""
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
