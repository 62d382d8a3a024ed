"""README.md and docs/: links, Python blocks and commands. `python tests/test_docs.py` counts what is checked.

Python blocks and commands of a page run in the order of the page, in one temporary folder, on the embedded model: there
the Hub ids in STAND_INS are folders with it. HTML comments, which readers don't see, say what runs how:

    <!-- test-setup              Python that runs at this place of the page: it defines q, k, v, say, or makes a folder
    q = torch.randn(1, 8, 2, 16)
    -->
    <!-- needs: weights -->      before a block that needs weights, GPU, minutes or hours: nothing in it runs. Its
                                 Python is compiled and its imports are made; its commands' arguments are parsed.
    <!-- test-options train: --max_train_steps 2 -->   before a block whose `linvideo train` gets these options, too
"""

import argparse
import ast
import contextlib
import importlib
import io
import re
import runpy
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    path for some in ("*.md", "docs/**/*.md", "kernels/*.md", ".github/**/*.md") for path in sorted(ROOT.glob(some))
]
NEEDS = ("weights", "GPU", "minutes", "hours")
LANGUAGES = ("python", "bash", "text", "yaml", "json", "bibtex", "mermaid")
STAND_INS = ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers",)
# words that may begin a command line of which nothing else is checked
OTHERS = ("cd", "git", "source", "export", "hf", "pytest", "ruff", "pre-commit", "compute-sanitizer")
CONFIG_COMMANDS = ("train", "distill", "collect")  # of these the options are parsed when they have begun to run


@dataclass
class Block:
    """A code block or a hidden set-up block of a page."""

    page: Path
    line: int  # of its first line, from 1
    language: str  # "setup" for a hidden one
    text: str
    needs: str | None = None
    options: dict[str, list[str]] = field(default_factory=dict)  # command -> options added when it runs

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@cache
def blocks_of(page: Path) -> list[Block]:
    blocks, marks, inside = [], {}, None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if inside is not None:
            if line.strip() == ("-->" if inside.language == "setup" else "```"):
                blocks.append(inside)
                inside = None
            else:
                inside.text += f"{line}\n"
        elif line.strip() == "<!-- test-setup":
            inside = Block(page, number + 1, "setup", "")
        elif fence := re.fullmatch(r"\s*```(\S*)", line):
            inside, marks = Block(page, number + 1, fence[1], "", **marks), {}
        elif needs := re.fullmatch(r"<!-- needs: (\w+) -->", line):
            marks["needs"] = needs[1]
        elif options := re.fullmatch(r"<!-- test-options (\w+): (.*) -->", line):
            marks.setdefault("options", {}).setdefault(options[1], []).extend(shlex.split(options[2]))
        elif line.strip() and marks:
            raise ValueError(f"{page}:{number}: expected a code block after {marks}, got {line}")
    assert inside is None, f"{inside.place}: the block has no end"
    return blocks


def prose(page: Path) -> str:
    """The page without code blocks and comments."""
    text = re.sub(r"<!--.*?-->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.sub(r"^\s*```.*?^\s*```$", "", text, flags=re.DOTALL | re.MULTILINE)


def commands_of(block: Block) -> Iterator[list[str]]:
    """The words of each command of a bash block, without the variables set before it."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            command, words = words[:end], words[end + 1 :]
            while re.match(r"\w+=", command[0]):
                command.pop(0)
            yield command


def normal(words: list[str]) -> list[str]:
    """`python -m linvideo ...` and `torchrun ... -m linvideo ...` as `linvideo ...`."""
    if words[0] in ("python", "torchrun") and "-m" in words:
        rest = words[words.index("-m") + 1 :]
        return rest if rest[0] == "linvideo" else ["python", "-m", *rest]
    return words


def kind(words: list[str], block: Block) -> str:
    """What is done with a command: "run"; "parsed", its arguments are; "named", what it names exists."""
    if normal(words)[0] == "linvideo":
        return "parsed" if block.needs or words[0] == "torchrun" else "run"
    return "parsed" if words[0] == "python" and "-m" in words and "pytest" not in words else "named"


# links


def slugs(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    found, counts = set(), Counter()
    for heading in re.findall(r"^#+ (.*)", prose(page), re.MULTILINE):
        heading = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", heading).replace(" ", "-")
        found.add(f"{slug}-{counts[slug]}" if counts[slug] else slug)
        counts[slug] += 1
    return found | set(re.findall(r'<a (?:id|name)="([^"]+)"', prose(page)))


def links(page: Path) -> list[str]:
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    found = re.findall(r'\]\(([^)\s]+)(?: "[^"]*")?\)|(?:src|href|srcset)="([^"]+)"', text)
    return [unquote(target or other) for target, other in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    wrong = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue  # nothing outside the repository is asked for
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or not target.is_relative_to(ROOT):
            wrong.append(f"{link}: no such file")
        elif anchor and target.suffix == ".md" and anchor not in slugs(target):
            wrong.append(f"{link}: its headings are {sorted(slugs(target))}")
    assert not wrong, "\n".join(wrong)


# words in the text


def spans(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


@cache
def known_options() -> set[str]:
    """The options of our commands, of the configs, and of programs that the docs speak of."""
    from linvideo.distillation import DistillConfig
    from linvideo.run.read_config import make_parser
    from linvideo.transfer import TrainConfig

    known = {"--help", "--version", "--nproc_per_node", "--nnodes", "--shutdown_timeout", "--tool"}
    for config in (TrainConfig, DistillConfig):
        known |= {word for action in make_parser(config)._actions for word in action.option_strings}
    for folder in ("linvideo", "benchmarks", "tests/attack"):
        for path in (ROOT / folder).rglob("*.py"):
            known |= set(re.findall(r'"(--[a-z]\w*)"', path.read_text(encoding="utf-8")))
    from linvideo.commands.main import make_parser as commands

    choices = next(action.choices for action in commands()._actions if action.dest == "command")
    return known | {word for parser in choices.values() for action in parser._actions for word in action.option_strings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_the_text_names_exists(page):
    """Options, commands, targets of make and files of the repository."""
    wrong = []
    for span in spans(page):
        words = span.split()
        options = [word.partition("=")[0] for word in words if re.match(r"--[a-z]", word)]
        wrong += [f"{span}: no such option" for word in options if word not in known_options()]
        if words[0] == "make" and len(words) > 1:
            wrong += [f"{span}: no such target"] * (words[1] not in make_targets())
        if re.fullmatch(r"[\w.]+/[\w./-]+\.(py|md|toml|yaml|txt)", span) and (ROOT / span.split("/")[0]).is_dir():
            wrong += [f"{span}: no such file"] * (not (ROOT / span).exists())
    assert not wrong, "\n".join(wrong)


@cache
def make_targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@cache
def extras() -> set[str]:
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    call = next(node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "setup")
    return {key.value for word in call.keywords if word.arg == "extras_require" for key in word.value.keys}


# blocks


class Parsed(Exception):
    """A command's arguments have been accepted."""


def stop(*_, **__):
    raise Parsed


def run_linvideo(words: list[str]) -> None:
    from linvideo.commands.main import main

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            status = main(words)
        except SystemExit as end:  # argparse's refusals, --help
            status = end.code
    assert not status, [line for line in said.getvalue().splitlines() if "error:" in line]


def parse_linvideo(words: list[str]) -> None:
    """As far as the real command goes without loading a model."""
    from linvideo.commands import main as commands

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "choose_device", lambda name: name or "cpu")
        patch.setattr("linvideo.planning.sizes.read_sizes", stop)  # of plan
        for module in commands.COMMANDS:
            name = commands.name_of(module)
            if name != "plan":
                patch.setattr(module, "announce_run" if name in CONFIG_COMMANDS else "run", stop)
        try:
            run_linvideo(words)
        except Parsed:
            return
    assert {"--help", "--version"} & set(words)


def parse_module(name: str, words: list[str]) -> None:
    """`python -m name words` as far as its parser goes; without a parser it must take no arguments."""
    path = ROOT / name.replace(".", "/")
    file = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    if "argparse" not in file.read_text(encoding="utf-8"):
        assert not words
        return
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(*args, **kwargs):
        parse(*args, **kwargs)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(file), *words])
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        with pytest.raises(Parsed):
            runpy.run_module(name, run_name="__main__", alter_sys=True)


def check_names(words: list[str]) -> None:
    """What a command names exists: targets, extras, files."""
    if words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
        assert set(targets) <= make_targets()
    elif words[0] == "pip":
        named = {extra for found in re.findall(r"\.\[(.*?)\]", " ".join(words)) for extra in found.split(",")}
        assert words[1] == "install" and named <= extras()
    elif words[0] in ("python", "python3"):
        files = [word for word in words if "/" in word and word.endswith(".py")]
        assert files or words[1:3] == ["-m", "venv"] or "pytest" in words
        assert all((ROOT / file).exists() for file in files)
    else:
        assert words[0] in OTHERS, f"add {words[0]} to OTHERS or write it as `linvideo`, `python`, `make` or `pip`"


def check_command(words: list[str], block: Block) -> None:
    what, normalized = kind(words, block), normal(words)
    if what == "run":
        run_linvideo([*normalized[1:], *block.options.get(normalized[1], [])])
    elif what == "named":
        check_names(words)
    elif normalized[0] == "linvideo":
        parse_linvideo(normalized[1:])
    else:
        parse_module(normalized[2], normalized[3:])


def compile_python(block: Block) -> None:
    """Without running it: syntax, and that what it takes from linvideo exists."""
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.Import):
            for name in (alias.name for alias in node.names if alias.name.startswith("linvideo")):
                importlib.import_module(name)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("linvideo"):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), f"{block.place}: {ast.unparse(node)}"
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "linvideo":
            assert hasattr(importlib.import_module("linvideo"), node.attr), f"{block.place}: linvideo.{node.attr}"


def run_python(block: Block, namespace: dict) -> None:
    text = "\n" * (block.line - 1) + block.text  # tracebacks then show the page's lines
    exec(compile(text, block.page, "exec"), namespace)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)], ids=lambda p: str(p.relative_to(ROOT)))
def test_blocks(page, tmp_path, monkeypatch):
    from linvideo.demo.teacher import FOLDER

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    namespace = {"__name__": "__main__"}
    for block in blocks_of(page):
        for link in (tmp_path / name for name in STAND_INS):
            link.unlink(missing_ok=True)
            if not block.needs:  # a block that isn't run means the model itself
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(FOLDER)
        assert block.language in ("setup", *LANGUAGES), f"{block.place}: expected a language after ```"
        assert block.needs in (None, *NEEDS), f"{block.place}: needs: {block.needs}"
        if block.language == "setup" or block.language == "python" and block.needs is None:
            run_python(block, namespace)
        elif block.language == "python":
            compile_python(block)
        elif block.language == "bash":
            for words in commands_of(block):
                try:
                    check_command(words, block)
                except (Exception, SystemExit) as error:
                    error.add_note(f"{block.place}: {shlex.join(words)}")
                    raise


def counts() -> Counter:
    """(language, what is done) -> the number of Python blocks and commands of all pages."""
    found = Counter()
    for block in (block for page in PAGES for block in blocks_of(page)):
        if block.language == "python":
            found["python", "parsed" if block.needs else "run"] += 1
        elif block.language == "bash":
            found.update(("bash", kind(words, block)) for words in commands_of(block))
    return found


def test_there_is_something_to_check():
    found = counts()
    assert found["python", "run"] and found["bash", "run"] and found["bash", "parsed"] and found["bash", "named"], found
    assert sum(len(links(page)) for page in PAGES) > 20 and sum(len(spans(page)) for page in PAGES) > 100


if __name__ == "__main__":
    for (language, what), count in sorted(counts().items()):
        print(f"{language}: {count} {what}")
