"""Data sets: labelled images behind one interface, in one registry.

To add a data set, write a class with `@register` here.
"""

import hashlib
import itertools
import os
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from drift.data.images import kind, list_images, load_rgb, passed_over
from drift.runtime.errors import UserError

_NAMED = 3  # how many images or classes a message names


class Dataset(ABC):
    """N images of one split, in a fixed order."""

    dataset = "files"
    """Its name in the registry."""
    split: str
    place: str
    """What messages put in front of an image's name."""
    labels: np.ndarray | None  # [N] int64; None where they are not known
    class_names: list[str]
    digest: str
    """SHA-256 of what tells these images from others: their pixels, or the names and sizes of the files."""
    passed_over = ""
    """A line about the files that are no images; empty if there are none."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def load(self, index: int) -> Image.Image:
        """The image in RGB; raises what `drift.data.images.load_rgb` does."""

    @abstractmethod
    def name_in_split(self, index: int) -> str:
        """The image's name, the same wherever the data lie."""

    def name(self, index: int) -> str:
        """What messages call the image."""
        return f"{self.place}/{self.name_in_split(index)}"


DATASETS: dict[str, Callable[[str | None, str], Dataset]] = {}
"""`data.dataset` -> the images of a root (`data.root`) and a split. Raise `UserError` if there are none."""


def register(name: str) -> Callable[[type[Dataset]], type[Dataset]]:
    """Make a data set known under a name."""

    def add(kind: type[Dataset]) -> type[Dataset]:
        kind.dataset = name
        DATASETS[name] = kind
        return kind

    return add


def open_images(dataset: str, root: str | None, split: str, classes: int) -> Dataset:
    """The images of one split of a data set; raises `UserError` if they do not have as many `classes`."""
    if dataset not in DATASETS:
        raise UserError(f"data.dataset = {dataset}: allowed: {', '.join(DATASETS)}")
    source = DATASETS[dataset](root, split)
    if len(source.class_names) != classes:
        raise UserError(
            f"data.classes = {classes}, but {root or dataset}/{split} has {len(source.class_names)} classes: "
            "correct the setting or the data"
        )
    return source


@register("digits")
class DigitImages(Dataset):
    """scikit-learn's 1797 handwritten digits: 8x8 pixels of 17 grey levels, spread over 0..255.

    With the rows ordered by label (and within a label as they come), every fifth is held out: 360 rows,
    35 to 37 of each digit. The split is the same for every seed, so networks trained on `train` have never
    seen `held_out`.
    """

    place = "digits"

    def __init__(self, root: str | None, split: str):
        from sklearn.datasets import load_digits  # takes a second

        digits: Any = load_digits()
        held_out = np.zeros(len(digits.target), bool)
        held_out[np.argsort(digits.target, kind="stable")[::5]] = True
        splits = {"train": ~held_out, "held_out": held_out}
        if split not in splits:
            raise UserError(f"digits has no split {split}: it has {' and '.join(splits)}")
        self.split = split
        self._rows = np.flatnonzero(splits[split])
        self._pixels = np.rint(digits.images[self._rows] * (255 / 16)).astype(np.uint8)  # [N, 8, 8]
        labels = digits.target[self._rows].astype(np.int64)
        self.labels = labels
        self.class_names = [str(name) for name in digits.target_names]
        self.digest = hashlib.sha256(self._pixels.tobytes() + labels.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    def load(self, index: int) -> Image.Image:
        return Image.fromarray(self._pixels[index]).convert("RGB")

    def name_in_split(self, index: int) -> str:
        """The row in scikit-learn's order, whatever the split."""
        return str(self._rows[index])


class ImageFiles(Dataset):
    """All image files of a folder and of the folders in it, without labels."""

    def __init__(self, folder: str | Path):
        if not Path(folder).is_dir():
            raise UserError(f"{folder}: there is no such folder of images; correct the path")
        sizes, others = list_images(Path(folder))
        if not sizes:
            raise UserError(f"{folder}: has no images; name a folder that does ({passed_over(others)})")
        self.labels, self.class_names = None, []
        self._take(str(folder), str(folder), sizes, others)

    def _take(self, split: str, place: str, sizes: dict[str, int], others: Counter[str]) -> None:
        self.split, self.place = split, place
        self.passed_over = f"{place}: {passed_over(others)}" if others else ""
        # One array of bytes, not a list: forked workers share it without copying
        self._files = np.array([os.fsencode(name) for name in sizes])
        lines = (os.fsencode(f"{name} {size}") + b"\0" for name, size in sizes.items())
        self.digest = hashlib.sha256(b"".join(lines)).hexdigest()

    def __len__(self) -> int:
        return len(self._files)

    def load(self, index: int) -> Image.Image:
        return load_rgb(Path(self.name(index)))

    def name_in_split(self, index: int) -> str:
        return os.fsdecode(self._files[index])


@register("folder")
class FolderImages(ImageFiles):
    """Image files as `root/<split>/<class>/<file>` or in folders below a class.

    These are the samples of torchvision's ImageFolder, in its order, except for names that start with a dot.
    Raises `UserError` if there are none, if a class has none, or if the classes are not those of the split
    `train` beside it.
    """

    def __init__(self, root: str | None, split: str):
        if root is None:
            raise UserError("data.root = null: name the folder of the images, or choose another data.dataset")
        folder = Path(root) / split
        self.class_names, others = _class_folders(folder)
        if not self.class_names:
            raise UserError(f"{folder}: has no class folders; images belong in {folder}/<class>/")
        if split != "train" and (Path(root) / "train").is_dir():
            trained = _class_folders(Path(root) / "train")[0]
            if trained and (difference := class_difference(split, self.class_names, "train", trained)):
                raise UserError(f"{root}: {difference}; give the folders of a class the same name in both")
        # In threads, for network filesystems, where one answer after the other takes minutes
        with ThreadPoolExecutor(16) as pool:
            listings = list(pool.map(list_images, (folder / name for name in self.class_names)))
        for name, (sizes, passed) in zip(self.class_names, listings, strict=True):
            if not sizes:
                raise UserError(
                    f"{folder / name}: a class without images; add some or remove the folder "
                    f"({passed_over(passed)})"
                )
            others += passed
        self.labels = np.repeat(np.arange(len(listings)), [len(sizes) for sizes, _ in listings])
        found = zip(self.class_names, listings, strict=True)
        sizes = {f"{name}/{file}": size for name, (files, _) in found for file, size in files.items()}
        self._take(split, str(folder), sizes, others)


def _class_folders(folder: Path) -> tuple[list[str], Counter[str]]:
    """The names of the classes of a split in their order, and what else lies beside them."""
    try:
        with os.scandir(folder) as entries:
            isdir = {entry.name: entry.is_dir() and not entry.name.startswith(".") for entry in entries}
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be listed ({error.strerror}); correct data.root or the split"
        ) from None
    return sorted(filter(isdir.get, isdir)), Counter(kind(name) for name in isdir if not isdir[name])


def class_difference(of: str, names: Sequence[str], other: str, others: Sequence[str]) -> str:
    """Where two lists of class names first differ, so that a label means different classes; or nothing.

    `of` and `other` are what a message calls the lists.
    """
    for label, pair in enumerate(itertools.zip_longest(names, others)):
        if pair[0] != pair[1]:
            letters = {name and unicodedata.normalize("NFC", name) for name in pair}
            show = ascii if len(letters) == 1 else repr  # ascii: letters alike in another form of Unicode
            name, expected = ("no such class" if each is None else show(each) for each in pair)
            return (
                f"label {label} is {name} in {of} ({len(names)} classes), but {expected} in {other} "
                f"({len(others)} classes)"
            )
    return ""


def refuse_or_leave_out(
    source: Dataset, bad: Sequence[int], on_bad_image: str, remark: str = "", *, show: bool = True
) -> None:
    """The one policy for images that do not decode, whose numbers are `bad`, once all have been tried.

    With `on_bad_image` = `error`, raises `UserError`. With `skip`, prints how many are left out, and a
    `remark`, where `show` is set; raises `UserError` if they are all images of a class.
    """
    if not len(bad):
        return
    count = f"{len(bad)} of {len(source)} images"
    if on_bad_image == "error":
        named = [f"{source.name(index)} ({_why_bad(source, index)})" for index in bad[:_NAMED]]
        raise UserError(
            f"{count} do not decode: {_first_few(named, len(bad))}; "
            "repair or remove them, or keep what is done and leave them out (encode.on_bad_image: skip), "
            "then run again"
        )
    if source.labels is not None and len(empty := np.setdiff1d(source.labels, np.delete(source.labels, bad))):
        named = _first_few([source.class_names[label] for label in empty], len(empty))
        raise UserError(
            f"{len(empty)} of {len(source.class_names)} classes have no image that decodes: {named}; "
            "repair some, or remove the folders of these classes"
        )
    if show:
        named = _first_few([source.name(index) for index in bad[:_NAMED]], len(bad))
        print(f"{source.split}: left out {count}, which do not decode: {named}{remark}", flush=True)


def _why_bad(source: Dataset, index: int) -> str:
    try:
        source.load(index)
    except UserError as error:
        return getattr(error, "reason", str(error))
    return "decodes at a second try"


def _first_few(named: Sequence[str], count: int) -> str:
    """`a, b, c and 5 more`: the first of `count` things."""
    shown = named[:_NAMED]
    return ", ".join(shown) + (f" and {count - len(shown)} more" if count > len(shown) else "")
