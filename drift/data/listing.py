"""Which files of a folder are images: those that torchvision's ImageFolder takes, in its order."""

import itertools
import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from drift.runtime.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""What names of image files end in, in any case (torchvision's IMG_EXTENSIONS)."""
_KINDS = 5  # of other files that a message tells apart


def class_folders(root: str, folder: Path) -> tuple[list[str], Counter[str]]:
    """The names of the classes of a split, and what else lies beside them."""
    classes, others = [], Counter()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir() and not entry.name.startswith("."):
                    classes.append(entry.name)
                else:
                    others[_kind(entry.name)] += 1
        return sorted(classes), others
    except FileNotFoundError:
        if not Path(root).exists():
            raise UserError(f"data.root = {root}: there is no such folder; correct the setting") from None
        present = ", ".join(sorted(p.name for p in Path(root).iterdir() if p.is_dir())[:5]) or "no folders"
        raise UserError(f"{folder}: there is no such folder; data.root has {present}") from None
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error.strerror}); correct data.root") from None


class Listing(NamedTuple):
    names: list[str]  # of the image files, relative to the folder
    sizes: list[int]  # in bytes
    others: Counter[str]  # what was passed over, by kind


def list_images(folder: Path) -> Listing:
    """The image files in a folder and in those below it, links followed, in the order of ImageFolder."""
    listing = Listing([], [], Counter())
    places = []
    try:
        for place, folders, files in os.walk(folder, followlinks=True, onerror=_reraise):
            listing.others.update(_kind(name) for name in folders if name.startswith("."))
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in folders:
                _refuse_circle(place, name)
            places.append((place, files))
        for place, files in sorted(places):
            for name in sorted(files):
                if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."):
                    path = os.path.join(place, name)
                    listing.names.append(os.path.relpath(path, folder) if place != str(folder) else name)
                    listing.sizes.append(os.stat(path).st_size)
                else:
                    listing.others[_kind(name)] += 1
    except OSError as error:
        where = folder if error.filename is None else os.fsdecode(error.filename)
        raise UserError(f"{where}: cannot be read ({error.strerror}); repair or remove it") from None
    return listing


def _reraise(error: OSError) -> NoReturn:
    raise error


def _refuse_circle(place: str, name: str) -> None:
    path = os.path.join(place, name)
    if os.path.islink(path):
        inside = os.path.realpath(place) + os.sep
        if inside.startswith(os.path.realpath(path) + os.sep):
            raise UserError(f"{path}: a link to a folder that it is in itself; remove it")


def _kind(name: str) -> str:
    return "hidden" if name.startswith(".") else os.path.splitext(name)[1].lower() or "without a suffix"


def passed_over(others: Counter[str]) -> str:
    """How many files of which kinds were passed over, and what an image is."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(_KINDS))
    more = ", ..." if len(others) > _KINDS else ""
    return (
        f"{others.total()} other files passed over{f': {kinds}{more}' if others else ''}; "
        f"images end in {', '.join(IMAGE_SUFFIXES)} and are not hidden"
    )


def class_difference(of: str, names: Sequence[str], other: str, others: Sequence[str]) -> str:
    """Where two lists of class names first differ, whose label numbers then mean other things; or nothing.

    `of` and `other` are what a message calls the lists.
    """
    for label, (name, expected) in enumerate(itertools.zip_longest(names, others)):
        if name != expected:
            show = repr
            if None not in (name, expected) and _composed(name) == _composed(expected):
                show = ascii  # the same letters in another form of Unicode (NFC, NFD)
            shown = ["no such class" if each is None else show(each) for each in (name, expected)]
            return (
                f"label {label} is {shown[0]} in {of} ({len(names)} classes), but {shown[1]} in {other} "
                f"({len(others)} classes)"
            )
    return ""


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)
