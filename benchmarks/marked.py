"""Parts of a file that a program writes, between two lines that mark them."""

from pathlib import Path

from linvideo.trajectories.atomic_files import write_text


def fill(file: Path, begin: str, end: str, new: str) -> None:
    """Replace what stands between the markers `begin` and `end` of `file`; every other byte stays.

    Raises:
        ValueError: See `replaced`.
    """
    write_text(file, replaced(file.read_bytes().decode(), begin, end, new, file))


def replaced(text: str, begin: str, end: str, new: str, file: Path) -> str:
    """Return `text`, the content of `file`, with `new` between the markers.

    Raises:
        ValueError: The text doesn't have each marker exactly once, `begin` before `end`.
    """
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    counts = text.count(begin), text.count(end)
    if counts != (1, 1) or end not in rest:
        found = "them in another order" if counts == (1, 1) else f"{counts[0]} and {counts[1]} of them"
        raise ValueError(f"expected the lines {begin} and {end} once each and in this order in {file}, got {found}")
    return f"{before}{begin}{new}{end}{after}"
