"""Runs of tests/tiny_run.py under torchrun: a folder, and a JSON file of name -> overrides of the config.

"die": [stage, step, rank] among the overrides kills that rank there; "like_cuda" has RMSNorm give fp32 under autocast,
as CUDA's does and the CPU's does not. Each rank prints "<rank> <process id>" when
everything is imported.
"""

import json
import os
import sys
from pathlib import Path

import torch
from tiny_run import die_at, run

from linvideo.training.parallel import disconnect


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
            die_at(stage, step)
        run(folder / name, **overrides)
    disconnect()
