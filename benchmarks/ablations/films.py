"""Draw videos of several settings next to each other, one row each, from the same noise and captions.

`python -m benchmarks.ablations.films runs/ablations-small runs/films.png teacher "default" "every second"`
"""

import argparse
from pathlib import Path

from safetensors.torch import load_file

from benchmarks.ablations.bench import film, judged_captions
from benchmarks.ablations.settings import SETTINGS
from benchmarks.ablations.suite import TEACHER
from linvideo.demo.world import WORLDS
from linvideo.reports.films import film_picture
from linvideo.trajectories.atomic_files import read_json


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.ablations.films",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="folder of a suite's work, see python -m benchmarks.ablations")
    parser.add_argument("picture", type=Path, help="new PNG file")
    parser.add_argument(
        "settings", nargs="+", choices=[TEACHER, *SETTINGS], metavar="SETTING", help="names of settings"
    )
    parser.add_argument("--world", choices=WORLDS, default="small", help="world of the suite (default: small)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the runs (default: 0)")
    parser.add_argument("--video", type=int, default=0, help="number of the video among those kept (default: 0)")
    args = parser.parse_args(arguments)
    if args.picture.exists():
        parser.error(f"expected a new file for the picture, but {args.picture} exists")
    noises = read_json(args.folder / "request.json")["suite"].get("noises", 1)  # videos with the same caption
    number = args.video // noises
    captions = judged_captions(WORLDS[args.world], number + 1, args.seed)[number:]
    shown = slice(args.video, args.video + 1)
    films = {name: load_file(film(args.folder, name, args.seed))["videos"][shown] for name in args.settings}
    args.picture.write_bytes(film_picture(films, captions))


if __name__ == "__main__":
    main()
