"""Reading YAML with limits: a document that is too large is refused before building it takes much time or memory."""

from typing import Any

# our configs have about a hundred values in three levels
MOST_CHARACTERS, MOST_VALUES, DEEPEST = 200_000, 10_000, 20


def read_yaml(text: str) -> Any:
    """Return the value of a YAML document, read the way jsonargparse reads it.

    Raises:
        yaml.YAMLError: The text is not YAML, is too long or nested too deeply, or its aliases expand to too many
        values.
    """
    from jsonargparse import get_loader

    check_size(text)
    return get_loader("yaml")(text)


def check_size(text: str) -> None:
    """Raise yaml.YAMLError when the document, with all aliases expanded, is too large or nested too deeply."""
    import yaml

    if len(text) > MOST_CHARACTERS:
        raise yaml.YAMLError(f"expected at most {MOST_CHARACTERS} characters, got {len(text)}")
    # both parsers take time quadratic in the depth, the one in Python much more of it
    if text.count("[") + text.count("{") > MOST_VALUES:
        raise yaml.YAMLError(f"expected at most {MOST_VALUES} values, got more opening brackets")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    sizes: dict[str, int] = {}  # anchor -> values below it
    open_parts: list[tuple[str | None, int]] = [(None, 0)]
    for event in yaml.parse(text, Loader=loader):
        if isinstance(event, yaml.CollectionStartEvent):
            open_parts.append((event.anchor, 0))
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_parts.pop()
        elif isinstance(event, yaml.AliasEvent):
            anchor, size = None, sizes.get(event.anchor, MOST_VALUES)  # an alias of a node around it never ends
        elif isinstance(event, yaml.ScalarEvent):
            anchor, size = event.anchor, 0
        else:
            continue
        if anchor is not None:
            sizes[anchor] = size + 1
        outer, before = open_parts[-1]
        open_parts[-1] = (outer, before + size + 1)
        if before + size >= MOST_VALUES or len(open_parts) > DEEPEST:
            raise yaml.YAMLError(f"expected at most {MOST_VALUES} values in {DEEPEST} levels, got more")
