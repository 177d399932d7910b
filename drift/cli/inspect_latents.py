"""Look at latents: some decoded, and statistics of all of them.

Writes OUT/latents.png (each with its image below), OUT/histogram.png (each channel
beside the unit normal) and OUT/meta.json (all numbers). Lines with "warning:" say what
does not look as it should. All files are read, and compared with the hashes they state.

examples:
  drift inspect latents --view augmented --compare-images
  drift inspect latents /data/latents --compare-images /data/imagenet --count 64
"""

import argparse
from pathlib import Path

from drift.cli.options import add_inspection, look


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", type=Path, metavar="FOLDER", help="(artifacts/latents/<view>)")
    parser.add_argument("--view", choices=("center", "augmented"), help="drift.view, or what FOLDER holds")
    add_inspection(parser, 32, "outputs/latents-<view or name of FOLDER>")


def run(args: argparse.Namespace) -> None:
    from drift.evaluation.inspect_latents import inspect_latents
    from drift.settings import load_settings

    settings = load_settings(args.params)
    view = args.view or (settings.drift.view if args.folder is None else None)
    folder = args.folder or Path("artifacts/latents", view or "")
    out = args.out or Path(f"outputs/latents-{view or folder.resolve().name}")
    lines = inspect_latents(folder, settings, out, look(args), view)
    print(*lines, sep="\n")
