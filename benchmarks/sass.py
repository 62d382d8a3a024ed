"""Reader of SASS, NVIDIA's machine code, as `cuobjdump -sass` prints it: registers, loops, waits for loads.

`tiles_ahead` measures how far a loop loads ahead. It is the distance in a warp's instructions between a load and the
first instruction that waits for it, as a share of the loop: 1 if the loop works on one whole tile of rows meanwhile,
nearly 0 if it waits for what it has just requested. Three kinds of loads are analysed:

cp.async (LDGSTS)
    LDGDEPBAR closes a group of copies, and `DEPBAR.LE SB0, N` waits until only the N youngest groups may be
    outstanding. So it waits for the group that was closed N + 1 groups earlier, counted around the loop.
TMA (UTMALDG)
    There is one copy per tile and one wait per tile on its barrier, and they are served in order. With P copies before
    the loop, a wait is for the copy that was issued P iterations earlier. P is counted in Triton's own program (TTGIR),
    where every copy and wait names its barrier; the positions come from SASS. If there are several tensors, the last
    copy and the first wait count.
Loads into registers (LDG)
    The control bits of a load name a scoreboard, and the first later instruction whose wait mask has that scoreboard
    waits. A load whose address doesn't change in the loop (statistics, a state that is read again) comes from a cache
    and is left out. If Triton loads no tile of rows into registers, all of these loads are left out: the remaining ones
    are angles, masks and factors, which other programs read as well.
"""

import hashlib
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton.runtime.cache import get_cache_manager


class Instruction(NamedTuple):
    at: int  # address
    text: str
    control: int  # bits 105 to 127: stall, yield, scoreboard set by its write and by its read, wait mask

    @property
    def name(self) -> str:
        """The name with its suffixes, without the predicate."""
        return self._unpredicated.split(" ", 1)[0]

    @property
    def operands(self) -> list[str]:
        _, _, rest = self._unpredicated.partition(" ")
        return [operand.strip() for operand in rest.split(",")] if rest else []

    @property
    def predicated(self) -> bool:
        """Whether the instruction has a predicate and so may have no effect."""
        return self.text.startswith("@")

    @property
    def target(self) -> int | None:
        """The address that a branch goes to; None for other instructions."""
        found = re.search(r"\b(?:BRA|BSSY|CALL)\S*\s.*\b0x([0-9a-f]+)", self.text)
        return int(found.group(1), 16) if found else None

    @property
    def sets(self) -> int:
        """The scoreboard that is released when the result has arrived; 7 for none."""
        return self.control >> 5 & 7

    @property
    def waits_for(self) -> int:
        """The mask of the scoreboards that the instruction waits for."""
        return self.control >> 11 & 63

    @property
    def _unpredicated(self) -> str:
        return re.sub(r"^@!?U?P\w+\s+", "", self.text)


def disassemble(cubin: bytes) -> str:
    """Return the SASS of a cubin, with its register use. It is kept in Triton's cache, since it takes a second."""
    cache = get_cache_manager(hashlib.sha256(triton.__version__.encode() + cubin).hexdigest())
    kept = cache.get_file("kernel.sass")
    if kept:
        return Path(kept).read_text()
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [tool, "--dump-resource-usage", "-sass", path]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    cache.put(text, "kernel.sass", binary=False)
    return text


def parse(sass: str) -> list[Instruction]:
    lines = re.findall(
        r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s*/\* 0x[0-9a-f]{16} \*/\s*/\* 0x([0-9a-f]{16}) \*/", sass, re.MULTILINE
    )
    return [Instruction(int(at, 16), text, int(high, 16) >> 41) for at, text, high in lines]


# Instructions that read their first operand after the predicates. Stores, whose first operand is an address, and
# instructions whose first operand is no register need no mention.
READS_ONLY = re.compile(r"[A-Z]*SETP|PLOP3|FCHK|R2P|RET|BRX|JMX|CALL|WARPSYNC|NANOSLEEP|BAR|DEPBAR|YIELD|KILL")


def written(instruction: Instruction) -> range:
    """Return the numbers of the registers (R) that an instruction writes; the larger width where it is in doubt."""
    operands = instruction.operands
    while operands and re.fullmatch(r"!?U?P[\dT]+", operands[0]):
        operands = operands[1:]
    first = re.match(r"R(\d+)\b", operands[0]) if operands else None
    if not first or READS_ONLY.match(instruction.name):
        return range(0)
    register = int(first.group(1))
    return range(register, register + _width(instruction.name))


def read(instruction: Instruction) -> set[int]:
    """Return the numbers of the registers that an instruction reads; the smaller width where it is in doubt.

    The predicate doesn't count.
    """
    operands = instruction.operands
    if written(instruction):
        operands = operands[next(i for i, operand in enumerate(operands) if operand.startswith("R")) + 1 :]
    registers: set[int] = set()
    for i, operand in enumerate(operands):
        for number, pair in re.findall(r"(?<![A-Z])R(\d+)(\.64)?", operand):
            width = _operand_width(instruction.name, i, "[" in operand) if not pair else 2
            registers |= set(range(int(number), int(number) + width))
    return registers


def _operand_width(name: str, i: int, address: bool) -> int:
    base, *suffixes = name.split(".")
    if base == "HMMA":  # A and B; C is as wide as the result
        wide = suffixes[0] == "16816"
        return ((4, 2) if wide else (2, 1))[i] if i < 2 else _width(name)
    if base == "HGMMA":
        return 4 if i == 0 else _width(name)
    if base.startswith("ST") and not address:
        return int(suffixes[-1]) if base == "STSM" and suffixes[-1] in "24" else _width(name)
    if base == "IMAD" and "WIDE" in suffixes:
        return 2 if i == 2 else 1
    return 2 if re.match(r"D[A-Z]|F(FMA|ADD|MUL)2", base) or (base in ("MOV", "IADD") and "64" in suffixes) else 1


def _width(name: str) -> int:
    """Return the number of registers of a result."""
    base, *suffixes = name.split(".")
    if wgmma := re.match(r"HGMMA\.\d+x(\d+)x\d+\.(F32|F16)", name):
        return int(wgmma.group(1)) // (2 if wgmma.group(2) == "F32" else 4)
    if matrices := re.match(r"LDSM\..*M\w*88(?:\.(\d))?$", name):
        return int(matrices.group(1) or 1)
    if tensor_memory := re.match(r"LDTM\b.*\.x(\d+)", name):
        return int(tensor_memory.group(1))
    if base == "CS2R":
        return 1 if "32" in suffixes else 2
    if base in ("HMMA", "IMMA", "QMMA", "DMMA", "BMMA"):
        return 2 if base == "HMMA" and "F32" not in suffixes else 4
    if "128" in suffixes:
        return 4
    return 2 if {"64", "WIDE", "F64"} & set(suffixes) or re.match(r"D[A-Z]|F(FMA|ADD|MUL)2", base) else 1


def successors(code: list[Instruction]) -> list[list[int]]:
    """Return the indices of the instructions that may follow each one; a call may also be followed by the next one."""
    index = {instruction.at: i for i, instruction in enumerate(code)}
    meets: dict[str, int] = {}  # barrier register of the last BSSY -> where its threads reconverge
    follow = []
    for i, instruction in enumerate(code):
        name, after = instruction.name, []
        if name.startswith("BSSY"):
            meets[instruction.operands[0]] = index[instruction.target]
        elif instruction.target in index:
            after.append(index[instruction.target])
        elif name.startswith("BSYNC") and instruction.operands[0] in meets:
            after.append(meets[instruction.operands[0]])
        ends = re.match(r"(BRA|EXIT|RET|BRX|JMP)\b", name)
        conditional = instruction.predicated or re.match(r"!?U?P\d", (instruction.operands or [""])[0])
        if i + 1 < len(code) and (not ends or conditional):
            after.append(i + 1)
        follow.append(after)
    return follow


def hot_loop(code: list[Instruction]) -> list[Instruction]:
    """Return the smallest loop with most of the products and special functions, or the whole code if it has no loop.

    A loop can only be entered at its first instruction, which excludes the jump back from a wait that is retried out of
    line.
    """
    index = {instruction.at: i for i, instruction in enumerate(code)}
    follow = successors(code)
    backward = [
        (index[instruction.target], i)
        for i, instruction in enumerate(code)
        if instruction.name.startswith("BRA") and index.get(instruction.target, len(code)) < i
    ]
    loops = [(first, last) for first, last in backward if not _reaches(follow, last, without=first)]
    if not loops:
        return code
    heavy = [bool(re.search(r"[HQ]GMMA|HMMA|UTC\w*MMA|\bFFMA\b|MUFU", instruction.text)) for instruction in code]
    work = {(first, last): sum(heavy[first : last + 1]) for first, last in loops}
    first, last = hottest(work)
    return code[first : last + 1]


def hottest(work: dict[tuple[int, int], int]) -> tuple[int, int]:
    """Return the shortest loop with most of the heavy instructions, or the longest loop if none has any.

    Args:
        work: Number of heavy instructions in each loop (first, last instruction).
    """
    most = max(work.values())
    fitting = [loop for loop, amount in work.items() if amount > 0.8 * most]
    return (min if most else max)(fitting or work, key=lambda loop: loop[1] - loop[0])


def _reaches(follow: list[list[int]], goal: int, without: int) -> bool:
    """Whether instruction `goal` can be reached from the first one, but not through instruction `without`."""
    seen, ahead = {without}, [0]
    while ahead:
        i = ahead.pop()
        while i is not None and i not in seen:
            if i == goal:
                return True
            seen.add(i)
            ahead += follow[i][1:]
            i = follow[i][0] if follow[i] else None
    return False


def tiles_ahead(loop: list[Instruction], ttgir: str, tile: tuple[int, int]) -> float | None:
    """Return the least distance between a load and its wait, as a share of the loop; None if it loads no tile.

    Args:
        loop: Instructions of the loop.
        ttgir: Triton's program of the same kernel.
        tile: Shape (rows, width) of the tiles that the kernel reads from DRAM.
    """
    distances = [*_cp_async(loop), *_tma(loop, ttgir)]
    if re.search(rf"tt\.load .*tensor<{tile[0]}x{tile[1]}x!tt\.ptr", ttgir[ttgir.find("scf.for") :]):
        distances += _register_loads(loop)
    return min(distances) / len(loop) if distances else None


def _cp_async(loop: list[Instruction]) -> list[int]:
    closed = [i for i, instruction in enumerate(loop) if instruction.name == "LDGDEPBAR"]
    distances = []
    for i, instruction in enumerate(loop):
        wait = re.search(r"\bDEPBAR\.LE SB0, 0x([0-9a-f]+)", instruction.text)
        if wait and closed:
            pending = int(wait.group(1), 16)
            earlier = [c for c in closed if c < i]  # in this iteration
            laps, which = divmod(max(0, pending - len(earlier)), len(closed))
            group = earlier[-1 - pending] if pending < len(earlier) else closed[-1 - which] - (laps + 1) * len(loop)
            distances.append(i - group)
    return distances


def _tma(loop: list[Instruction], ttgir: str) -> list[int]:
    copies = [i for i, instruction in enumerate(loop) if instruction.name.startswith("UTMALDG")]
    waits = [i for i, instruction in enumerate(loop) if re.search(r"SYNCS\.PHASECHK\S*TRYWAIT", instruction.text)]
    if not copies or not waits:
        return []
    before, inside, first_wait = _tma_order(ttgir)
    lead = before // inside * len(loop)
    return [max(0, lead + waits[min(first_wait, len(waits) - 1)] - copies[-1])]


def _tma_order(ttgir: str) -> tuple[int, int, int]:
    """Return the number of copies before and in the loop over tiles, and the loop's first barrier wait for a copy."""
    lines = ttgir.splitlines()
    copy = "async_tma_copy_global_to_local"
    *_, start = (i for i, line in enumerate(lines) if "scf.for" in line and _holds(copy, lines, i))
    stop = _end(lines, start)
    root: dict[str, str] = {}  # an element of an array of barriers -> the array
    for line in lines:
        if found := re.search(r"(%\S+) = ttg\.memdesc_index (%\w+)", line):
            root[found.group(1)] = root.get(found.group(2), found.group(2))

    def barrier(name: str) -> str:
        return root.get(name, name)

    barriers = {
        barrier(name) for line in lines[start:stop] for name in re.findall(rf"{copy} .*?\] %\w+, (%\w+),", line)
    }
    waits = [barrier(name) for line in lines[start:stop] for name in re.findall(r"wait_barrier (%\w+),", line)]
    return (
        sum(copy in line for line in lines[:start]),
        sum(copy in line for line in lines[start:stop]),
        next((i for i, name in enumerate(waits) if name in barriers), 0),
    )


def _end(lines: list[str], start: int) -> int:
    """Return the line that closes the block that line `start` opens, found by indentation."""
    indent = re.match(r"\s*", lines[start]).group()
    return next((i for i in range(start + 1, len(lines)) if lines[i].startswith(indent + "}")), len(lines))


def _holds(what: str, lines: list[str], start: int) -> bool:
    return any(what in line for line in lines[start : _end(lines, start)])


def _register_loads(loop: list[Instruction]) -> list[int]:
    changing = {f"R{register}" for instruction in loop for register in written(instruction)}
    changing |= {found for instruction in loop for found in re.findall(r"^UR\d+", (instruction.operands or [""])[0])}
    distances = []
    for i, instruction in enumerate(loop):
        if not re.match(r"LDG\b", instruction.name) or instruction.sets == 7:
            continue
        address = re.findall(r"U?R\d+", instruction.text.rpartition("[")[2])
        if not set(address) & changing:
            continue
        later = (k for k in range(1, len(loop) + 1) if loop[(i + k) % len(loop)].waits_for >> instruction.sets & 1)
        distances.append(next(later, len(loop)))
    return distances
