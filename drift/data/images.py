"""Image files: which ones a folder has, as torchvision's ImageFolder finds them, and reading one in RGB."""

import io
import os
import warnings
from collections import Counter
from pathlib import Path
from typing import NoReturn

import numpy as np
from PIL import Image, UnidentifiedImageError

from drift.runtime.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Endings of image files' names, in any case (torchvision's IMG_EXTENSIONS)."""
MOST_PIXELS = 89_478_485  # of one image: where Pillow warns of a decompression bomb; 0.36 GB once decoded
_MOST_BYTES = 8 * MOST_PIXELS  # of one file: 16-bit RGBA without compression
_KINDS = 5  # of other files that a message lists

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `load_rgb` names the file


class BadImage(UserError):
    """An image that was read but does not decode, or is too large to decode."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"{path}: does not decode ({reason}); repair or remove it")
        self.reason = reason


def load_rgb(path: Path) -> Image.Image:
    """An image file in RGB, as it is stored: EXIF orientation is not applied (but Pillow applies a TIFF's).

    Its size is checked before it is decoded. Raises `BadImage` if it does not decode, and another `UserError`
    if it cannot be read (its disk is gone) or there is no memory for it.
    """
    try:
        # All of it before it is decoded: errors of the disk and of a decoder can have the same type
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > _MOST_BYTES:
                raise BadImage(path, f"{size} bytes, more than {_MOST_BYTES}")
            content = file.read()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); run again once it can be") from None
    if not content:
        raise BadImage(path, "an empty file")
    try:
        image = Image.open(io.BytesIO(content))
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"{image.width}x{image.height} pixels, more than {MOST_PIXELS} in all")
        return to_rgb(image)
    except UnidentifiedImageError:  # whose message names the buffer's address
        raise BadImage(path, "of no known image format") from None
    except MemoryError:
        raise UserError(
            f"{path}: no memory to decode it; lower hardware.workers or make it smaller, and run again"
        ) from None
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error ...
        raise BadImage(path, " ".join((str(error) or type(error).__name__).split())) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode an image to RGB; 16-bit grey keeps its high byte. Raises ValueError for grey of 32 bits."""
    # Pillow would clip 16-bit grey at 255; of 16-bit RGB it keeps the high byte too
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError("grey of 32 bits, of which the range is unknown; store 8 or 16 bits")
    if image.mode != "RGB":
        return image.convert("RGB")
    image.load()  # convert() would decode too, but also copy
    return image


def list_images(folder: Path) -> tuple[dict[str, int], Counter[str]]:
    """The image files in a folder and below it, links followed, in the order of ImageFolder.

    Returns their sizes in bytes by their names relative to `folder`, and the kinds of the files passed over.
    Raises `UserError` if something cannot be read, or a link leads back to a folder that it is in.
    """
    sizes: dict[str, int] = {}
    others: Counter[str] = Counter()
    places = []
    try:
        for place, folders, files in os.walk(folder, followlinks=True, onerror=_reraise):
            others.update(kind(name) for name in folders if name.startswith("."))
            folders[:] = [name for name in folders if not name.startswith(".")]
            for path in (os.path.join(place, name) for name in folders):
                if (os.path.realpath(place) + os.sep).startswith(os.path.realpath(path) + os.sep):
                    raise UserError(f"{path}: a link to a folder that it is in itself; remove it")
            places.append((place, files))
        for place, files in sorted(places):
            for name in sorted(files):
                if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."):
                    path = os.path.join(place, name)
                    sizes[os.path.relpath(path, folder)] = os.stat(path).st_size
                else:
                    others[kind(name)] += 1
    except OSError as error:
        where = folder if error.filename is None else os.fsdecode(error.filename)
        raise UserError(f"{where}: cannot be read ({error.strerror}); repair or remove it") from None
    return sizes, others


def _reraise(error: OSError) -> NoReturn:
    raise error


def kind(name: str) -> str:
    """What `passed_over` counts a file as."""
    return "hidden" if name.startswith(".") else os.path.splitext(name)[1].lower() or "without a suffix"


def passed_over(others: Counter[str]) -> str:
    """How many files of which kinds were passed over, and what an image is."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(_KINDS))
    more = ", ..." if len(others) > _KINDS else ""
    return (
        f"{others.total()} other files passed over{f': {kinds}{more}' if others else ''}; "
        f"images end in {', '.join(IMAGE_SUFFIXES)} and are not hidden"
    )
