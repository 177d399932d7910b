"""Look at latents: some decoded, and statistics of all of them.

Writes OUT/latents.png (each with its image below), OUT/histogram.png (each channel
beside the unit normal) and OUT/meta.json (all numbers). Lines with "warning:" say what
does not look as it should. All files are read, and compared with the hashes they state.

examples:
  drift inspect latents --view augmented --compare-images
  drift inspect latents /data/latents --compare-images /data/imagenet --count 64
"""

import argparse
import sys
from pathlib import Path

from drift.cli.options import add_inspection, add_params, count, look, show_inspection


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", type=Path, metavar="FOLDER", help="(artifacts/latents/<view>)")
    parser.add_argument("--view", choices=("center", "augmented"), help="center, or what FOLDER holds")
    parser.add_argument("--count", type=count, default=32, metavar="N", help="latents to decode (32)")
    add_params(parser)
    add_inspection(parser, "outputs/latents-<view or name of FOLDER>")


def run(args: argparse.Namespace) -> None:
    from drift.evaluation.inspect_latents import inspect_latents
    from drift.settings import load_settings

    view = args.view or (None if args.folder else "center")
    show_inspection(
        inspect_latents(
            args.folder or Path("artifacts/latents", view),
            load_settings(args.params),
            args.out or Path(f"outputs/latents-{view or args.folder.resolve().name}"),
            look(args),
            view=view,
            progress=sys.stderr.isatty(),
        )
    )
