"""Convert an MAE checkpoint of the Sinkhorn paper's code into an encoder of ours.

Takes the EMA weights of its ckpt_final.pt (arXiv 2603.12366), and keeps that code's
conventions and feature sets. The file is read as data: nothing is executed.

examples:
  drift import-sinkhorn ckpt_final.pt imported/w256
  dvc exp run -S ++mae.source=imported/w256 -S ++mae.view=center -S 'views=[center]'
"""

import argparse
from pathlib import Path

from drift.cli.options import settings_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="ckpt_final.pt")
    parser.add_argument("destination", metavar="FOLDER", type=Path, help="where to write")


def run(args: argparse.Namespace) -> None:
    from drift.interop import import_sinkhorn_mae

    model = import_sinkhorn_mae(args.checkpoint, args.destination)
    width, layers = model.config.base_channels, list(model.config.layers)
    print(f"MAE of width {width}, layers {layers}: wrote {args.destination}")
    print(settings_line(args.destination))
