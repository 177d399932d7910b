"""Latents of six classes in an `.npz`; and a stand-in for them.

    python -m experiments.ffhq.latents --out artifacts/ffhq/stand_in

Writes OUT/train.npz and OUT/test.npz: each class is a curved sheet of 16 dimensions in 512, about as far
spread as the paper's transport costs suggest.
"""

from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from drift.runtime.errors import UserError
from drift.runtime.files import atomic_write, check_output
from drift.runtime.processes import run_stage
from drift.runtime.seeds import numpy_generator
from experiments.common import load_section, script_parser
from experiments.ffhq.settings import Settings

CLASSES = ("male_children", "male_adult", "male_old", "female_children", "female_adult", "female_old")
_SHEET = 16  # dimensions


def read_latents(path: str | Path, key: str) -> list[Tensor]:
    """Float32 `[n, C]` of each class. Raises `UserError` that names `key`, the setting of the path."""
    try:
        with np.load(path) as arrays:
            found = [torch.from_numpy(arrays[name].astype(np.float32)) for name in CLASSES]
    except FileNotFoundError:
        raise UserError(
            f"{key} = {path}: there is no such file; name an .npz, or run the stage stand_in"
        ) from None
    except KeyError as error:
        raise UserError(f"{key} = {path}: {error.args[0]}; it needs {', '.join(CLASSES)}") from None
    except (OSError, ValueError, BadZipFile) as error:
        raise UserError(f"{key} = {path}: cannot be read as .npz ({error})") from None
    for name, latents in zip(CLASSES, found, strict=True):
        if latents.ndim != 2 or latents.shape[1] != found[0].shape[1] or not len(latents):
            raise UserError(f"{key} = {path}: {name} is {tuple(latents.shape)}; [n, C] is needed, n > 0")
    return found


def stand_in(dimensions: int, count: int, seed: int, split: str) -> dict[str, np.ndarray]:
    """float32 `[count, dimensions]` of each class; the sheets depend on the seed, the points on the split."""
    found = {}
    for name in CLASSES:
        sheet = numpy_generator(seed, "ffhq/sheet", name)
        centre = sheet.normal(0, 0.5, dimensions)
        straight, curved = sheet.normal(0, 1 / np.sqrt(_SHEET), (2, _SHEET, dimensions))
        points = numpy_generator(seed, "ffhq/points", name, split)
        z = points.normal(size=(count, _SHEET))
        x = centre + 0.4 * z @ straight + 0.2 * np.sin(2 * z) @ curved
        found[name] = (x + 0.1 * points.normal(size=x.shape)).astype(np.float32)
    return found


def main() -> None:
    args = script_parser(__doc__, "ffhq").parse_args()
    settings = load_section(args.params, Settings)
    check_output(args.out)
    args.out.mkdir(parents=True, exist_ok=True)
    options = settings.stand_in
    for split, count in (("train", options.train), ("test", options.test)):
        with atomic_write(args.out / f"{split}.npz") as file:
            np.savez(file, **stand_in(options.dimensions, count, settings.seed, split))


if __name__ == "__main__":
    run_stage(main)
