"""Reading a configuration from YAML files, recipes and the command line. Later values win."""

import argparse
import dataclasses
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from linvideo.run.bounded_yaml import MOST_CHARACTERS, read_yaml
from linvideo.run.run_config import RunConfig

LONGEST = 400  # length of an error message in characters
RECIPES = resources.files("linvideo") / "recipes"
Config = TypeVar("Config", bound=RunConfig)


def make_parser(kind: type[RunConfig], description: str | None = None, epilog: str = ""):
    """Return the jsonargparse parser for a kind of config: one option per field, with the docstrings as help.

    Args:
        kind: The config class.
        description: Description of the command for its help.
        epilog: Text at the end of the help, before the names of the recipes.
    """
    import yaml
    from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_loader

    class AsWritten(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    set_loader("bounded_yaml", read_yaml, exceptions=(yaml.YAMLError,))
    parser = ArgumentParser(
        prog=f"linvideo {kind.command}",
        usage=f"linvideo {kind.command} [MODEL] [options]",
        description=description,
        epilog=f"{epilog}\n\nrecipes for --config: {', '.join(sorted(_recipes()))}".strip(),
        formatter_class=AsWritten,
        exit_on_error=False,
        parser_mode="bounded_yaml",
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the options below, or a recipe's name")
    # Each section's options are added one by one. A single option of the section's type would also accept a class_path,
    # and jsonargparse would import whatever module a config names there.
    sections = _sections(kind)
    parser.add_class_arguments(kind, as_group=False, skip=set(sections))
    for name, default in sections.items():
        group = parser.add_argument_group(name)
        group.add_class_arguments(type(default()), name, as_group=False, default=default())
    return parser


def _sections(kind: type[RunConfig]) -> dict[str, Callable[[], Any]]:
    """Return name -> factory of the default for all sections of a config."""
    return {f.name: f.default_factory for f in dataclasses.fields(kind) if dataclasses.is_dataclass(f.type)}


def _recipes() -> dict[str, str]:
    """Return name -> path of all recipes."""
    return {path.name.removesuffix(".yaml"): str(path) for path in RECIPES.iterdir()}


def load_config(argv: list[str], kind: type[Config], description: str | None = None, epilog: str = "") -> Config:
    """Read a config from `--config file.yaml` and dotted `--name value` arguments. Later arguments win.

    --config also takes the name of a recipe in linvideo/recipes. `--help` prints the options and exits.

    Args:
        argv: The command-line arguments.
        kind: The config class.
        description: See make_parser.
        epilog: See make_parser.

    Raises:
        ValueError: The arguments are not a valid configuration. The message is one line.
    """
    values = _values(argv, make_parser(kind, description, epilog))
    values.pop("config", None)
    return from_dict(values, kind)


def given_options(argv: list[str], kind: type[RunConfig]) -> set[str]:
    """Return the dotted names of the options that the arguments set, directly or in a file given with --config.

    --config itself counts as "config".
    """
    found, left = set(), [("", _values(argv, make_parser(kind), defaults=False))]
    while left:
        prefix, values = left.pop()
        for name, value in values.items():
            left += [(f"{prefix}{name}.", value)] if isinstance(value, dict) else []
            found.add(prefix + name)
    return found


def _values(argv: list[str], parser: Any, defaults: bool = True) -> dict[str, Any]:
    """Parse the arguments to nested plain values, with or without the parser's defaults."""
    from jsonargparse import ArgumentError

    names = _recipes()
    argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    for place, word in enumerate(argv):
        if word == "--config" and (place + 1 == len(argv) or argv[place + 1].startswith("--")):
            raise ValueError("--config must name a YAML file or a recipe, got nothing")
        if place and argv[place - 1] == "--config" and (not Path(word).exists() or Path(word).is_dir()):
            if word not in names and ":" not in word:  # with a colon it may be YAML text
                known = ", ".join(sorted(names))
                raise ValueError(f"--config must be a YAML file or the name of a recipe, got {word}; recipes: {known}")
            argv = [*argv[:place], names.get(word, word), *argv[place + 1 :]]
        elif place and argv[place - 1] == "--config" and Path(word).stat().st_size > MOST_CHARACTERS:
            raise ValueError(f"expected a config of at most {MOST_CHARACTERS} characters, got more in the file {word}")
    try:
        return parser.parse_args(argv, defaults=defaults).as_dict()
    except (ArgumentError, TypeError, OSError) as error:
        raise ValueError(_one_line(error)) from None


def from_dict(values: dict[str, Any], kind: type[Config]) -> Config:
    """Return the config for nested plain values; the inverse of `to_dict`."""
    sections = _sections(kind)
    for name in sections.keys() & values.keys():
        if not isinstance(values[name], dict):
            raise ValueError(f"{name} must be a section of options, got {values[name]!r:.200}")
    try:
        parts = {n: dataclasses.replace(default(), **values[n]) for n, default in sections.items() if n in values}
        return kind(**{**values, **parts})
    except TypeError as error:
        raise ValueError(_one_line(error)) from None


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines) or type(error).__name__
    return text if len(text) <= LONGEST else text[:LONGEST] + " ..."
