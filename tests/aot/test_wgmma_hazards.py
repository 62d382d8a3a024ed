"""The check for registers of asynchronous products that are touched before the wait, on altered machine code."""

import re

import pytest

pytest.importorskip("triton", reason="tests/aot needs triton")

import torch  # noqa: E402
from linvideo_kernels.linear_attn import configs  # noqa: E402
from linvideo_kernels.linear_attn.aot import compile_jobs  # noqa: E402
from test_sass import listing  # noqa: E402

from benchmarks import sass, tune, wgmma_hazards  # noqa: E402


@pytest.fixture(scope="module")
def code() -> list[sass.Instruction]:
    """A real kernel whose second and third product take A from registers and run while other instructions execute."""
    with tune.using("apply_state", configs.Tile(64, 4, 1, resident=2)):
        jobs = compile_jobs(128, "hedgehog", torch.bfloat16, 90)
    job = next(job for job in jobs if "apply_state" in job.name and "normalize" in job.name)
    return sass.parse(sass.disassemble(job.compile().asm["cubin"]))


def under_a_product(code) -> tuple[int, wgmma_hazards.Product]:
    """Find a plain arithmetic instruction between a product with A in registers and its wait; return both."""
    product = None
    for i, instruction in enumerate(code):
        made = wgmma_hazards.Product.of(instruction)
        product = None if "WARPGROUP.DEPBAR" in instruction.text else made if made and made.a else product
        if product and re.match(r"F(FMA|ADD|MUL)$", instruction.name):
            return i, product
    raise AssertionError("no such instruction")


def changed(code, i: int, text: str) -> list[sass.Instruction]:
    return [*code[:i], code[i]._replace(text=text), *code[i + 1 :]]


def test_the_unaltered_kernel_has_no_hazard(code):
    assert wgmma_hazards.register_operands(code) >= 16
    assert wgmma_hazards.hazards(code) == []


@pytest.mark.parametrize("kind", ["writes A", "writes accumulator", "reads accumulator"])
def test_one_register_changed_is_found(code, kind):
    i, product = under_a_product(code)
    name, (target, *sources) = code[i].name, code[i].operands
    if kind == "reads accumulator":
        sources[0] = f"R{product.accumulator[5]}"
        what = f"reads R{product.accumulator[5]}, accumulator"
    else:
        register = product.a[3] if kind == "writes A" else product.accumulator[-1]
        target, what = f"R{register}", f"writes R{register}, {'A operand' if kind == 'writes A' else 'accumulator'}"
    found = wgmma_hazards.hazards(changed(code, i, f"{name} {', '.join([target, *sources])}"))
    assert found and all(line.startswith(f"0x{code[i].at:x} ") and what in line for line in found)


def test_a_wide_result_that_overlaps_an_operand_is_found(code):
    i, product = under_a_product(code)
    assert wgmma_hazards.hazards(changed(code, i, f"LDS.128 R{product.a[0] - 3}, [R1]"))
    assert wgmma_hazards.hazards(changed(code, i, f"CS2R R{product.a[0] - 1}, SRZ"))


def test_a_lost_wait_is_found_around_the_loop(code):
    """Without the wait, the next iteration overwrites the operands of the last product."""
    last = max(i for i, instruction in enumerate(code) if "WARPGROUP.DEPBAR" in instruction.text)
    found = wgmma_hazards.hazards(changed(code, last, "NOP"))
    at = [[int(address, 16) for address in re.findall(r"0x[0-9a-f]+(?= |$)", line)] for line in found]
    assert any(addresses[0] < addresses[-1] for addresses in at) and any(a[0] > a[-1] for a in at)


A, B = "HGMMA.64x64x16.F32.BF16 R24, R92, gdesc[UR4], R24", "HGMMA.64x64x16.F32.BF16 R56, R96, gdesc[UR4], R56"


@pytest.mark.parametrize(
    "lines, hazards",
    [
        ([A + ", gsb0", B + ", gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x1", "FADD R0, R24, R25"], 0),  # A's group is done
        ([A + ", gsb0", B + ", gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x1", "FADD R0, R56, R25"], 1),  # B's is not
        ([A, B + ", gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x0", "FADD R24, R56, R25"], 0),
        ([A + ", gsb0", "@P0 WARPGROUP.DEPBAR.LE gsb0, 0x0", "FADD R92, R0, R0"], 1),  # it may not wait
        ([A + ", gsb0", "@P0 FADD R92, R0, R0"], 1),  # it may write
        ([A, "WARPGROUP.DEPBAR.LE gsb0, 0x0", "FADD R92, R0, R0"], 1),  # the wait is for closed groups
        ([A, A.replace("R92", "R96")], 0),  # products may add to one accumulator in turn
        ([A, B.replace("R96", "R30")], 1),  # but not read the accumulator of another
        ([A, B.replace("R56", "R48")], 1),  # nor share a part of it
        ([A.replace("R92", "R52")], 1),  # A within its own accumulator
        ([A, "@P0 BRA 0x30", "FADD R0, R1, R1", "FADD R95, R0, R0"], 1),
        ([A, "BRA 0x30", "FADD R95, R0, R0", "FADD R0, R1, R1"], 0),  # jumped over
        ([A, "ISETP.GE.AND P2, PT, R92, RZ, PT", "STS.128 [R92], R92"], 0),  # A may be read
        ([A, "STS.128 [R0], R21"], 1),  # its last word is R24
    ],
)
def test_paths_groups_and_widths(lines, hazards):
    code = sass.parse(listing(*lines, "WARPGROUP.DEPBAR.LE gsb0, 0x0", "EXIT"))
    assert len(wgmma_hazards.hazards(code)) == hazards
