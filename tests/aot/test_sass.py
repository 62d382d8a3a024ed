"""Reading SASS: how far loops load ahead, and which registers an instruction writes."""

import pytest

pytest.importorskip("triton", reason="benchmarks.sass needs triton's tools")

from benchmarks import sass  # noqa: E402


def listing(*lines: str, sets: dict[int, int] = {}, waits: dict[int, int] = {}) -> str:  # noqa: B006
    """Format lines as cuobjdump does. sets and waits map a line to the scoreboard that it sets or waits for."""
    rows = []
    for i, line in enumerate(lines):
        control = sets.get(i, 7) << 5 | (1 << waits[i] if i in waits else 0) << 11
        rows.append(f"        /*{16 * i:04x}*/  {line} ;  /* 0x0000000000000000 */\n      /* 0x{control << 41:016x} */")
    return "\n".join(rows)


def ahead(*lines: str, ttgir: str = "", **scoreboards) -> float | None:
    code = sass.parse(listing(*lines, **scoreboards))
    assert len(code) == len(lines)
    return sass.tiles_ahead(sass.hot_loop(code), ttgir, (64, 128))


@pytest.mark.parametrize(
    "pending, groups, tiles",
    [(0, 1, 0.3), (1, 1, 1.3), (2, 1, 2.3), (0, 2, 0.3), (1, 2, 0.4), (2, 2, 1.3), (3, 2, 1.4)],
)
def test_a_wait_at_the_top_for_copies_at_the_end_of_the_loop(pending, groups, tiles):
    """A loop of ten instructions, where the second waits and the ninth (and the eighth) close a group of copies."""
    close = ["NOP"] * (2 - groups) + ["LDGDEPBAR"] * groups
    body = ["NOP", f"DEPBAR.LE SB0, 0x{pending}", *["FADD R0, R0, R1"] * 5, *close, "@P0 BRA 0x10"]
    assert ahead("NOP", *body) == pytest.approx(tiles)


@pytest.mark.parametrize("before", [1, 2, 4])
def test_tma_counts_the_copies_before_the_loop(before):
    """The third of ten instructions waits, after a wait for something else, and the ninth copies."""
    assert ahead("NOP", *TMA_LOOP, ttgir=pipelined(before)) == pytest.approx(before - 0.6)


def test_tma_copy_and_wait_in_one_iteration():
    wait = TMA_LOOP[2]
    body = ["NOP", wait, "NOP", TMA_LOOP[8], "NOP", wait, *["NOP"] * 3, "@P1 BRA 0x10"]
    assert ahead("NOP", *body, ttgir=pipelined(0)) == pytest.approx(0.2)


TMA_LOOP = [
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R6", "NOP", "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4+0x8], R6",
    *["NOP"] * 5, "@UP0 UTMALDG.4D [UR8], [UR4]", "@P1 BRA 0x10",
]  # fmt: skip


def pipelined(before: int) -> str:
    """Return Triton's program for that loop, with `before` copies before it."""
    slot = "%slot = ttg.memdesc_index %barriers[%k] :"
    copy = "ttng.async_tma_copy_global_to_local %u_ptr[%i, %j] %u, %slot, %true :"
    loop = [slot, "ttng.wait_barrier %product, %phase :", "ttng.wait_barrier %slot, %phase :", copy]
    return "\n".join(
        [f"    {slot}", *[f"    {copy}"] * before, "    scf.for %i {", *(f"      {x}" for x in loop), "    }"]
    )


def test_a_load_into_registers_is_waited_for_by_its_scoreboard():
    load = "LDG.E.128 R8, desc[UR4][R4.64]"
    lines = ["NOP", "IADD3 R4, R4, 0x1, RZ", load, *["NOP"] * 4, "FADD R0, R8, R1", "@P0 BRA 0x10"]
    rows, angles = (f"scf.for\n %u = tt.load %at : tensor<64x{width}x!tt.ptr<bf16>, #blocked>" for width in (128, 64))
    assert ahead(*lines, ttgir=rows, sets={2: 3}, waits={5: 2, 7: 3}) == pytest.approx(5 / 8)
    assert ahead(*lines, ttgir=angles, sets={2: 3}, waits={7: 3}) is None
    lines[1] = "IADD3 R3, R3, 0x1, RZ"  # the address stays: the data come from a cache
    assert ahead(*lines, ttgir=rows, sets={2: 3}, waits={7: 3}) is None


def test_the_jump_back_from_a_retried_wait_is_no_loop():
    lines = ["NOP", "NOP", "@!P0 BRA 0x60", "MUFU.EX2 R0, R0", "@P1 BRA 0x10", "EXIT", "@!P0 BRA 0x60", "BRA 0x30"]
    assert [instruction.at for instruction in sass.hot_loop(sass.parse(listing(*lines)))] == [0x10, 0x20, 0x30, 0x40]


@pytest.mark.parametrize(
    "text, registers",
    [
        ("FADD R116, -R5, R116", range(116, 117)),
        ("@!P0 IMAD.WIDE.U32 R12, R11.reuse, UR6, RZ", range(12, 14)),
        ("CS2R R104, SRZ", range(104, 106)),
        ("CS2R.32 R4, SR_CLOCKLO", range(4, 5)),
        ("LDG.E.128 R60, desc[UR8][R14.64]", range(60, 64)),
        ("LDS.64 R10, [R168+0x8000]", range(10, 12)),
        ("LDSM.16.MT88.4 R32, [R169]", range(32, 36)),
        ("LDSM.16.M88 R5, [R5+UR6]", range(5, 6)),
        ("HMMA.16816.F32.BF16 R48, R12.reuse, R32, RZ", range(48, 52)),
        ("HMMA.16816.F16 R48, R12, R32, RZ", range(48, 50)),
        ("HGMMA.64x128x16.F32.BF16 R24, R92, gdesc[UR56].tnspB, RZ, !UPT", range(24, 88)),
        ("SHF.L.U64.HI R25, R141.reuse, 0x4, RZ", range(25, 26)),
        ("FFMA2 R124, R130.F32, R120.F32x2.HI_LO, RZ.F32", range(124, 126)),
        ("LDTM.16dp32bit_t0_t15.x32 R36, tmem[UR64]", range(36, 68)),
        ("SHFL.BFLY PT, R45, R48, 0x8, 0x1f", range(45, 46)),
        ("LEA R4, P1, R83, R4, 0x2", range(4, 5)),
        ("ISETP.GE.AND P2, PT, R4, RZ, PT", range(0)),
        ("STG.E.128 desc[UR8][R106.64], R72", range(0)),
        ("STS.128 [R24+UR59+0x800], R28", range(0)),
        ("LDGSTS.E [R144+0x28000], desc[UR28][R6.64], !P0", range(0)),
        ("R2UR UR58, R4", range(0)),
        ("RET.REL.NODEC R2 0x0", range(0)),
        ("BAR.SYNC.DEFER_BLOCKING 0x0", range(0)),
    ],
)
def test_registers_that_an_instruction_writes(text, registers):
    (instruction,) = sass.parse(listing(text))
    assert sass.written(instruction) == registers
