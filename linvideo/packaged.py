"""Files of the installed package, under the names that recipes use."""

import os
from importlib import resources


def packaged(path: str) -> str:
    """Return where the path "linvideo/..." is in the installed package, unless it exists in the current folder.

    Any other path is returned as it is.
    """
    inside = str(resources.files("linvideo").joinpath(path.removeprefix("linvideo/")))
    return inside if path.startswith("linvideo/") and not os.path.exists(path) and os.path.exists(inside) else path
