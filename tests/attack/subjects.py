"""The commands that are attacked, on tiny models, each with the folder `out` that it fills and its expected content."""

import hashlib
import importlib
import json
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import yaml

from tests.attack.child import Child

PROMPTS = ["a red fox runs", "two white boats race", "rain falls on a pond"]
SIZE = "--height 32 --width 32 --num_frames 5 --num_inference_steps 2 --device cpu".split()
UNEQUAL = ("checkpoint-*", "logs/*")  # these files contain times


@dataclass
class Subject:
    """A command that works in `out`.

    Args:
        words: Words of the command line. Running it again continues what an earlier run did not finish.
        result: Patterns of the names of result files in `out`.
        earlier: Words of another command, which fills `out` before each trial.
        insist: Options to add if the second run is refused with a line that names them.
        seconds: Time that the command takes undisturbed.
        whole: Content that the command leaves undisturbed, see `Bench.content`.
    """

    words: list[str]
    result: tuple[str, ...]
    earlier: list[str] = field(default_factory=list)
    insist: list[str] = field(default_factory=list)
    seconds: float = 0.0
    whole: dict[str, str] = field(default_factory=dict)

    def results(self, content: dict[str, str]) -> dict[str, str]:
        return {name: value for name, value in content.items() if any(fnmatch(name, some) for some in self.result)}


class Bench:
    """A folder with tiny models, the commands on them, and a place for trials."""

    def __init__(self, base: Path, only: list[str]):
        self.base, self.place = base, base / "trial"
        self.subjects = {name: subject for name, subject in self._make().items() if not only or name in only}

    def _make(self) -> dict[str, Subject]:
        from tiny_distill_run import distill_config
        from tiny_run import tiny_config, tiny_teacher

        from linvideo import convert, save_pipeline

        stock, linear = str(self.base / "stock"), str(self.base / "linear")
        teacher = tiny_teacher()
        teacher.save_pretrained(stock)
        save_pipeline(convert(teacher, [0, 1, 2], mode="linear"), linear)
        prompts, info = self.base / "prompts.txt", self.base / "info.json"
        prompts.write_text("\n".join(PROMPTS))
        info.write_text(json.dumps([{"prompt_en": text, "dimension": ["color"]} for text in PROMPTS[:1]]))
        for name, kind in {"train": tiny_config, "distill": distill_config}.items():
            config = kind("out", validation={"steps": 4, "num_videos": 1, "num_inference_steps": 1}).to_dict()
            config |= {"pretrained_model_name_or_path": stock, "device": "cpu", "resume_from_checkpoint": "latest"}
            config["prompts"]["prompts_file"] = str(prompts)
            config |= {"student_model_name_or_path": linear} if name == "distill" else {}
            (self.base / f"{name}.yaml").write_text(yaml.safe_dump(config))
        options, distilled = (["--config", str(self.base / f"{name}.yaml")] for name in ("train", "distill"))
        there, several = ["--output_dir", "out"], ["--prompts_file", str(prompts)]
        convert_words = ["convert", stock, *there, "--overwrite"]
        few = "--warmup_steps 2 --num_states 2 --num_trajectories 2".split()
        vbench = ["evaluate", linear, "--suite", "vbench", "--full_info", str(info), "--dimensions", "color", *there]
        pair = ["evaluate", linear, "--suite", "fidelity", "--teacher", stock, *several, *there]
        return {
            "train": Subject(["train", *options], ("pipeline/*",)),
            "distill": Subject(["distill", *distilled], ("pipeline/*",)),
            "collect": Subject(["collect", *options], ("trajectories/*", "*.safetensors")),
            "convert": Subject([*convert_words, "--layers", "0"], ("*",), [*convert_words, "--layers", "1"]),
            "generate": Subject(
                ["generate", linear, *several, "--output", "out", *SIZE], ("*",), insist=["--overwrite"]
            ),
            "evaluate": Subject([*pair, *SIZE], ("rows.json", "*.mp4")),
            "vbench": Subject([*vbench, *SIZE], ("videos/*",)),
            "analyze": Subject(["analyze", stock, *few, *several, *there, *SIZE], ("analysis.json", "*.safetensors")),
        }

    def fresh(self, state: Path | None = None) -> Path:
        """Return the place, emptied, or with the content of `state`."""
        shutil.rmtree(self.place, ignore_errors=True)
        if state is None:
            self.place.mkdir()
        else:
            shutil.copytree(state, self.place, symlinks=True)
        return self.place

    def begin(self, subject: Subject) -> Path:
        """Prepare the place as the command expects it."""
        self.fresh()
        if subject.earlier:
            succeed(self.run(subject.earlier))
        return self.place

    def start(self, words: list[str], prepare: Callable[[], None] = lambda: None, **options) -> Child:
        return Child(words, self.place, prepare=lambda: (steady(), prepare()), **options)

    def run(self, words: list[str], prepare: Callable[[], None] = lambda: None) -> Child:
        return self.start(words, prepare).wait()

    def undisturbed(self, subject: Subject) -> Subject:
        """Set `whole` and `seconds`. They are measured twice, so that a result that depends on chance is noticed."""
        modules = self.base / "modules.json"
        for _ in range(0 if subject.whole else 2):
            self.begin(subject)
            child = succeed(self.run(subject.words, lambda: _at_exit_say_modules(modules)))
            for name in json.loads(modules.read_text()) if modules.exists() else ():
                with suppress(Exception):
                    importlib.import_module(name)  # so that later children need not import it
            found = self.content()
            if subject.whole and subject.results(found) != subject.results(subject.whole):
                raise SystemExit(f"two undisturbed runs differ: {difference(subject.whole, found)}\n{child}")
            subject.whole, subject.seconds = found, child.seconds
        return subject

    def content(self) -> dict[str, str]:
        """Return the digest of every file in `out` by name, and "" for everything else in the place."""
        found = {}
        for path in sorted(self.place.rglob("*")):
            name = path.relative_to(self.place).as_posix().removeprefix("out/")
            if path.is_file():
                equal = not any(fnmatch(name, some) for some in UNEQUAL)
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if equal else ""
            else:
                found[name] = ""
        return found


def steady() -> None:
    """Make the time of a forward the same in every analysis, because measured times would make results differ."""
    from linvideo.evaluation import analyze
    from linvideo.evaluation.latency import Timing

    analyze.time_call = lambda call, device, seconds: Timing(10.0, 9.0, 11.0)


def difference(expected: dict[str, str], found: dict[str, str]) -> str:
    """Return the first names that are left over, missing or different, in words."""
    parts = {
        "left over": found.keys() - expected.keys(),
        "missing": expected.keys() - found.keys(),
        "different": {name for name in expected.keys() & found.keys() if expected[name] != found[name]},
    }
    return "; ".join(f"{what}: {', '.join(sorted(names)[:4])}" for what, names in parts.items() if names)


def succeed(child: Child) -> Child:
    """Raise SystemExit if an undisturbed command failed."""
    if child.status:
        raise SystemExit(f"an undisturbed command failed:\n{child.said}\n{child}")
    return child


def _at_exit_say_modules(path: Path) -> None:
    from linvideo.commands import main as command_line

    main = command_line.main

    def run_and_say(words):
        status = main(words)
        path.write_text(json.dumps([name for name in sys.modules if name != "__main__"]))
        return status

    command_line.main = run_and_say
