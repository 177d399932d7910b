"""drift import-prior"""

import argparse
from pathlib import Path

from drift.cli.command import Run
from drift.cli.import_release import USE_OF_AN_ENCODER, settings_line


def add(parser: argparse.ArgumentParser) -> Run:
    """an MAE checkpoint of arXiv 2603.12366's code (ckpt_final.pt) as an encoder of ours"""
    parser.description = """\
Convert the EMA weights of an MAE checkpoint of the prior's code into a folder
of ours: config.json and safetensors. The encoder keeps the prior's
conventions (no norms between stages, GroupNorm's eps 1e-5) and its feature sets,
in which mean and std of a map stand together. Every weight must find its place.

The file is read as data alone: what would have to be executed is refused."""
    parser.epilog = (
        """\
examples:
  drift import-prior runs/imagenet_mae/w256/checkpoints/ckpt_final.pt imported/prior_mae

"""
        + USE_OF_AN_ENCODER
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="the prior's ckpt_final.pt")
    parser.add_argument(
        "destination", metavar="FOLDER", type=Path, help="where to write; made if it is missing"
    )

    def run(args: argparse.Namespace) -> None:
        from drift.interop.sinkhorn_paper import import_sinkhorn_mae

        model = import_sinkhorn_mae(args.checkpoint, args.destination)
        width, layers = model.config.base_channels, list(model.config.layers)
        print(f"SinkhornMAE of width {width}, layers {layers}: wrote {args.destination}")
        print(f"as the encoder of a run: {settings_line(args.destination)}")

    return run
