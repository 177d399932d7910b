"""Take an MAE of the Sinkhorn paper's code for the output of the stage mae.

SOURCE is converted into FOLDER (drift import-sinkhorn), mae.source in params.yaml
names that, and the stage mae runs: it takes the encoder as it is, and measures its
masked error. Without augmented latents, encode is not asked for any either.

examples:
  drift adopt mae gdrive:runs/imagenet_mae/w256 --to imported/w256
  drift adopt mae ~/ckpt_final.pt --to imported/w256 --no-commit
"""

import argparse
from pathlib import Path

from drift.cli.options import add_params, check_committable, settings_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="SOURCE", help="ckpt_final.pt, or its run (a folder, or NAME:PATH of rclone)"
    )
    parser.add_argument("--to", metavar="FOLDER", type=Path, required=True, help="where the encoder is kept")
    add_params(parser)
    parser.add_argument("--force", action="store_true", help="replace FOLDER if it exists")
    parser.add_argument("--no-commit", action="store_true", help="leave params.yaml and the stage to you")


def run(args: argparse.Namespace) -> None:
    from drift.settings import load_settings
    from drift.sharing.adopt import adopt_mae, run_dvc, use_encoder

    check_committable(args.params, args.no_commit)
    load_settings(args.params)
    model = adopt_mae(args.source, args.to, force=args.force)
    print(f"MAE of width {model.config.base_channels}: wrote {args.to}")
    if args.no_commit:
        print(settings_line(args.to))
        return
    for key, value in use_encoder(args.to, args.params, Path("artifacts/latents")).items():
        print(f"wrote {args.params}: {key} = {value}", flush=True)
    run_dvc("repro", "--single-item", "mae")
    print("wrote dvc.lock: mae has taken the encoder; dvc push hands it on")
