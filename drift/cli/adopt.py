"""drift adopt"""

import argparse
from pathlib import Path

from drift.cli.command import Run
from drift.runtime.errors import UserError


def add(parser: argparse.ArgumentParser) -> Run:
    """take results that were handed on as plain folders for the output of a stage"""
    parser.description = """\
Copy a folder that somebody has handed on, check it, put it where a stage's
output belongs, and let DVC take it for that output: the stage then counts as
run with the settings of params.yaml."""
    parser.epilog = "drift adopt WHAT --help tells what the folder must hold."
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    kinds = parser.add_subparsers(title="what", metavar="WHAT", dest="what", required=True)
    _add_latents(
        kinds.add_parser(
            "latents",
            help="latents of one view, for the stage encode",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )
    _add_mae(
        kinds.add_parser(
            "mae",
            help="an MAE checkpoint of the prior, for the stage mae",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )
    return lambda args: args.adopt(args)


def _add_latents(parser: argparse.ArgumentParser) -> None:
    parser.description = """\
Take latents for the output of encode@VIEW. SOURCE is a folder, or NAME:PATH of
an rclone remote, and holds for the split train, and for any others:
  <split>_latents.npy   float16 [N, 4, 32, 32] (for images of 256 pixels)
  <split>_labels.npy    int64 [N], from 0 to data.classes - 1
  <split>_meta.json     what they were made from; may lack every key

They are copied to .work/adopt/ (a copy that was cut off goes on when the same
command is given again) and checked: types, shapes and counts, labels, every
value finite, the hashes and settings that the meta file states against the
files and params.yaml. A standard deviation far from 1 is a warning. Then they
become artifacts/latents/VIEW, with a meta file that is completed from
params.yaml and a settings.yaml that tells what was stated and what was taken
from there; and "dvc commit -f encode@VIEW" is run, which writes dvc.lock.

Whether they really were made from those settings, only whoever made them
knows: what the meta file does not state is believed."""
    parser.epilog = """\
examples:
  drift adopt latents gdrive:latents/center --view center
  drift adopt latents /mnt/usb/latents_aug --view augmented --force
  dvc status encode@center                  nothing has changed
  dvc repro                                 goes on from there

Exit code 2 after "error: ..." for what is refused; nothing is replaced then."""
    parser.add_argument("source", metavar="SOURCE", help="folder, or NAME:PATH of an rclone remote")
    parser.add_argument("--view", choices=("center", "augmented"), required=True, help="which view they are")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="the settings (params.yaml)")
    parser.add_argument("--force", action="store_true", help="replace latents that are there")
    parser.add_argument("--no-commit", action="store_true", help="leave dvc commit to you")

    def adopt(args: argparse.Namespace) -> None:
        from drift.settings import load_settings
        from drift.sharing.adopt import adopt_latents, commit

        _check_params(args)
        out, stage = Path("artifacts/latents") / args.view, f"encode@{args.view}"
        for line in adopt_latents(args.source, args.view, load_settings(args.params), out, force=args.force):
            print(line)
        print(f"wrote {out}", flush=True)
        if args.no_commit:
            print(f"not told to DVC yet: dvc commit -f {stage}")
            return
        commit(stage)
        print(f"wrote dvc.lock: {stage} counts as run; git add dvc.lock, and dvc push to hand them on")

    parser.set_defaults(adopt=adopt)


def _add_mae(parser: argparse.ArgumentParser) -> None:
    parser.description = """\
Take an MAE of the prior's code for the output of the stage mae. SOURCE is its
ckpt_final.pt, or the folder of the run that has it in checkpoints/, on this
machine or as NAME:PATH of an rclone remote.

The file is copied, read as data alone, and converted as by drift import-prior
into FOLDER. Then params.yaml gets mae.source = FOLDER (and, if there are no
augmented latents, mae.view = center and views = [center], as nothing needs them
any more), and the stage mae is run, which takes the encoder as it is and measures
its masked error on the latents. dvc status is clean after that."""
    parser.epilog = """\
examples:
  drift adopt mae gdrive:runs/imagenet_mae/w256 --to imported/w256
  drift adopt mae ~/ckpt_final.pt --to imported/w256 --no-commit"""
    parser.add_argument("source", metavar="SOURCE", help="ckpt_final.pt or the folder of its run")
    parser.add_argument("--to", metavar="FOLDER", type=Path, required=True, help="where the encoder is kept")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="the settings (params.yaml)")
    parser.add_argument("--force", action="store_true", help="replace FOLDER if it exists")
    parser.add_argument("--no-commit", action="store_true", help="leave params.yaml and the stage to you")

    def adopt(args: argparse.Namespace) -> None:
        from drift.cli.import_release import settings_line
        from drift.settings import load_settings
        from drift.sharing.adopt import adopt_mae, reproduce, use_encoder

        _check_params(args)
        load_settings(args.params)
        model = adopt_mae(args.source, args.to, force=args.force)
        print(f"SinkhornMAE of width {model.config.base_channels}: wrote {args.to}")
        if args.no_commit:
            print(f"as the encoder of a run: {settings_line(args.to)}")
            return
        for key, value in use_encoder(args.to, args.params, Path("artifacts/latents")).items():
            print(f"wrote {args.params}: {key} = {value}", flush=True)
        reproduce("mae")
        print("wrote dvc.lock: mae has taken the encoder; dvc push hands it on")

    parser.set_defaults(adopt=adopt)


def _check_params(args: argparse.Namespace) -> None:
    """DVC would record the settings of params.yaml for what was checked against others."""
    if not args.no_commit and args.params.resolve() != Path("params.yaml").resolve():
        raise UserError(f"--params {args.params}: DVC goes by params.yaml; copy it there, or add --no-commit")
