"""Kills commands at their file-system events, as `kill -9` would, and runs them again: the result must be the same."""

import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.attack.child import HANG, KILLED, Child
from tests.attack.subjects import Bench, Subject, difference, succeed

# event that changes something in a folder -> for each path: its position among the arguments, and that of the
# descriptor of the folder to which it is relative
EVENTS = {
    "open": ((0, None),),
    "os.rename": ((0, 2), (1, 3)),
    "os.link": ((0, 2), (1, 3)),
    "os.remove": ((0, 1),),
    "os.mkdir": ((0, 2),),
    "os.rmdir": ((0, 1),),
    "os.truncate": ((0, None),),
    "fsync": ((0, None),),
}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def watch(place: Path, act: Callable[[str, str], None]) -> None:
    """Call act(event, path) before each event in `place`, from now on until this process ends."""
    sync = os.fsync

    def fsync(file: int) -> None:
        sys.audit("fsync", file)
        sync(file)

    def path_of(value: object, folder: object) -> str:
        if isinstance(value, int):
            return os.readlink(f"/proc/self/fd/{value}")
        base = os.readlink(f"/proc/self/fd/{folder}") if isinstance(folder, int) and folder >= 0 else os.getcwd()
        return os.path.join(base, os.fsdecode(value))

    def hook(event: str, arguments: tuple) -> None:
        if event not in EVENTS or (event == "open" and not arguments[2] & WRITES):
            return
        try:
            paths = [path_of(arguments[i], None if at is None else arguments[at]) for i, at in EVENTS[event]]
        except (OSError, TypeError, ValueError):  # the argument is not a path but a socket or None
            return
        if inside := [path for path in paths if path.startswith(f"{place}/")]:
            act(event, inside[-1])

    os.fsync = fsync
    sys.addaudithook(hook)


def count(bench: Bench, subject: Subject) -> int:
    """How many events an undisturbed run has."""
    bench.begin(subject)
    file = bench.base / "events.json"

    def prepare() -> None:
        from linvideo.commands import main as command_line

        seen, main = [], command_line.main
        watch(bench.place, lambda *event: seen.append(event))
        command_line.main = lambda words: (main(words), file.write_text(json.dumps(seen)))[0]

    succeed(bench.run(subject.words, prepare))
    return len(json.loads(file.read_text()))


def kill_at(bench: Bench, subject: Subject, number: int) -> tuple[Child, str]:
    """Run the command until just before event `number`; return the child, and the event in words."""
    file, seen = bench.base / "killed.txt", []

    def act(*event: str) -> None:
        seen.append(event)
        if len(seen) > number:
            seen.clear()  # because the next line writes a file, which is an event too
            file.write_text(" ".join(event).replace(f"{bench.place}/", ""))
            os._exit(KILLED)

    file.unlink(missing_ok=True)
    child = bench.run(subject.words, lambda: watch(bench.place, act))
    return child, file.read_text() if file.exists() else ""


def finish(bench: Bench, subject: Subject) -> tuple[str, str]:
    """Run the command again, to its end; return verdict and reason, "survived" if the result is as if nothing had
    happened."""
    child = bench.run(subject.words)
    if child.refused and subject.insist and all(word in child.errors[0] for word in subject.insist):
        child = bench.run([*subject.words, *subject.insist])
    if child.status:
        verdict = {2: "REFUSED" if child.refused else "UNCLEAR", HANG: "HANG"}.get(child.status, "TRACEBACK")
        return verdict, str(child)
    return judge(bench, subject)


def judge(bench: Bench, subject: Subject) -> tuple[str, str]:
    """Return the verdict on the place: "survived" if it looks as after an undisturbed run."""
    found, wanted = bench.content(), subject.results(subject.whole)
    if any(found.get(name) != value for name, value in wanted.items()):
        return "DIFFERENT", difference(wanted, subject.results(found))
    names = difference(dict.fromkeys(subject.whole, ""), dict.fromkeys(found, ""))
    return ("LEFTOVER", names) if names else ("survived", "")


def attack(bench: Bench, seed: int, number: int) -> Iterator[tuple[str, str, str, str]]:
    """Yield rows (command, what was done, verdict, reason): `number` kills of each command, evenly spread over its
    events. In half of the cases, the continuation is killed as well."""
    for name in bench.subjects:
        subject, drawn = bench.undisturbed(bench.subjects[name]), random.Random(f"{seed} {name}")
        events = count(bench, subject)
        for trial in range(min(number, events)):
            at = trial * events // min(number, events)
            bench.begin(subject)
            child, what = kill_at(bench, subject, at)
            if trial % 2 and child.status == KILLED:
                again, where = kill_at(bench, subject, drawn.randrange(max(1, events - at)))
                what += f", then {where or 'not'}"
                if again.status not in (0, KILLED) and not again.refused:
                    yield name, f"killed before {what}", "TRACEBACK", str(again)
                    continue
            if child.status != KILLED:  # the number of events varies with the timing of threads
                what = "not"
            yield name, f"killed before {what}", *finish(bench, subject)
