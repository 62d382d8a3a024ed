"""Result files: benchmarks/results/<device>-<date>-<suite>.json, written whole and never over another.

A file is {"format", "environment", "rows"}. Every row has a "suite" and either "ms", [median, 20th, 80th percentile],
or "absent", the reason why there is no figure; COLUMNS says which other keys a suite's rows have.
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

from linvideo.evaluation.latency import device_name

FORMAT = 1
FOLDER = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "diffusers", "flash-linear-attention", "flash-attn", "sageattention", "flash_bla")
ENVIRONMENT = ("device", "driver", "cuda", "python", "packages", "commit", "date", "rates")
# suite -> the keys that tell its rows apart, and further keys
COLUMNS = {
    "op": (("shape", "dtype", "name", "pass"), ("sizes", "gbytes", "tflops", "peak_mib")),
    "block": (("model", "attention", "compiled"), ("tokens", "layers", "peak_mib")),
    "model": (("model", "backend", "linear_layers", "compiled", "how"), ("tokens", "layers", "peak_mib")),
    "train": (("model", "step", "attention"), ("tokens", "layers", "peak_mib")),
}


def environment(rates: dict) -> dict:
    """Where and with what; `rates` of measure.rates."""
    cuda = torch.cuda.is_available()
    return {
        "device": device_name("cuda") if cuda else f"{_processor()}, {torch.get_num_threads()} threads",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
        "rates": rates,
    }


def save(rows: list[dict], environment: dict, folder: Path = FOLDER) -> Path:
    """One file of one suite's rows; a number is added to its name where there is one already."""
    document = {"format": FORMAT, "environment": environment, "rows": rows}
    check(document)
    suites = "-".join(sorted({row["suite"] for row in rows}))
    device = "cpu" if environment["cuda"] is None else re.sub(r"^nvidia-|[^a-z0-9]+$", "", slug(environment["device"]))
    stem = f"{device}-{environment['date']}-{suites}"
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".{stem}.{os.getpid()}"
    aside.write_text(json.dumps(document, indent=1) + "\n")
    for number in range(1, 1000):
        path = folder / f"{stem}{'' if number == 1 else f'-{number}'}.json"
        try:
            os.link(aside, path)  # fails where the name is taken
        except FileExistsError:
            continue
        aside.unlink()
        return path
    raise ValueError(f"expected fewer than 1,000 results named {stem} in {folder}")


def load(folder: Path = FOLDER) -> list[dict]:
    """All files there, oldest first."""
    documents = map(read, sorted(folder.glob("*.json")))
    return sorted(documents, key=lambda document: (document["environment"]["date"], document["name"]))


def read(path: Path) -> dict:
    """One file, with its name. ValueError where it is none of ours."""
    try:
        document = json.loads(path.read_text())
        check(document)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return document | {"name": path.stem}


def check(document: dict) -> None:
    """ValueError where a file does not hold what the module's docstring says."""
    if document.get("format") != FORMAT:
        raise ValueError(f"expected format {FORMAT}, got {document.get('format')!r}")
    missing = [key for key in ENVIRONMENT if key not in document.get("environment", {})]
    if missing:
        raise ValueError(f"expected the environment to have {', '.join(missing)}")
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
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _processor() -> str:
    try:
        names = re.findall(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return f"CPU {names[0] if names else platform.machine()}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    root = str(Path(__file__).parents[1])
    commit = _output("git", "-C", root, "rev-parse", "HEAD")
    changed = _output("git", "-C", root, "status", "--porcelain", "--untracked-files=no")
    return f"{commit} with changes" if commit and changed else commit


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None
