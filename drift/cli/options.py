"""Arguments and lines that several commands have."""

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from drift.runtime.errors import UserError

if TYPE_CHECKING:
    from drift.evaluation.inspection import Look
    from drift.interop.pipeline import DriftPipeline

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


def add_versions(parser: argparse.ArgumentParser) -> None:
    """What chooses among the versions of a generator SOURCE."""
    parser.add_argument("--rev", metavar="REVISION", help="take SOURCE as of this Git revision, by DVC")
    parser.add_argument(
        "--weights",
        default="model",
        metavar="NAME",
        help="which weights: model, or an EMA copy such as ema_0999 (model)",
    )
    parser.add_argument(
        "--vae",
        metavar="VAE",
        help="folder or hub id of the VAE, instead of the one that SOURCE names; pixels: none is needed",
    )


def add_drawing(parser: argparse.ArgumentParser) -> None:
    """SOURCE, its versions, and where it is to draw."""
    parser.add_argument(
        "source", nargs="?", metavar="SOURCE", default=GENERATOR, help="the generator (%(default)s)"
    )
    add_versions(parser)
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--device", help="cuda, cpu, ... (cuda where there is one)")


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


def settings_line(folder: Path, *, pixels: bool = False) -> str:
    """The command that trains a generator with an imported encoder, of latents or of `pixels`."""
    # Presets of pixels have one view anyway
    view = "" if pixels else " -S ++mae.view=center -S 'views=[center]'"
    return f"as the encoder of a run: dvc exp run -S ++mae.source={folder}{view}"


def check_committable(params: Path, no_commit: bool) -> None:
    """Refuse settings that DVC would not record: it would take those of params.yaml for them."""
    if not no_commit and params.resolve() != Path("params.yaml").resolve():
        raise UserError(f"--params {params}: DVC goes by params.yaml; copy it there, or add --no-commit")


def add_inspection(parser: argparse.ArgumentParser, shown: int, out: str) -> None:
    """What all inspections take; `shown` latents unless --count says otherwise."""
    parser.add_argument("--count", type=count, default=shown, metavar="N", help=f"latents to show ({shown})")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="which latents, which masks (0)")
    parser.add_argument(
        "--compare-images",
        nargs="?",
        const="",
        metavar="ROOT",
        help="show the image of each latent, from data.root or from ROOT, which has train/<class>/ in it; "
        "refused if these are not the images that were encoded",
    )
    add_params(parser)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=f"where to write ({out})")


def look(args: argparse.Namespace) -> "Look":
    """How an inspection is to look."""
    from drift.evaluation.inspection import Look

    return Look(args.count, args.seed, args.compare_images, gpu_or_cpu())


def gpu_or_cpu() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def usable_device(name: str | None) -> str:
    """The device called `name`, or the best there is; raises `UserError` if it cannot be used."""
    import torch

    device = name or gpu_or_cpu()
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


def class_number(pipe: "DriftPipeline", name: str | int) -> int:
    """A name first, as one may look like a number; raises `UserError` for what is neither."""
    if isinstance(name, int) or (name.isdecimal() and name not in pipe.labels):
        if int(name) >= (classes := pipe.generator.config.num_classes):
            raise UserError(f"class {name}: the classes are 0 to {classes - 1}")
        return int(name)
    return pipe.get_label_ids(name)[0]
