"""Plain English: phrases that readers stumbled over, and arguments whose description does not say what they are."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("linvideo", "kernels", "benchmarks", "examples", "docs", "tests")
MOST_WORDS = 1000  # of README.md, without the table of speeds that the benchmarks fill in
# phrase -> what to write
PHRASES = {
    r"\bbeside\b": "next to, besides",
    r"\bturned\b": "rotated, converted, became",
    r"\bso many\b": "that many, the number of",
    r"\bevery so\b": "every N steps",
    r"\bwhat is (not )?there\b": "what exists",
    r"\bth(at|ose that) (is|are) there\b": "existing",
    r"\bas of\b": "since, from",
    r"\bof every draw\b": "of all random draws",
    r"(?<![\"'])\blanes?\b": "rollouts",  # quoted, it is the name that stored files have
    r"\broll-outs?\b": "rollout",
    r"\broom\b": "space, memory",
    r"\bat the (left|right)\b": "on the left",
    r"\bmend(s|ed)?\b": "fix",
    r"\bgo(es)? on\b|\bwent on\b": "continue",
}
# An argument's description begins with what it is, so not with one of these.
NOT_FIRST = set(
    """of to from for in as with at by on per under over after before how is are gets get makes keeps deletes replaces
    shows export reads writes takes that which what where when if""".split()
)


def argument_descriptions(tree: ast.Module) -> Iterator[tuple[int, str, str]]:
    """(line, name, description) of the arguments in docstrings, and of options by their help."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and (text := ast.get_docstring(node)):
            sections = re.findall(r"^(?:Args|Attributes):\n((?:(?: .*)?\n?)+)", text, re.M)
            for name, words in re.findall(r"^    ([\w*., ]+): (.+)", "\n".join(sections), re.M):
                yield node.lineno, name, words
        elif isinstance(node, ast.Call):
            for given in node.keywords:
                if given.arg == "help" and isinstance(given.value, ast.Constant) and isinstance(given.value.value, str):
                    yield node.lineno, "help", given.value.value


def problems(path: Path) -> Iterator[str]:
    place, text = path.relative_to(ROOT), path.read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(), 1):
        for phrase, instead in PHRASES.items():
            if found := re.search(phrase, line, re.IGNORECASE):
                yield f"{place}:{number}: {found[0]!r} (write: {instead})"
    if path.suffix == ".py":
        for line, name, words in argument_descriptions(ast.parse(text)):
            if words.lower().split()[0].strip(",.;:") in NOT_FIRST:
                yield f"{place}:{line}: {name} is described as {words!r}: begin with what it is"


def test_phrases_and_descriptions():
    files = [path for name in FOLDERS for path in sorted((ROOT / name).rglob("*")) if path != Path(__file__)]
    files = [path for path in files if path.suffix in (".py", ".md", ".yaml") and "earlier_runs" not in path.parts]
    files += sorted(ROOT.glob("*.md"))
    assert len(files) > 100
    found = [problem for path in files for problem in problems(path)]
    assert not found, "\n".join(found)


def test_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(re.sub("<!-- headline: begin -->.*<!-- headline: end -->", "", text, flags=re.S).split()) <= MOST_WORDS
