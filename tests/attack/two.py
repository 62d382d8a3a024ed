"""Starts two commands at the same time on one folder: one wins and the other is refused in one line, or both do their
work."""

import json
import random
import time
from collections.abc import Iterator

from tests.attack.child import HANG, Child
from tests.attack.kill import judge
from tests.attack.subjects import Bench


def pairs(bench: Bench) -> Iterator[tuple[str, str, list[str], list[str]]]:
    """Yield a name, the subject whose result is expected, and the words of the first and of the second command."""
    for name, subject in bench.subjects.items():
        yield f"{name} twice", name, subject.words, subject.words
        if "--overwrite" in subject.words:
            words = [word for word in subject.words if word != "--overwrite"]
            yield f"{name} twice, no --overwrite", name, words, words
        if subject.insist:
            words = [*subject.words, *subject.insist]
            yield f"{name} twice, {' '.join(subject.insist)}", name, words, words
    if "collect" in bench.subjects:
        collect = bench.subjects["collect"].words
        workers = ([*collect, "--worker", f"{number}/2"] for number in range(2))
        yield "two workers of collect", "collect", *workers
    if {"collect", "train"} <= bench.subjects.keys():
        yield "collect and train", "train", collect, bench.subjects["train"].words


def attack(bench: Bench, seed: int, number: int) -> Iterator[tuple[str, str, str, str]]:
    """Yield rows (commands, what was done, verdict, reason): `number` starts of each pair, at the same time, a little
    apart, or apart by almost the time of one command."""
    for name, whose, *commands in pairs(bench):
        subject, drawn = bench.undisturbed(bench.subjects[whose]), random.Random(f"{seed} {name}")
        # Without --overwrite the commands refuse a folder that is not empty, so they must start with an empty one.
        starts_empty = "--overwrite" in subject.words and "--overwrite" not in commands[0]
        for trial in range(number):
            bench.fresh() if starts_empty else bench.begin(subject)
            apart = 0.0 if trial % 3 == 0 else drawn.uniform(0, subject.seconds * (0.1 if trial % 3 == 1 else 1.0))
            children = []
            for words in commands:
                children.append(bench.start(words))
                time.sleep(apart)
            for child in children:
                child.wait()
            yield name, f"{apart:.2f} s apart", *verdict(bench, whose, children)


def verdict(bench: Bench, whose: str, children: list[Child]) -> tuple[str, str]:
    for child in children:
        if child.status and not child.refused:
            return {HANG: "HANG", 2: "UNCLEAR"}.get(child.status, "TRACEBACK"), str(child)
    if all(child.status for child in children):
        return "NO WINNER", "\n    ".join(map(str, children))
    if whose == "generate" and not any(child.status for child in children):
        return both_wrote_their_videos(bench)
    found, why = judge(bench, bench.subjects[whose])
    if found == "survived" and any(child.status for child in children):
        return "refused", ""
    return found, why


def both_wrote_their_videos(bench: Bench) -> tuple[str, str]:
    """Return the verdict on two `generate` commands: a video whose name was taken has a numbered name, and the index
    lists every video."""
    whole, out = bench.subjects["generate"].whole, bench.place / "out"
    entries = {json.loads(line)["video"] for line in (out / "videos.jsonl").read_text().splitlines()}
    videos = {name: digest for name, digest in bench.content().items() if name.endswith(".mp4")}
    if entries != videos.keys():
        return "DIFFERENT", f"videos.jsonl has {sorted(entries)}, the folder {sorted(videos)}"
    if unlike := [name for name, digest in videos.items() if digest != whole[f"{name[:6]}.mp4"]]:
        return "DIFFERENT", f"different: {unlike[0]}"
    return "survived", ""
