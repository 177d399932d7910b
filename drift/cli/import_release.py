"""drift import-release"""

import argparse
from pathlib import Path

from drift.cli.command import Run


def add(parser: argparse.ArgumentParser) -> Run:
    """weights of the authors' release (JAX) as a folder of ours"""
    parser.description = """\
Convert a generator or a feature encoder of the authors' release into a folder
of ours: config.json and safetensors. Every array of the file must find
its place, and every place its array; nothing in the files is executed.

SOURCE is a name on the hub, from which metadata.json and ema_params.msgpack are
downloaded once (Goodeat/drifting on the Hugging Face hub):

  generators  latent_L_sota latent_B_sota pixel_L_sota pixel_B_sota ablation
  encoders    mae_latent_256 mae_latent_640 mae_pixel_640

or a local folder with these two files."""
    parser.epilog = (
        """\
examples:
  drift import-release mae_latent_640 imported/mae_latent_640
  drift import-release latent_L_sota imported/latent_L
  drift sample imported/latent_L --vae stabilityai/sd-vae-ft-mse --classes 207
  python -m stages.fid --generator imported/latent_L --out imported/fid.json \\
      --plots imported/plots --report imported/report.html

"""
        + USE_OF_AN_ENCODER
    )
    parser.add_argument("source", metavar="SOURCE", help="a name above, or a folder of the release")
    parser.add_argument(
        "destination", metavar="FOLDER", type=Path, help="where to write; made if it is missing"
    )
    parser.add_argument("--revision", help="branch, tag or commit on the hub")

    def run(args: argparse.Namespace) -> None:
        from drift.interop.release import RELEASES, download_release, import_release
        from drift.models.mae import LatentMAE

        source = args.source
        if source in RELEASES and not Path(source).is_dir():
            source = download_release(source, args.revision)
        model = import_release(source, args.destination)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(
            f"{type(model).__name__} of {parameters / 1e6:.1f} million parameters: wrote {args.destination}"
        )
        if isinstance(model, LatentMAE):
            print(f"as the encoder of a run: {settings_line(args.destination)}")

    return run


USE_OF_AN_ENCODER = """\
An encoder becomes the output of the stage mae by a setting. The stage then
trains nothing, and without the view it would train on, encode makes less:

  dvc exp run -S mae.source=FOLDER -S mae.view=center -S 'views=[center]'

or the same three keys in params.yaml, and dvc repro. DVC then knows it like any
other: dvc status is clean, dvc push shares it. Converting another file into the
same folder is seen by the next dvc repro --force mae."""


def settings_line(folder: Path) -> str:
    """The command that trains a generator with an imported encoder."""
    return f"dvc exp run -S mae.source={folder} -S mae.view=center -S 'views=[center]'"
