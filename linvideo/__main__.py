"""`python -m linvideo` and `torchrun -m linvideo`: the same as the console script."""

import sys

from linvideo.commands.main import main

sys.exit(main())
