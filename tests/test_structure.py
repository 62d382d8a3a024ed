"""The layout's rules: which way imports go, what stays lazy, and that files from others are data."""

import ast
import importlib
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = {"linvideo": ROOT / "linvideo", "linvideo_kernels": ROOT / "kernels" / "linvideo_kernels"}
FOLDERS = ("linvideo", "kernels", "benchmarks", "tests")
TEXT_SUFFIXES = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".json", ".cfg", ".html", ""}

# A part imports from parts of a lower rank, and from itself.
RANK = {
    "linvideo_kernels": 0,
    "linvideo._diffusers_hook": 0,  # standard library only
    "linvideo.packaged": 0,  # the same
    "linvideo.workspace": 0,  # the same
    "linvideo.progress": 0,  # and tqdm
    "linvideo.trajectories": 1,  # no model code: it samples the pipeline that it is given
    "linvideo.ops": 1,
    "linvideo.nn": 2,
    "linvideo.models": 3,
    "linvideo.run": 4,
    "linvideo.reports": 5,
    "linvideo.transfer": 6,
    "linvideo.distillation": 6,
    "linvideo.evaluation": 7,
    "linvideo.planning": 7,
    "linvideo.demo": 8,
    "linvideo.commands": 9,
    "linvideo.__main__": 10,
}
MOST_METHODS = 20  # of a class that runs are made of
LARGEST_FOLDER = 0.20  # of linvideo's lines of Python
HEAVY = {"torch", "triton", "diffusers", "transformers", "peft", "fla", "matplotlib", "numpy"}


def module_name(path: Path) -> str:
    top = next(name for name, folder in LIBRARY.items() if path.is_relative_to(folder))
    parts = [top, *path.relative_to(LIBRARY[top]).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part(module: str) -> str | None:
    """The key of RANK that holds a module; None for foreign modules and for `linvideo` itself, which loads nothing."""
    return next((name for name in RANK if module == name or module.startswith(f"{name}.")), None)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute name) of every import, also inside functions; `from a import b` gives a.b."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def library_files() -> list[Path]:
    return [path for folder in LIBRARY.values() for path in sorted(folder.rglob("*.py"))]


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def test_imports_go_one_way():
    wrong = []
    for path in library_files():
        own = part(module_name(path))
        if own is None:
            continue  # linvideo/__init__.py exports every part, lazily: test_import_is_light
        for line, module in imports(path):
            other = part(module)
            if other is not None and other != own and RANK[other] >= RANK[own]:
                wrong.append(f"{where(path, line)}: {own} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_every_module_has_a_rank():
    unknown = {module_name(path) for path in library_files() if part(module_name(path)) is None} - {"linvideo"}
    assert not unknown, f"give these a place in the order of imports: {sorted(unknown)}"


def test_modules_do_not_import_each_other_in_a_circle():
    """Imports inside functions count: they only hide a circle."""
    modules = {module_name(path) for path in library_files()}
    graph = {}
    for path in library_files():
        above = graph.setdefault(module_name(path), set())
        for _, name in imports(path):
            above.add(name if name in modules else name.rpartition(".")[0])
        above.discard(module_name(path))  # a package's __init__.py that imports its own modules
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" is imported by ".join(error.args[1]))


def test_files_have_names_of_their_own():
    """So that a file can be found by its name alone."""
    paths = [path for name in ("linvideo", "kernels") for path in (ROOT / name).rglob("*.py")]
    counts = Counter(path.name for path in paths if path.name not in ("__init__.py", "__main__.py"))
    assert [name for name, count in counts.items() if count > 1] == []


def test_runs_are_used_and_not_inherited():
    """Only configs build on each other, and no class does too much."""
    folders = ("run", "transfer", "distillation")
    classes = {}
    for path in (path for name in folders for path in (LIBRARY["linvideo"] / name).glob("*.py")):
        classes |= {node.name: node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)}
    bases = {name: {ast.unparse(base) for base in node.bases} & classes.keys() for name, node in classes.items()}
    assert {name for name, ours in bases.items() if ours} == {"TrainConfig", "DistillConfig"}
    methods = {name: sum(isinstance(x, ast.FunctionDef) for x in node.body) for name, node in classes.items()}
    assert {name: count for name, count in methods.items() if count > MOST_METHODS} == {}


def test_no_folder_outgrows_the_others():
    lines = Counter()
    for path in LIBRARY["linvideo"].rglob("*.py"):
        lines[path.relative_to(LIBRARY["linvideo"]).parts[0]] += len(path.read_text().splitlines())
    folder, most = lines.most_common(1)[0]
    assert most <= LARGEST_FOLDER * lines.total(), f"linvideo/{folder} has {most} of {lines.total()} lines"


def test_each_dependency_stays_in_its_parts():
    """Triton (but for its timer) only in the kernels, diffusers only in trajectories, which samples its pipelines, and
    from the models up, peers only in benchmarks."""
    uses_diffusers = {
        "linvideo.trajectories",
        *(name for name, rank in RANK.items() if rank >= RANK["linvideo.models"]),
    }
    helpers = {path.stem for path in (ROOT / "tests" / "helpers").glob("*.py")}
    wrong = []
    for path in library_files():
        own = part(module_name(path))
        for line, module in imports(path):
            top = module.split(".")[0]
            if (
                (top == "triton" and own != "linvideo_kernels" and not module.startswith("triton.testing."))
                or (top in ("diffusers", "transformers") and own not in uses_diffusers)
                or top in {"fla", "flash_attn", "sageattention", "tests", "benchmarks", "pytest", *helpers}
            ):
                wrong.append(f"{where(path, line)}: imports {module}")
    assert not wrong, "\n".join(wrong)


def test_no_file_is_looked_for_outside_the_package():
    """A wheel holds the packages only: what lies next to them in a checkout is not there."""
    outside = re.compile(r"__file__.*(\.parents|\.parent\.parent)|dirname\(.*dirname\(.*__file__")
    assert [path.name for path in library_files() if outside.search(path.read_text())] == []


def test_long_calls_name_their_arguments():
    """Nobody can read the twelfth of twenty values; calls inside Triton's kernels are compiled, and left out."""
    wrong, any_number = [], ("ctx.save_for_backward",)
    for folder in ("linvideo", "kernels", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(path.read_text())
            functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
            compiled = {
                id(inner)
                for function in functions
                if any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)
                for inner in ast.walk(function)
            }
            for node in ast.walk(tree):
                if not isinstance(node, ast.Call) or id(node) in compiled or ast.unparse(node.func) in any_number:
                    continue
                if sum(not isinstance(argument, ast.Starred) for argument in node.args) > 8:
                    wrong.append(f"{where(path, node.lineno)}: {ast.unparse(node.func)}")
    assert not wrong, "\n".join(wrong)


def test_versions_agree():
    version = importlib.import_module("linvideo").__version__
    newest = re.search(r"^## (\S+) \((\S+)\)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    citation = dict(re.findall(r"^(version|date-released): \"?([^\"\n]+)", (ROOT / "CITATION.cff").read_text(), re.M))
    assert (version, newest[1], newest[2]) == (citation["version"], citation["version"], citation["date-released"])
    ruff = re.search(r"^ruff==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)[1]
    assert f"rev: v{ruff} " in (ROOT / ".pre-commit-config.yaml").read_text()


def test_kernels_is_no_package():
    """A top-level package named `kernels` would shadow Hugging Face's for anyone who stands in the checkout."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "kernels" / "linvideo_kernels" / "__init__.py").exists()


def run_python(code: str) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_import_is_light():
    assert run_python(f"import sys, linvideo; dir(linvideo); print(*sorted({HEAVY!r} & set(sys.modules)))") == ""


@pytest.mark.parametrize("given", [None, "ACTIVE"])
def test_commands_make_openmp_wait_without_spinning(given, monkeypatch):
    """The policy is read when torch is loaded: it stands before that, and what the user set stays."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if given:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    for module in ("linvideo.commands.main", "benchmarks"):
        code = f"import os, sys, {module}; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
        assert run_python(code) == f"{given or 'PASSIVE'} False"


def test_every_lazy_export_exists():
    pytest.importorskip("diffusers")
    code = "import linvideo; print(*(name for name in linvideo.__all__ if getattr(linvideo, name, None) is None))"
    assert run_python(code) == ""
    assert "no_such_name" in run_python(
        "import linvideo\ntry:\n    linvideo.no_such_name\nexcept AttributeError as error:\n    print(error)"
    )


def keyword(call: ast.Call, name: str) -> object:
    return next((k.value.value for k in call.keywords if k.arg == name and isinstance(k.value, ast.Constant)), None)


def unsafe(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            if {name.split(".")[0] for name in names} & {
                "pickle",
                "_pickle",
                "dill",
                "cloudpickle",
                "joblib",
            }:
                yield f"{where(path, node.lineno)}: imports a pickle module"
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called == "torch.load" and keyword(node, "weights_only") is not True:
                yield f"{where(path, node.lineno)}: torch.load without weights_only=True"
            if called == "torch.save" and not path.is_relative_to(
                ROOT / "tests"
            ):  # tests show that pickles are refused
                yield f"{where(path, node.lineno)}: torch.save writes a pickle"
            if called in ("np.load", "numpy.load") and keyword(node, "allow_pickle"):
                yield f"{where(path, node.lineno)}: {called} with allow_pickle"
            if called in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"):
                yield f"{where(path, node.lineno)}: {called} can build any object, use yaml.safe_load"
            if keyword(node, "trust_remote_code") is True:
                yield f"{where(path, node.lineno)}: trust_remote_code=True without a flag"


def test_files_from_others_are_data():
    files = [ROOT / "setup.py", *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
    wrong = [line for path in files for line in unsafe(path)]
    assert not wrong, "\n".join(wrong)


def test_no_machine_paths_or_registries():
    pattern = re.compile(
        r"(?<![\w.:/}])/(?:home|root|Users|work|mnt|scratch|tmp)/|[A-Z]:\\\\Users|--index-url|--extra-index-url|trusted-host"
    )
    folders = [ROOT / name for name in (*FOLDERS, "docs", "examples", ".ci", ".github")]
    files = [path for path in ROOT.iterdir() if path.is_file() and path.name != ".git"]  # a file in a git worktree
    files += [path for folder in folders if folder.exists() for path in folder.rglob("*") if path.is_file()]
    files = [x for x in files if x.suffix in TEXT_SUFFIXES and "__pycache__" not in x.parts and x != Path(__file__)]
    assert len(files) > 20
    wrong = []
    for path in files:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if found := pattern.search(line):
                wrong.append(f"{where(path, number)}: {found.group()}")
    assert not wrong, "\n".join(wrong)
