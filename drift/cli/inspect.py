"""drift inspect"""

import argparse
import sys
from pathlib import Path

from drift.cli.command import Run

_COMPARE = """\
--compare-images takes the images from data.root of the settings, or the digits
themselves. Where they have been moved, --compare-images ROOT names the folder
that has train/<class>/ in it; FOLDER then stands before it."""


def add(parser: argparse.ArgumentParser) -> Run:
    """look at latents or at the MAE: pictures, numbers, warnings"""
    parser.description = """\
Look at what a stage has made before the next one spends a night on it. Each of
the two writes pictures and a meta.json with all numbers into a folder, prints
the numbers, and a line that starts with `warning:` for everything that does not
look as it should (the exit code is 0 all the same). What is missing, damaged or
does not belong together is one line and exit code 2, and nothing is written."""
    parser.epilog = "drift inspect latents --help and drift inspect mae --help tell more."
    kinds = parser.add_subparsers(title="what", metavar="WHAT", required=True)
    for name, fill, told in (
        ("latents", _add_latents, "decoded latents, and statistics of all of them"),
        ("mae", _add_mae, "what the MAE reconstructs, its error, its feature sets"),
    ):
        kind = kinds.add_parser(name, help=told, formatter_class=argparse.RawDescriptionHelpFormatter)
        kind.set_defaults(inspect=fill(kind))
    return lambda args: args.inspect(args)


def _add_latents(parser: argparse.ArgumentParser) -> Run:
    parser.description = """\
Decode random latents by the VAE of the settings, and measure all latents: mean,
standard deviation and range of each channel, rows of each class.

OUT/latents.png     decoded latents with class and row; below each its image
OUT/histogram.png   the values of each channel beside the unit normal
OUT/meta.json       what was read, with digests, all numbers, the rows shown

All files are read to the end, in blocks, and their SHA-256 is compared with
that in their meta file: minutes for ImageNet, little memory."""
    parser.epilog = """\
warnings:
  NaN and infinite numbers; rows with one number everywhere
  a standard deviation outside 0.7 to 1.4: was the scaling factor left out, or
  applied twice?
  a channel with a mean beyond 2 or with nearly one value only
  classes without latents, labels beyond data.classes
  decoded latents unlike their images (centre view, with --compare-images)

examples:
  drift inspect latents
  drift inspect latents --view augmented --compare-images
  drift inspect latents /data/latents --compare-images /data/imagenet --count 64

"""
    parser.epilog += _COMPARE
    parser.add_argument(
        "folder", nargs="?", type=Path, metavar="FOLDER", help="the latents (artifacts/latents/<view>)"
    )
    parser.add_argument("--view", choices=("center", "augmented"), help="center, or what FOLDER holds")
    parser.add_argument("--count", type=_positive, default=32, metavar="N", help="latents to decode (32)")
    _add_common(parser, "outputs/latents-<view>, or the name of FOLDER for the view")

    def run(args: argparse.Namespace) -> None:
        from drift.evaluation.inspect_latents import inspect_latents
        from drift.settings import load_settings

        settings = load_settings(args.params)
        view = args.view or "center"
        _tell(
            inspect_latents(
                args.folder or Path("artifacts/latents") / view,
                settings,
                args.out or Path("outputs") / f"latents-{_view_of(args.folder, args.view)}",
                _look(args),
                view=args.view if args.folder else view,
                progress=sys.stderr.isatty(),
            )
        )

    return run


def _add_mae(parser: argparse.ArgumentParser) -> Run:
    parser.description = """\
Mask latents, let the MAE fill in what is masked, and decode all of it by the VAE
of the settings. Images that were held out of its training are shown, if any.

OUT/mae.png     in each column, from above: class, row and masked error; the image
                (with --compare-images); the decoded latent; the same with the
                masked places grey; with those places filled in by the network;
                the network's output alone
OUT/meta.json   what was read, with digests, and all numbers

The masked error is the squared error per masked place, summed over channels,
as the stage mae logs it, of images that were held out of its training and of
others. On the latents that it was trained on, the former repeats the end of its
log. Beside it stands
the error of an MAE that knows nothing but the mean of each channel."""
    parser.epilog = """\
--check-feature-sets prints a table of all feature sets of the drifting loss on 64
real latents:
  L, C        locations and channels
  scale S     mean distance between two latents' features, over the root of C:
              what the field measures distances in
  rms         of all its numbers
  constant    share of channels that are the same for all samples and locations
  not finite  share of NaN and infinite numbers
A broken encoder shows as sets that are constant, not finite, the same for every
sample, or so small that the field's guard takes the place of their scale. Some
sets are constant whatever the weights: the mean and std over a map whose norm
has one channel per group (mae.norm_groups). They are marked, and no warning.

examples:
  drift inspect mae
  drift inspect mae --latents artifacts/latents/augmented --compare-images
  drift inspect mae runs/wide --params presets/imagenet256_l2.yaml --check-feature-sets

"""
    parser.epilog += _COMPARE
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        default=Path("artifacts/mae"),
        metavar="FOLDER",
        help="the MAE (artifacts/mae)",
    )
    parser.add_argument(
        "--latents",
        type=Path,
        default=Path("artifacts/latents/center"),
        metavar="FOLDER",
        help="what it is tried on (artifacts/latents/center)",
    )
    parser.add_argument("--count", type=_positive, default=8, metavar="N", help="latents to show (8)")
    parser.add_argument(
        "--rows",
        type=_positive,
        default=1024,
        metavar="N",
        help="latents at most, of held-out and of other images, for the masked error (1024)",
    )
    parser.add_argument("--check-feature-sets", action="store_true", help="look at every feature set")
    _add_common(parser, "outputs/mae")

    def run(args: argparse.Namespace) -> None:
        from drift.evaluation.inspect_features import inspect_mae
        from drift.settings import load_settings

        _tell(
            inspect_mae(
                args.folder,
                args.latents,
                load_settings(args.params),
                args.out or Path("outputs/mae"),
                _look(args),
                rows=args.rows,
                feature_sets=args.check_feature_sets,
            )
        )

    return run


def _add_common(parser: argparse.ArgumentParser, out: str) -> None:
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="the settings (params.yaml)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="which latents, which masks (0)")
    parser.add_argument(
        "--compare-images",
        nargs="?",
        const="",
        metavar="ROOT",
        help="show the image of each latent; refused if the images are not those that were encoded",
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=f"where to write ({out})")


def _look(args: argparse.Namespace):
    import torch

    from drift.evaluation.inspection import Look

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Look(args.count, args.seed, args.compare_images is not None, args.compare_images or None, device)


def _view_of(folder: Path | None, view: str | None) -> str:
    """The view in the name of the folder that is written to."""
    return view or ("center" if folder is None else folder.resolve().name)


def _tell(found) -> None:
    print("\n".join(found.lines))
    for warning in found.warnings:
        print(f"warning: {warning}")
    for path in found.files:
        print("written:", path)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: a whole number above 0 is needed")
    return int(text)
