"""The table of commands, `main`, and how an error is said: bad input in one line, with exit status 2."""

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

# in the order of a user's day
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
ONLY_CONFIG = (train_command, distill_command)  # all their options are the config's: its parser prints their help
# options of earlier versions
RENAMED = {"--model": "MODEL is positional: expected linvideo COMMAND MODEL [options]"}
RENAMED |= {"--feature_maps": "expected --fitted_maps"}
OUT_OF_MEMORY = ("can't allocate memory", "out of memory")  # in PyTorch's messages, of the host and of GPUs


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; --help has the rest."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


class Version(argparse.Action):
    """Prints the versions that matter, without importing what they are of."""

    def __call__(self, parser, *_):
        from importlib.metadata import PackageNotFoundError, version

        import linvideo

        print(f"linvideo {linvideo.__version__}")
        for name in ("torch", "triton", "diffusers"):
            try:
                print(name, version(name))
            except PackageNotFoundError:
                print(name, "is not installed")
        parser.exit()


def name_of(module) -> str:
    """The command whose file this is."""
    return module.__name__.rpartition(".")[2].removesuffix("_command")


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="linvideo", description="Linear attention for video diffusion transformers.")
    parser.add_argument("--version", action=Version, nargs=0, help="of linvideo, torch, triton and diffusers")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
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
    """A command's examples, for the end of its help."""
    return "\n  ".join(["examples:", *module.EXAMPLES.split("\n")[1:-1]])


def underscored(word: str) -> str:
    """--num-frames as --num_frames: diffusers-cli writes its flags with hyphens, its scripts with underscores."""
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
            reason = " ".join(str(error).split()) or "the system gave no more"
            print(f"linvideo: error: not enough memory: {reason[:400]}", file=sys.stderr)
            return 1
        if str(error).startswith("Symlink loop"):  # so Path.resolve says before Python 3.13
            print(f"linvideo: error: {error}", file=sys.stderr)
            return 2
        # Not the user's input: a run that diverged or a failed kernel check. Everything else keeps its traceback.
        if type(error).__module__.split(".")[0] != "linvideo":
            raise
        print(f"linvideo: error: {error}", file=sys.stderr)
        return getattr(error, "exit_status", 1)
    except ModuleNotFoundError as error:
        print(f"linvideo: error: {error.name} is missing; pip install 'linvideo[train]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("linvideo: interrupted", file=sys.stderr)
        return 130
