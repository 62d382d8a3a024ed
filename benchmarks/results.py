"""Result files: benchmarks/results/<device>-<date>-<name>.json, written row by row, never overwriting another file.

A file is {"format", "environment", "rows"}. Each row has a "suite" and either "ms", which is [median, 20th, 80th
percentile], or "absent", the reason why there is no figure. COLUMNS lists the other keys of each suite's rows.
"""

import json
import math
import os
import platform
import re
import subprocess
import time
from importlib import metadata
from pathlib import Path

import torch

from linvideo.trajectories.devices import device_name
from linvideo.workspace import workspace

FORMAT = 1
FOLDER = Path(__file__).parent / "results"
PACKAGES = (
    "torch", "triton", "diffusers", "flash-linear-attention", "flash-attn", "fa3-fwd", "sageattention", "flash_bla"
)  # fmt: skip
ENVIRONMENT = ("device", "driver", "cuda", "python", "packages", "commit", "time", "rates")
_CUDA = ("host_ms", "held_mib", "peak_mib")
# suite -> the keys that identify a row, and the other keys
COLUMNS = {
    "op": (("shape", "dtype", "name", "pass"), ("sizes", "kept", "gbytes", "tflops", *_CUDA)),
    "block": (("model", "dtype", "attention", "compiled"), ("tokens", "layers", *_CUDA)),
    "model": (("model", "dtype", "backend", "linear_layers", "compiled", "how"), ("tokens", "layers", *_CUDA)),
    "train": (("model", "dtype", "step", "attention"), ("tokens", "layers", "planned_mib", *_CUDA)),
    "kernel": (("shape", "dtype", "name", "position"), ("kernel",)),
    "tile": (("shape", "dtype", "kernel", "tile"), ("shipped", "difference")),
}


def key(row: dict) -> tuple:
    """Return what identifies the row."""
    return row["suite"], *(row[name] for name in COLUMNS[row["suite"]][0])


def environment(rates: dict) -> dict:
    """Return the device, the versions, the commit and the time of a run, with `rates` as measure.rates returns them."""
    cuda = torch.cuda.is_available()
    return {
        "device": device_name("cuda") if cuda else f"{_processor()}, {_threads()}",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "commit": commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "rates": rates,
    }


def versions(environment: dict) -> str:
    """Return the packages with their versions, as text."""
    return ", ".join(f"{name} {version}" for name, version in environment["packages"].items())


def short_commit(environment: dict) -> str:
    """Return the first 12 digits of the commit, followed by " with changes" if files differed from it."""
    commit = environment["commit"] or "unknown"
    return commit[:12] + commit[40:]


def measured(environment: dict) -> str:
    """Return when, at which commit and with which versions a result was measured, as a sentence."""
    return f"Measured {environment['time'][:10]}, commit {short_commit(environment)}: {versions(environment)}."


def runs(pairs: list[tuple[dict, dict]]) -> list[str]:
    """Return one line for each run that the rows are from, the oldest first: its time, commit and versions."""
    lines = set()
    for _, environment in pairs:
        driver = f", driver {environment['driver']}" if environment["driver"] else ""
        lines.add(f"{environment['time']}, commit {short_commit(environment)}{driver}: {versions(environment)}")
    return sorted(lines)


class ResultFile:
    """The rows of one run. Each row is on disk as soon as it is added, so that a killed run loses nothing.

    Args:
        environment: Description of the run, from `environment`.
        folder: Folder for the file, which is made with the first row.
        name: End of the file's name. None means the suite of the first row.
    """

    def __init__(self, environment: dict, folder: Path = FOLDER, name: str | None = None):
        self.environment, self.folder, self.name, self.rows, self.path = environment, folder, name, [], None

    def add(self, row: dict) -> None:
        document = {"format": FORMAT, "environment": self.environment, "rows": [*self.rows, row]}
        check(document)
        self.folder.mkdir(parents=True, exist_ok=True)
        name = self.name or row["suite"]
        with workspace(self.folder / name) as space:
            new = space / "new"
            new.write_text(json.dumps(document, indent=1) + "\n")
            if self.path is None:
                self.path = claim(new, self.folder, self.environment, name)
            else:
                os.replace(new, self.path)
        self.rows.append(row)


def keep(document: dict, folder: Path, name: str) -> Path:
    """Write a finished document to a new file <device>-<date>-<name>.json and return the file.

    If a file of the folder has the same rows, that one is returned and nothing is written.
    """
    for path in folder.glob("*.json"):
        if json.loads(path.read_text())["rows"] == document["rows"]:
            return path
    folder.mkdir(parents=True, exist_ok=True)
    with workspace(folder / name) as space:
        new = space / "new"
        new.write_text(json.dumps(document, indent=1) + "\n")
        return claim(new, folder, document["environment"], name)


def claim(aside: Path, folder: Path, environment: dict, name: str) -> Path:
    """Move `aside` to a new name in `folder`, which ends in a number if the plain name is taken; returns the file."""
    gpu = slug(environment["device"]).removeprefix("nvidia-")
    device = "cpu" if environment["cuda"] is None else gpu
    stem = f"{device}-{environment['time'][:10]}-{name}"
    for number in range(1, 1000):
        path = folder / f"{stem}{'' if number == 1 else f'-{number}'}.json"
        try:
            _link(aside, path)
        except FileExistsError:
            continue
        aside.unlink()
        return path
    raise ValueError(f"expected fewer than 1,000 results named {stem} in {folder}")


def _link(aside: Path, path: Path) -> None:
    """Link `path` to the content of `aside`; raises FileExistsError if the name is taken."""
    try:
        os.link(aside, path)
    except OSError:  # the name is taken, which opening finds, too, or the file system has no hard links
        with path.open("xb") as file:
            file.write(aside.read_bytes())


def load(folder: Path = FOLDER) -> list[dict]:
    """Read all result files of a folder, the oldest first."""
    documents = map(read, sorted(folder.glob("*.json")))
    return sorted(documents, key=lambda document: document["environment"]["time"])


def read(path: Path) -> dict:
    """Read one file; raises ValueError if it isn't a result file."""
    try:
        document = json.loads(path.read_text())
        check(document)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return document


def check(document: dict) -> None:
    """Raise ValueError if a document isn't what the module's docstring says."""
    if document.get("format") != FORMAT:
        raise ValueError(f"expected format {FORMAT}, got {document.get('format')!r}")
    missing = [key for key in ENVIRONMENT if key not in document.get("environment", {})]
    if missing:
        raise ValueError(f"expected the environment to have {', '.join(missing)}, got one without")
    if not document.get("rows"):
        raise ValueError("expected at least one row, got none")
    for row in document["rows"]:
        if row.get("suite") not in COLUMNS:
            raise ValueError(f"expected a row's suite to be one of {', '.join(COLUMNS)}, got {row.get('suite')!r}")
        keys, more = COLUMNS[row["suite"]]
        unknown = sorted(row.keys() - {"suite", "ms", "absent", *keys, *more})
        lacking = [key for key in keys if key not in row]
        if unknown or lacking or ("ms" in row) == ("absent" in row):
            raise ValueError(f"expected the keys {', '.join(keys)} and either ms or absent, got {sorted(row)}")
        ms = row.get("ms", [1.0] * 3)
        if len(ms) != 3 or not all(math.isfinite(x) and x > 0 for x in ms):
            raise ValueError(f"expected ms to be three positive numbers, got {ms}")


def slug(text: str) -> str:
    """Return the text in lower case, with a hyphen for everything that isn't a letter or a digit."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _processor() -> str:
    try:
        names = re.findall(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return f"CPU {names[0] if names else platform.machine()}"


def _threads() -> str:
    count = torch.get_num_threads()
    return f"{count} thread{'s' * (count > 1)}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Return the commit of this checkout, followed by " with changes" if tracked files differ from it."""
    if given := os.environ.get("LINVIDEO_COMMIT"):  # set where the files were copied without their git history
        return given
    root = str(Path(__file__).parents[1])
    commit = _output("git", "-C", root, "rev-parse", "HEAD")
    changed = _output("git", "-C", root, "status", "--porcelain", "--untracked-files=no")
    return f"{commit} with changes" if commit and changed else commit


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None
