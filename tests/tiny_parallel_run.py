"""Runs of tests/tiny_run.py under torchrun: a folder, and a JSON file of name -> overrides of the config.

"die": [stage, step, rank] among the overrides kills that rank there. Each rank prints "<rank> <process id>" when
everything is imported.
"""

import json
import os
import sys
from pathlib import Path

import torch
from tiny_run import die_at, run

from linvideo.training.parallel import disconnect

if __name__ == "__main__":
    torch.set_num_threads(1)
    print(os.environ["RANK"], os.getpid(), flush=True)
    folder, runs = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    for name, overrides in runs.items():
        stage, step, rank = overrides.pop("die", (None, None, None))
        if rank == int(os.environ["RANK"]):
            die_at(stage, step)
        run(folder / name, **overrides)
    disconnect()
