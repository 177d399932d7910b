"""Look at an MAE: what it reconstructs, its error, its feature sets.

Writes OUT/meta.json and OUT/mae.png, from above: masked error, image, decoded latent,
the same with masked places grey, with those filled in, the network's output. The
masked error is what the stage mae logs; beside it stands that of each channel's mean.
--check-feature-sets shows for each set whether it tells 64 latents apart.
Lines with "warning:" say what does not look as it should.

examples:
  drift inspect mae --latents artifacts/latents/augmented --compare-images
  drift inspect mae runs/wide --params presets/imagenet256_l2.yaml --check-feature-sets
"""

import argparse
from pathlib import Path

from drift.cli.options import add_inspection, add_params, count, look, show_inspection

MAE, LATENTS = Path("artifacts/mae"), Path("artifacts/latents/center")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", type=Path, default=MAE, metavar="FOLDER", help=f"({MAE})")
    parser.add_argument("--latents", type=Path, default=LATENTS, metavar="FOLDER", help=f"({LATENTS})")
    parser.add_argument("--count", type=count, default=8, metavar="N", help="latents to show (8)")
    parser.add_argument(
        "--rows", type=count, default=1024, metavar="N", help="latents for the masked error (1024)"
    )
    parser.add_argument("--check-feature-sets", action="store_true", help="look at every feature set")
    add_params(parser)
    add_inspection(parser, "outputs/mae")


def run(args: argparse.Namespace) -> None:
    from drift.evaluation.inspect_features import inspect_mae
    from drift.settings import load_settings

    show_inspection(
        inspect_mae(
            args.folder,
            args.latents,
            load_settings(args.params),
            args.out or Path("outputs/mae"),
            look(args),
            rows=args.rows,
            feature_sets=args.check_feature_sets,
        )
    )
