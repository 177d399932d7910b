"""Look at an MAE: what it reconstructs, and its error.

Writes OUT/meta.json and OUT/mae.png, from top to bottom: masked error, image, decoded
latent, the same with masked places grey, with those filled in, the network's output.
The masked error is what the stage mae logs; beside it stands that of each channel's
mean.
Lines with "warning:" say what does not look as it should.

examples:
  drift inspect mae --latents artifacts/latents/augmented --compare-images
  drift inspect mae runs/wide --params presets/imagenet256_l2.yaml
"""

import argparse
from pathlib import Path

from drift.cli.options import add_inspection, count, look

MAE, OUT = Path("artifacts/mae"), Path("outputs/mae")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", nargs="?", type=Path, default=MAE, metavar="FOLDER", help="(%(default)s)")
    add("--latents", type=Path, metavar="FOLDER", help="(artifacts/latents/<drift.view>)")
    add("--rows", type=count, default=1024, metavar="N", help="latents for the masked error (1024)")
    add_inspection(parser, 8, str(OUT))


def run(args: argparse.Namespace) -> None:
    from drift.evaluation.inspect_mae import inspect_mae
    from drift.settings import load_settings

    settings = load_settings(args.params)
    lines = inspect_mae(
        args.folder,
        args.latents or Path("artifacts/latents", settings.drift.view),
        settings,
        args.out or OUT,
        look(args),
        rows=args.rows,
    )
    print(*lines, sep="\n")
