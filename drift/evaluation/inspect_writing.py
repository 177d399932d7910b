"""What inspections write: pictures with captions, and a `meta.json` with everything."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFont
from torch import Tensor

from drift.data.latents import LatentStore
from drift.evaluation.inspect_reading import SourceImages, view_of
from drift.evaluation.pictures import image_grid
from drift.evaluation.sample import ImageDecoder
from drift.runtime.errors import UserError
from drift.runtime.files import atomic_write, check_writable, write_json

META_FILE = "meta.json"
COLUMNS = 8
"""Latents that stand beside each other in a picture; more of them follow below."""
PICTURE_SIDE = 96  # pixels; images are enlarged to at least this, so that a caption fits above each
_GAP = 12  # pixels between what stands in one band of a picture and the captions of the next
NAMED = 5  # things that a warning names
_RED = (200, 0, 0)  # what cannot be shown


@dataclass(frozen=True)
class Inspection:
    """What was found."""

    lines: list[str]
    """The numbers, for a person."""
    warnings: list[str]
    """What a person must look into, one line each; empty for latents and networks as they should be."""
    files: list[Path]
    """The pictures, and `meta.json` with all of it for a program."""


def bands(
    kinds: Mapping[str, np.ndarray], captions: Sequence[str], columns: int = COLUMNS, side: int = PICTURE_SIDE
) -> Image.Image:
    """Pictures of n things in several kinds: one column per thing, one row per kind, its name to the left.

    `kinds` are uint8 `[n, S, S, 3]` by name, which is left out where there is only one; `captions` stand
    above each thing, shortened to its width. Images smaller than `side` are enlarged by a whole factor; after
    `columns` things the next ones follow below.
    """
    n, size = len(captions), next(iter(kinds.values())).shape[1]
    columns, scale = min(columns, n), -(-side // size)
    names = list(kinds) if len(kinds) > 1 else None
    strips = []
    for start in range(0, n, columns):
        heads = [_fitting(caption, scale * size) for caption in captions[start : start + columns]]
        missing = columns - len(heads)
        images = [
            np.concatenate([kind[start : start + columns], np.full((missing, size, size, 3), 255, np.uint8)])
            for kind in kinds.values()
        ]
        strips.append(
            image_grid(
                np.concatenate(images),
                columns,
                scale=scale,
                row_labels=names,
                column_labels=heads + [""] * missing,
            )
        )
        strips.append(Image.new("RGB", (strips[0].width, _GAP), (255, 255, 255)))
    return Image.fromarray(np.concatenate([np.asarray(strip) for strip in strips[:-1]]))


def _fitting(text: str, width: int) -> str:
    """`text`, shortened where it is wider than so many pixels."""
    font = ImageFont.load_default()
    shortened = text
    while len(shortened) > 1 and font.getlength(shortened) > width:
        text = text[:-1]
        shortened = f"{text}.."
    return shortened


def decoded(decode: ImageDecoder, latents: Tensor) -> np.ndarray:
    """Latents `[n, C, H, W]` -> uint8 `[n, S, S, 3]`; plain red where one is not finite."""
    finite = latents.isfinite().flatten(1).all(1)
    images = decode(latents.where(finite[:, None, None, None], 0)).numpy()
    images[~finite.numpy()] = _RED
    return images


def prepare_out(out: str | Path, *inputs: str | Path) -> Path:
    """The folder to write into; raises `UserError` if it is one of the `inputs`, or cannot be written."""
    out = Path(out)
    for folder in inputs:
        if out.resolve() == Path(folder).resolve():
            raise UserError(f"--out {out}: is what is inspected; name another folder")
    check_writable(out)
    return out


def write_inspection(out: Path, pictures: Mapping[str, bytes], meta: Mapping[str, Any]) -> list[Path]:
    """Write the pictures, then `meta.json`; the one of an earlier inspection vouches for none of them."""
    (out / META_FILE).unlink(missing_ok=True)
    for name, content in pictures.items():
        with atomic_write(out / name) as file:
            file.write(content)
    write_json(out / META_FILE, {**meta, "files": list(pictures)})
    return [out / name for name in (*pictures, META_FILE)]


def png_bytes(image: Image.Image) -> bytes:
    """The image as a PNG file."""
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def describe_latents(store: LatentStore) -> dict[str, Any]:
    """Latents, for `meta.json`."""
    return {
        "folder": str(store.folder),
        "shape": list(store.shape),
        "classes": store.num_classes,
        "view": view_of(store),
        "digest": store.digest,
    }


def describe_row(store: LatentStore, sources: SourceImages | None, row: int) -> dict[str, Any]:
    """One latent, for `meta.json`."""
    label = int(store.labels[row])
    shown = {"row": row, "label": label, "class": store.class_names[label]}
    return shown if sources is None else {**shown, "image": sources.name(row)}


def caption(store: LatentStore, row: int) -> str:
    """What stands above a latent: its class and its row."""
    return f"{store.class_names[store.labels[row]]}  #{row}"


def listed(things: Sequence[Any], one: str, many: str | None = None) -> str:
    """`3 rows (4, 7, 9)`, of which the first few are named."""
    named = ", ".join(map(str, things[:NAMED])) + (", ..." if len(things) > NAMED else "")
    return f"{len(things)} {one if len(things) == 1 else many or f'{one}s'} ({named})"


def finite_or_none(value: float | int) -> float | int | None:
    """As JSON can hold it."""
    return value if math.isfinite(value) else None
