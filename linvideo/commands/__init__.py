"""The `linvideo` command: a file NAME_command.py for each of its commands, with the arguments and the function that
runs them.

A command has SUMMARY (what it does, in one line), EXAMPLES (command lines), add_arguments(parser) and run(args). It
holds no logic: arguments in, one call of the Python API, a readable answer out. main.py has the table of commands.
"""

import os

# Before PyTorch is imported: OpenMP's threads wait for each other by spinning, which takes many times the processor
# time, and the wall time too, where other programs want the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
