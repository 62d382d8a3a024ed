"""Gives bad values to every option of every command: each is refused in one line with status 2, or has no effect."""

import argparse
import os
import random
from collections.abc import Iterator
from pathlib import Path

from tests.attack.child import HANG, Child
from tests.attack.subjects import SIZE, Bench

HUGE = str(16 * 10**12)
NUMBERS = ("-1", "0", "nan", "inf", "1e400", "1" + 30 * "0", HUGE, "x", "", "[1]", "null", "\u00b2")
FILES = {
    "empty": b"",
    "binary": bytes(range(256)),
    "list.json": b"[1]",
    "null.json": b"null",
    "number.yaml": b"1e400",
    "deep.json": b"[" * 100_000,
    "deep.yaml": b"a: {" * 2000,
    "latin.jsonl": '{"caption": "caf\u00e9"}'.encode("latin-1"),
    "half.safetensors": (1000).to_bytes(8, "little") + b'{"a":',
}
PLACES = (
    *FILES,
    "folder",
    "pipe",
    "loop",
    "missing",
    "missing/file",
    "/dev/null",
    "folder/../empty/file",
    "",
    "\ud800",
)
GIGABYTES = 8


def attack(bench: Bench, seed: int, number: int) -> Iterator[tuple[str, str, str, str]]:
    """Yield rows (command, what was given, verdict, reason): for each command, 4 * `number` pairs of an option and a
    value, drawn at random from all pairs."""
    for name, (words, options) in commands(bench).items():
        cases = [(option, value) for option, values in options.items() for value in values]
        for option, value in random.Random(f"{seed} {name}").sample(cases, min(len(cases), 4 * number)):
            make_places(bench.fresh())
            given = [*words, option, value]
            if not option.startswith("-"):  # it is MODEL: replace the one in `words`, if there is one
                given = [words[0], value, *words[1 if words[1].startswith("-") else 2 :]]
            child = bench.start(given, limit=8 if name == "demo" else 20, memory=GIGABYTES << 30).wait()
            yield name, f"{option} {value[:40]!r}", *verdict(bench, child, value)


def make_places(place: Path) -> None:
    for name, content in FILES.items():
        (place / name).write_bytes(content)
    (place / "folder").mkdir()
    os.mkfifo(place / "pipe")
    (place / "loop").symlink_to("loop")


def commands(bench: Bench) -> dict[str, tuple[list[str], dict[str, tuple[str, ...]]]]:
    """Return, for each command, words that would work, and the values to try for each option."""
    from linvideo.commands import main as command_line
    from linvideo.distillation import DistillConfig
    from linvideo.run.read_config import make_parser
    from linvideo.transfer.train_config import TrainConfig

    stock, linear, new = str(bench.base / "stock"), str(bench.base / "linear"), ["--output_dir", "out"]
    small = SIZE[:6]  # only the size
    words = {
        "demo": ["demo", *new],
        "convert": ["convert", stock, *new],
        "plan": ["plan", "wan2.1-1.3b"],
        "generate": ["generate", linear, "--prompt", "a", "--output", "v.mp4", *SIZE],
        "evaluate": ["evaluate", linear, "--suite", "fidelity", "--teacher", stock, "--num_prompts", "1", *new, *SIZE],
        "check": ["check", stock, "--output", "c.mp4", *small],
        "analyze": ["analyze", stock, *new, "--warmup_steps", "1", "--num_states", "2", *SIZE],
        "info": ["info", stock],
    }
    subparsers = next(a for a in command_line.make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    found = {}
    for name, some in words.items():
        options = {}
        for action in subparsers.choices[name]._actions:
            if action.nargs != 0:  # an option that takes a value
                is_number = action.type is not None and action.type is not Path
                option = next(iter(action.option_strings), action.dest)
                options[option] = NUMBERS if is_number else PLACES
        found[name] = some, options
    for name, kind in {"train": TrainConfig, "distill": DistillConfig}.items():
        parser = make_parser(kind)
        names = [option for action in parser._actions for option in action.option_strings[-1:] if "help" not in option]
        options = {option: NUMBERS for option in names if option.startswith("--")}
        paths = [option for option in options if option.endswith(("path", "_file", "_dir", "config", "checkpoint"))]
        options |= dict.fromkeys([*paths, "model"], PLACES)
        found[name] = [name, "--config", str(bench.base / f"{name}.yaml")], options
    found["collect"] = ["collect", *found["train"][0][1:]], {"--worker": NUMBERS, "--config": PLACES, "model": PLACES}
    found["plan"][1]["model"] = PLACES
    return found


def verdict(bench: Bench, child: Child, value: str) -> tuple[str, str]:
    if child.status == HANG:  # a large number may ask for a lot of work, and the command is doing it
        busy = (value in NUMBERS or child.words[0] == "demo") and child.busy > 0.5 * child.limit
        return ("running", "") if busy else ("HANG", str(child))
    ended = child.refused or (child.status == 1 and len(child.errors) == 1)  # 1: it diverged, or ran out of memory
    if child.status and (not ended or "Traceback" in child.said):
        return "UNCLEAR" if child.status == 2 else "TRACEBACK", str(child)
    if left := [path.name for path in bench.place.rglob(".*")]:
        return "LEFTOVER", f"{left[0]}, by {child}"
    return ("refused", "") if child.status else ("survived", "")
