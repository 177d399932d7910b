"""What a data set is, and the registry of them.

To add one, write a subclass of `Dataset` with `@register("name")` in a file of this folder, and import it in
`__init__.py`, or it is never registered. Its `__init__(root, split)` sets what `Dataset` lists. There must be
a split `train`, which encode reads; others can be named in `fid.reference` and `fid.labels`. `digits.py` is
an example.
"""

import itertools
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
from PIL import Image

from drift.runtime.errors import UserError

_NAMED = 3  # how many images or classes a message names


class Dataset(ABC):
    """N images of one split, in a fixed order."""

    dataset = "files"
    """Its name in the registry."""
    needs_root: ClassVar[bool] = False
    """Whether `data.root` says where the images are."""
    split: str
    place: str
    """What messages put in front of an image's name."""
    labels: np.ndarray | None  # [N] int64; None where they are not known
    class_names: list[str]
    digest: str
    """SHA-256 of what tells these images from others: their pixels, or the names and sizes of the files."""
    passed_over = ""
    """A line about the files that are no images; empty if there are none."""

    def __init__(self, root: str | None, split: str):
        """Raises `UserError` if there are no such images."""
        raise NotImplementedError

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


DATASETS: dict[str, type[Dataset]] = {}
"""`data.dataset` -> its class, which takes the root (`data.root`) and the name of a split.

It raises `UserError` if there is no such split, or if it has no images.
"""


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
    """What to do about images that do not decode, once all have been tried; `bad` are their indices.

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
