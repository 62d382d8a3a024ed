"""Attack the package's files and commands, and report what survives: python -m tests.attack [SECTION ...].

The section flip damages files of interrupted work and continues it; kill kills commands at their file-system events and
repeats them; two starts everything twice at the same time; inputs gives bad values to every option. All four take forty
minutes on two cores, or a quarter of an hour with --count 3. The exit status is 1 if anything does not survive.
"""

import argparse
import os
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.attack import flip, inputs, kill, two
from tests.attack.subjects import Bench

SECTIONS = {"flip": flip, "kill": kill, "two": two, "inputs": inputs}
FINE = ("survived", "refused", "recovered", "harmless", "running")


def main() -> int:
    what, _, more = __doc__.partition("\n")
    parser = argparse.ArgumentParser(prog="python -m tests.attack", description=what, epilog=more)
    what = f"sections to run, among {', '.join(SECTIONS)}; default: all"
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=what)
    parser.add_argument("--seed", type=int, default=0, help="seed of all random draws; default: 0")
    what = "number of attacks on each kind of file or each command; default: 10"
    parser.add_argument("--count", type=int, default=10, help=what)
    what = "commands to attack, such as train analyze; default: all"
    parser.add_argument("--only", nargs="+", metavar="COMMAND", default=[], help=what)
    parser.add_argument("--output_dir", type=Path, help="empty folder to work in; default: a temporary one")
    args = parser.parse_args()
    if unknown := set(args.sections) - SECTIONS.keys():
        parser.error(f"expected sections among {', '.join(SECTIONS)}, got {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory(dir=args.output_dir, prefix="attack-") as base:
        os.environ["XDG_CACHE_HOME"] = f"{base}/cache"
        bench = Bench(Path(base).resolve(), args.only)
        failures = sum(attack(name, bench, args) for name in args.sections or SECTIONS)
    print(f"{failures} attacks were not survived" if failures else "all attacks were survived")
    return min(failures, 1)


def attack(name: str, bench: Bench, args: argparse.Namespace) -> int:
    """Print each failure of a section when it happens, and then a table; return the number of failures."""
    started, tally, failures = time.monotonic(), {}, 0
    for target, what, verdict, why in SECTIONS[name].attack(bench, args.seed, args.count):
        tally.setdefault(target, Counter())[verdict] += 1
        if verdict not in FINE:
            failures += 1
            print(f"{name}: {target}: {verdict}: {what}\n    {why}", flush=True)
    columns = [*FINE, *sorted({verdict for found in tally.values() for verdict in found} - set(FINE))]
    columns = [column for column in columns if any(found[column] for found in tally.values())]
    print(f"\n{name}, {time.monotonic() - started:.0f} s\n\n| | tried | {' | '.join(columns)} |")
    print(f"|---|---:|{'---:|' * len(columns)}")
    for target, found in tally.items():
        print(f"| {target} | {found.total()} | {' | '.join(str(found[column]) for column in columns)} |")
    print(flush=True)
    return failures


if __name__ == "__main__":
    raise SystemExit(main())
