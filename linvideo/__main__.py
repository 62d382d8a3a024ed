"""`python -m linvideo` and `torchrun -m linvideo`, which do the same as the `linvideo` command."""

import sys

from linvideo.commands.main import main

sys.exit(main())
