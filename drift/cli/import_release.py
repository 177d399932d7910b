"""Convert weights of the authors' release (JAX) into a folder of ours.

SOURCE is a folder with metadata.json and ema_params.msgpack, or a name of
Goodeat/drifting on the Hugging Face hub:
  generators  latent_L_sota latent_B_sota pixel_L_sota pixel_B_sota ablation
  encoders    mae_latent_256 mae_latent_640 mae_pixel_640
Every array must find its place, and every place its array. Nothing is executed.

examples:
  drift import-release mae_latent_640 imported/mae_640
  dvc exp run -S ++mae.source=imported/mae_640 -S ++mae.view=center -S 'views=[center]'
  drift import-release latent_L_sota imported/latent_L
  drift sample imported/latent_L --vae stabilityai/sd-vae-ft-mse --classes 207
  drift sample imported/pixel_L --vae pixels --classes 207
"""

import argparse
from pathlib import Path

from drift.cli.options import settings_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="a name above, or a folder of the release")
    parser.add_argument("destination", metavar="FOLDER", type=Path, help="where to write")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")


def run(args: argparse.Namespace) -> None:
    from drift.interop.release import RELEASES, download_release, import_release
    from drift.models import LatentMAE

    source = args.source
    if source in RELEASES and not Path(source).is_dir():
        source = download_release(source, args.revision)
    model = import_release(source, args.destination)
    million = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"{type(model).__name__} of {million:.1f} million parameters: wrote {args.destination}")
    if isinstance(model, LatentMAE):
        print(settings_line(args.destination, pixels=model.input_patch_size > 1))
