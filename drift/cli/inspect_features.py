"""Look at feature sets: whether each tells latents apart, and what it has near what.

Writes OUT/meta.json and OUT/neighbours.png, with a block for each of some sets (--sets
names others): in a row a latent, and of --rows others those nearest to it by this set,
with a red frame where they are of another class.
The table has of each set, on 64 latents: locations L, channels C, the scale S that the
field divides by, its RMS, and the share of channels that are the same for all.
Lines with "warning:" say which sets no field can use.

examples:
  drift inspect features
  drift inspect features convnext --sets convnext_stage_1 convnext_global_mean
  drift inspect features '{encoder: dinov2, source: models/dinov2}' --count 8
"""

import argparse
from pathlib import Path

from drift.cli.options import add_inspection, count, look

MAE, OUT = Path("artifacts/mae"), Path("outputs/features")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "encoders",
        nargs="*",
        metavar="ENCODER",
        help="a name, or with options as in features: (those of the settings)",
    )
    add("--mae", type=Path, default=MAE, metavar="FOLDER", help="of the encoder mae (%(default)s)")
    add("--latents", type=Path, metavar="FOLDER", help="(artifacts/latents/<drift.view>)")
    add("--sets", nargs="+", default=[], metavar="SET", help="to show neighbours by (six of them)")
    add("--rows", type=count, default=1024, metavar="N", help="latents among which to look (1024)")
    add_inspection(parser, 4, str(OUT))


def run(args: argparse.Namespace) -> None:
    from drift.evaluation.inspect_features import inspect_features
    from drift.settings import load_settings

    settings = load_settings(args.params)
    if args.encoders:
        settings = settings.with_features(args.encoders)
    choice = {"mae": args.mae, "sets": args.sets, "rows": args.rows}
    latents = args.latents or Path("artifacts/latents", settings.drift.view)
    lines = inspect_features(latents, settings, args.out or OUT, look(args), **choice)
    print(*lines, sep="\n")
