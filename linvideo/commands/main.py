"""The table of commands, `main`, and the reporting of errors: bad input ends in one line and exit status 2."""

import argparse
import sys

from linvideo.commands import (
    analyze_command,
    check_command,
    collect_command,
    convert_command,
    demo_command,
    distill_command,
    evaluate_command,
    generate_command,
    info_command,
    plan_command,
    train_command,
)
from linvideo.commands.shared import choose_device, choose_dtype

# in the order in which a user needs them
COMMANDS = (
    demo_command,
    info_command,
    check_command,
    analyze_command,
    convert_command,
    plan_command,
    collect_command,
    train_command,
    distill_command,
    generate_command,
    evaluate_command,
)
ONLY_CONFIG = (train_command, distill_command)  # they have no other options than the config's, whose parser prints help
# options of earlier versions, and what replaced them
RENAMED = {"--model": "MODEL is positional: expected linvideo COMMAND MODEL [options]"}
RENAMED |= {"--feature_maps": "expected --fitted_maps"}
OUT_OF_MEMORY = ("can't allocate memory", "out of memory")  # PyTorch's words for the host and for GPUs


EPILOG = """Start with `linvideo demo --output_dir demo`: it needs no GPU and downloads nothing.
`linvideo COMMAND --help` shows the options of a command, with examples."""


class Parser(argparse.ArgumentParser):
    """A parser that reports an error in one line, without the usage."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


class Version(argparse.Action):
    """Prints the versions that matter, without importing the packages."""

    def __call__(self, parser, *_):
        from importlib.metadata import PackageNotFoundError, version

        import linvideo

        print(f"linvideo {linvideo.__version__}")
        for name in ("torch", "triton", "diffusers"):
            try:
                print(name, version(name))
            except PackageNotFoundError:
                print(f"{name} is not installed")
        parser.exit()


def name_of(module) -> str:
    """Return the name of the command that this module defines."""
    return module.__name__.rpartition(".")[2].removesuffix("_command")


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="linvideo", description="Linear attention for video diffusion transformers.", epilog=EPILOG)
    what = "show the versions of linvideo, torch, triton and diffusers and exit"
    parser.add_argument("--version", action=Version, nargs=0, help=what)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for module in COMMANDS:
        command = commands.add_parser(
            name_of(module),
            help=module.SUMMARY,
            description=f"{module.SUMMARY[0].upper()}{module.SUMMARY[1:]}.",
            epilog=examples(module),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            add_help=module not in ONLY_CONFIG,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def examples(module) -> str:
    """Return the examples of a command, for the end of its help."""
    return "\n  ".join(["examples:", *module.EXAMPLES.split("\n")[1:-1]])


def underscored(word: str) -> str:
    """Turn --num-frames into --num_frames. Both are accepted: diffusers-cli writes hyphens, its scripts underscores."""
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if name.startswith("--") else word


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    try:
        for name in (word.partition("=")[0] for word in argv):
            if name in RENAMED:
                raise ValueError(f"{RENAMED[name]}, got {name}")
        parser = make_parser()
        args, rest = parser.parse_known_args([underscored(word) for word in argv])
        if "config_options" in args:
            args.config_options = rest
        elif rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        if "device" in args:
            args.device = choose_device(args.device)
            if "dtype" in args:
                args.dtype = choose_dtype(args.dtype, args.device)
        return args.run(args) or 0
    except (ValueError, OSError) as error:
        print(f"linvideo: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY):
            reason = " ".join(str(error).split()) or "the system refused to allocate more"
            print(f"linvideo: error: not enough memory: {reason[:400]}", file=sys.stderr)
            return 1
        if str(error).startswith("Symlink loop"):  # Path.resolve raises this before Python 3.13
            print(f"linvideo: error: {error}", file=sys.stderr)
            return 2
        # Our own errors that are not about input, such as a diverged run, end here. All others keep their traceback.
        if type(error).__module__.split(".")[0] != "linvideo":
            raise
        print(f"linvideo: error: {error}", file=sys.stderr)
        return getattr(error, "exit_status", 1)
    except ModuleNotFoundError as error:
        print(f"linvideo: error: {error.name} is missing: pip install 'linvideo[train]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("linvideo: interrupted", file=sys.stderr)
        return 130
