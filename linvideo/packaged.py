"""Files of the installed package, by the names that recipes give them."""

import os
from importlib import resources


def packaged(path: str) -> str:
    """Where "linvideo/..." is in the installed package, unless the current folder has it; any other path as it is."""
    inside = str(resources.files("linvideo").joinpath(path.removeprefix("linvideo/")))
    return inside if path.startswith("linvideo/") and not os.path.exists(path) and os.path.exists(inside) else path
