"""Runs of tiny_run.py under torchrun. The arguments are a folder and a JSON file {name: overrides of the config}.

Further keys in the overrides:
    distill    Whether to run tiny_distill_run.py instead.
    die        [stage, step, rank]: kill that rank at that step.
    like_cuda  Whether RMSNorm returns fp32 under autocast, as it does on CUDA but not on the CPU.

Each rank prints "<rank> <process id>" when everything is imported.
"""

import json
import os
import socket
import sys
from pathlib import Path

import tiny_distill_run
import tiny_run
import torch

from linvideo.run.parallel import disconnect


def torchrun_arguments(processes: int, folder: Path, runs: dict[str, dict]) -> dict:
    """Return the arguments for subprocess that run each {name: overrides} in folder/name, in turn and in one job."""
    (folder / "runs.json").write_text(json.dumps(runs))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
    command += [str(Path(__file__).resolve()), str(folder), str(folder / "runs.json")]
    return {"args": command, "env": tiny_run.ENVIRONMENT, "text": True}


def rms_norm_in_fp32(self, x: torch.Tensor) -> torch.Tensor:
    weight = None if self.weight is None else self.weight.float()
    with torch.autocast("cpu", enabled=False):
        return torch.nn.functional.rms_norm(x.float(), self.normalized_shape, weight, self.eps)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(os.environ["RANK"], os.getpid(), flush=True)
    folder, runs = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    for name, overrides in runs.items():
        stage, step, rank = overrides.pop("die", (None, None, None))
        if overrides.pop("like_cuda", False):
            torch.nn.RMSNorm.forward = rms_norm_in_fp32
        if rank == int(os.environ["RANK"]):
            tiny_run.die_at(stage, step)
        runs_of = tiny_distill_run if overrides.pop("distill", False) else tiny_run
        runs_of.run(folder / name, **overrides)
    disconnect()
