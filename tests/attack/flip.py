"""Damages files of interrupted work, one by one, and continues it: damage is refused, repaired or without effect."""

import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tests.attack.child import HANG, KILLED
from tests.attack.kill import count, kill_at
from tests.attack.subjects import Bench, Subject, difference

# command -> share of its events after which it is interrupted
INTERRUPTED = {"train": 0.85, "distill": 0.85, "evaluate": 0.8, "vbench": 0.8, "analyze": 0.8}
READ = {"evaluate": ("rows.json",)}  # the results that a continuation reads; it does not read finished videos
SAID = ("is damaged", "created again")


def attack(bench: Bench, seed: int, number: int) -> Iterator[tuple[str, str, str, str]]:
    """Yield rows (kind of file, what was done, verdict, reason). In each kind of file, `number` bits are flipped, one
    by one; then a file is truncated, emptied and deleted."""
    for name, part in INTERRUPTED.items():
        if name not in bench.subjects:
            continue
        subject, drawn = bench.undisturbed(bench.subjects[name]), random.Random(f"{seed} {name}")
        events = count(bench, subject)
        bench.begin(subject)
        child, _ = kill_at(bench, subject, round(part * events))
        if child.status != KILLED:
            raise SystemExit(f"{name} ended before it could be interrupted: {child}")
        subject = replace(subject, result=READ.get(name, subject.result))
        state = bench.base / f"interrupted-{name}"
        bench.place.rename(state)
        for kind, files in kinds(state / "out").items():
            for fault in [*["flip"] * number, "half", "empty", "missing"]:
                # a continuation reads the newest file of a kind first
                file = files[-1] if drawn.random() < 0.5 else drawn.choice(files)
                place = bench.fresh(state)
                what = f"{fault} {damage(place / 'out' / file, fault, drawn)}"
                yield f"{name}: {kind}", f"{file}: {what}", *verdict(bench, subject, file)


def kinds(folder: Path) -> dict[str, list[str]]:
    """Group files by their names without numbers; the files of a kind are in the order of their numbers."""
    found: dict[str, list[str]] = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not any(part.startswith(".") for part in name.split("/")):
            found.setdefault(re.sub(r"\d+", "N", name), []).append(name)
    in_order = {
        kind: sorted(names, key=lambda n: [int(x) for x in re.findall(r"\d+", n)]) for kind, names in found.items()
    }
    return dict(sorted(in_order.items()))


def damage(path: Path, fault: str, drawn: random.Random) -> str:
    """Damage a file, and return where."""
    content = bytearray(path.read_bytes())
    if fault == "flip" and content:
        most = min(len(content), 2000) if drawn.random() < 0.5 else len(content)  # headers are small
        byte, bit = drawn.randrange(most), drawn.randrange(8)
        content[byte] ^= 1 << bit
        path.write_bytes(content)
        return f"bit {bit} of byte {byte}"
    path.unlink()
    if fault != "missing":
        path.write_bytes(content[: len(content) // 2] if fault == "half" else b"")
    return ""


def verdict(bench: Bench, subject: Subject, file: str) -> tuple[str, str]:
    """Continue the work, and compare the result with that of an undisturbed run."""
    child = bench.run(subject.words)
    names = (Path(file).name, Path("out", file).parent.name)
    if child.status == HANG:
        return "HANG", str(child)
    if child.refused:
        return ("refused", "") if any(name in child.errors[0] for name in names) else ("UNCLEAR", str(child))
    if child.status:
        return "TRACEBACK", str(child)
    found, wanted = subject.results(bench.content()), subject.results(subject.whole)
    if found != wanted:
        return "UNSEEN", difference(wanted, found)
    return "recovered" if any(text in child.said for text in SAID) else "harmless", ""
