"""Arguments and lines that several commands have."""

import argparse
import math
from pathlib import Path

from drift.runtime.errors import UserError

GENERATOR = "artifacts/generator"


def positive(text: str) -> float:
    """The type of an argument: a number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: a number above 0 is needed")
    return number


def count(text: str) -> int:
    """The type of an argument: a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: a whole number above 0 is needed")
    return int(text)


def add_params(parser: argparse.ArgumentParser) -> None:
    """--params"""
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="the settings (params.yaml)")


def add_source(parser: argparse.ArgumentParser, name: str) -> None:
    """The argument `name` for a generator, and what chooses among its versions."""
    how = {} if name.startswith("-") else {"nargs": "?"}
    parser.add_argument(name, metavar="SOURCE", default=GENERATOR, help=f"the generator ({GENERATOR})", **how)
    parser.add_argument("--rev", metavar="REVISION", help="take SOURCE as of this Git revision, by DVC")
    parser.add_argument(
        "--weights", default="model", metavar="NAME", help="or an EMA copy, as ema_0999 (model)"
    )
    parser.add_argument("--vae", metavar="VAE", help="folder or hub id, where SOURCE names none or another")


def find_source(source: str, revision: str | None) -> str | Path:
    """What `DriftPipeline.from_pretrained` is to load: `source`, or its folder as of a Git `revision`.

    Raises `UserError` if the revision does not have it, or if the stage drift has made no generator yet: the
    hub is not asked for that.
    """
    if revision is not None:
        from drift.sharing.revisions import fetch_revision

        return fetch_revision(source, revision)
    if source == GENERATOR and not Path(source).is_dir():
        raise UserError(f"{source}: there is none; dvc repro trains it, dvc pull fetches it, or name another")
    return source


def settings_line(folder: Path) -> str:
    """The command that trains a generator with an imported encoder."""
    changes = f"-S ++mae.source={folder} -S ++mae.view=center -S 'views=[center]'"
    return f"as the encoder of a run: dvc exp run {changes}"


def check_committable(params: Path, no_commit: bool) -> None:
    """Refuse settings that DVC would not record: it would take those of params.yaml for them."""
    if not no_commit and params.resolve() != Path("params.yaml").resolve():
        raise UserError(f"--params {params}: DVC goes by params.yaml; copy it there, or add --no-commit")


def add_inspection(parser: argparse.ArgumentParser, out: str) -> None:
    """What both inspections take."""
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="which latents, which masks (0)")
    parser.add_argument(
        "--compare-images",
        nargs="?",
        const="",
        metavar="ROOT",
        help="show the image of each latent, from data.root or from ROOT, which has train/<class>/ in it; "
        "refused if these are not the images that were encoded",
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=f"where to write ({out})")


def look(args: argparse.Namespace):
    """How `inspect_latents` and `inspect_mae` are to look."""
    import torch

    from drift.evaluation.inspection import Look

    device = "cuda" if torch.cuda.is_available() else "cpu"
    compare = args.compare_images is not None
    return Look(args.count, args.seed, compare, args.compare_images or None, device)


def show_inspection(found) -> None:
    """Print the lines, warnings and files of an inspection."""
    print("\n".join(found.lines))
    for warning in found.warnings:
        print(f"warning: {warning}")
    for path in found.files:
        print("written:", path)
