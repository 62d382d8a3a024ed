"""Registers that an asynchronous product on Hopper still needs, but that the machine code touches before the wait.

A wgmma (HGMMA in SASS) runs while its warp continues. Until `WARPGROUP.DEPBAR` has waited for its group, its
accumulator must not be read or written, and its A operand, if that is in registers, must not be written. Compilers have
made mistakes here. `hazards` follows every path through a kernel, and loops until nothing changes, with the set of
products that may still be running; a predicated instruction may or may not take effect. It relies on the register
widths of sass.py.

It can't see operands in shared memory that are overwritten too early, descriptors in uniform registers, a missing fence
(WARPGROUP.ARRIVE) between a plain write and the product that reads it, or indirect jumps. It reads the output of ptxas,
so it says nothing about a driver that compiles PTX again.
"""

from typing import NamedTuple

from benchmarks.sass import Instruction, read, successors, written

OLDEST = 8  # groups that are distinguished by age


class Product(NamedTuple):
    """One HGMMA, which reads and writes the same accumulator."""

    accumulator: range
    a: range  # registers of the A operand; empty if it is in shared memory
    closes: bool  # whether it ends a group

    @classmethod
    def of(cls, instruction: Instruction) -> "Product | None":
        if not instruction.name.startswith("HGMMA"):
            return None
        operand = instruction.operands[1].removesuffix(".reuse")
        first = int(operand[1:]) if operand[1:].isdigit() else None  # else gdesc[UR...]
        a = range(0) if first is None else range(first, first + 4)  # 64 rows of 32 bytes over 128 threads
        return cls(written(instruction), a, "gsb0" in instruction.operands)


def register_operands(code: list[Instruction]) -> int:
    """Return the number of products whose A operand is in registers."""
    return sum(len(product.a) > 0 for product in map(Product.of, code) if product)


def hazards(code: list[Instruction]) -> list[str]:
    """Return one line per hazard: "0x2a30 FADD R92, ...: writes R92, accumulator of the product at 0x2950"."""
    products = {i: product for i, instruction in enumerate(code) if (product := Product.of(instruction))}
    if not products:
        return []
    follow = successors(code)
    # For each instruction, the products that may be running when it begins, with the number of groups closed since.
    under_way: list[set[tuple[int, int]] | None] = [None] * len(code)
    under_way[0] = set()
    found, ahead = {}, [0]
    while ahead:
        i = ahead.pop()
        now = under_way[i]
        for product, _ in now:
            if what := _clash(code[i], products.get(i), products[product]):
                found[i, product] = f"0x{code[i].at:x} {code[i].text}: {what} the product at 0x{code[product].at:x}"
        after = _after(code[i], i, products.get(i), now)
        for j in follow[i]:
            if under_way[j] is None or not after <= under_way[j]:
                under_way[j] = after | (under_way[j] or set())
                ahead.append(j)
    own = {
        i: f"0x{code[i].at:x} {code[i].text}: writes its own A operand"
        for i, product in products.items()
        if _common(product.a, product.accumulator)
    }
    return [*own.values(), *(found[key] for key in sorted(found))]


def _after(instruction: Instruction, i: int, product: Product | None, now: set) -> set:
    if product:
        now = now | {(i, 0)}
        return {(j, min(age + 1, OLDEST)) for j, age in now} if product.closes else now
    if instruction.name.startswith("WARPGROUP.DEPBAR") and not instruction.predicated:
        pending = int(instruction.operands[1], 16)  # number of the youngest groups that may still be running
        return {(j, age) for j, age in now if age <= pending}
    return now


def _clash(instruction: Instruction, product: Product | None, earlier: Product) -> str | None:
    writes = written(instruction)
    if shared := _common(writes, earlier.a):
        return f"writes R{shared[0]}, A operand of"
    if product and product.accumulator == earlier.accumulator:
        writes, reads = range(0), set(product.a)  # products that add to one accumulator run one after the other
    else:
        reads = read(instruction)
    if shared := _common(writes, earlier.accumulator):
        return f"writes R{shared[0]}, accumulator of"
    if shared := _common(reads, earlier.accumulator):
        return f"reads R{shared[0]}, accumulator of"
    return None


def _common(some, others) -> list[int]:
    return sorted(set(some) & set(others))
