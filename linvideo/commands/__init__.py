"""The `linvideo` command. Each of its commands has a file NAME_command.py.

Such a file defines SUMMARY (what the command does, in one line), EXAMPLES (command lines), add_arguments(parser) and
run(args). It holds no logic: it takes arguments, calls the Python API once and prints a readable answer. The table of
commands is in main.py.
"""

import os
import sys

# Must be set before PyTorch is imported. By default OpenMP's threads wait for each other by spinning, which multiplies
# the processor time, and the wall time as well when other programs want the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Before tqdm is imported: other packages' bars (loading, downloads) would fill a log file with carriage returns. Those
# of linvideo turn into lines there, see progress.py.
if sys.stderr is not None and not sys.stderr.isatty():
    os.environ.setdefault("TQDM_DISABLE", "1")
# Before transformers is imported: its notices of optional packages would be the first thing on the screen.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
