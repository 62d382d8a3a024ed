"""The `linvideo` command. Each of its commands has a file NAME_command.py.

Such a file defines SUMMARY (what the command does, in one line), EXAMPLES (command lines), add_arguments(parser) and
run(args). It holds no logic: it takes arguments, calls the Python API once and prints a readable answer. The table of
commands is in main.py.
"""

import os

# Must be set before PyTorch is imported. By default OpenMP's threads wait for each other by spinning, which multiplies
# the processor time, and the wall time as well when other programs want the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
