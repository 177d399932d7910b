"""Labelled images behind one interface, and the two square views of them that are encoded."""

import hashlib
import io
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from drift.errors import UserError

VIEW_OPTIONS = {"center": ("mirror",), "augmented": ("crops", "crop_scale", "crop_ratio", "flip")}
"""The views of an image, and the settings of `encode` that only one of them has."""
VIEWS = tuple(VIEW_OPTIONS)
IMAGE_SUFFIXES = (b".jpeg", b".jpg", b".png", b".webp", b".bmp")


class ImageSource(Protocol):
    """N labelled images of one split, in a fixed order."""

    split: str
    labels: np.ndarray | None  # [N] int64; None where they are not known
    class_names: list[str]
    digest: str
    """SHA-256 of what tells these images from others: the raw data, or the names and sizes of the files."""

    def __len__(self) -> int: ...

    def load(self, index: int) -> Image.Image:
        """The image in RGB.

        Raises `UserError` if it cannot be read (its disk is gone), and whatever its decoder raises if what
        was read is damaged.
        """
        ...

    def name(self, index: int) -> str:
        """What messages call the image."""
        ...

    def name_in_split(self, index: int) -> str:
        """What files call the image: the same wherever the data lie."""
        ...


def open_images(dataset: str, root: str | None, split: str, classes: int) -> ImageSource:
    """The images of one split of a dataset.

    `dataset` is `digits` (scikit-learn's, splits `train` and `held_out`) or `folder` (files as
    `root/<split>/<class>/*`). Raises `UserError` if the images are not there or the number of their
    classes is not `classes`.
    """
    if dataset not in _DATASETS:
        raise UserError(f"data.dataset = {dataset}: allowed: {', '.join(_DATASETS)}")
    source = _DATASETS[dataset](root, split)
    if len(source.class_names) != classes:
        where = f"{root or dataset}/{split}"
        raise UserError(
            f"data.classes = {classes}, but {where} has {len(source.class_names)} classes: "
            "correct the setting or the data"
        )
    return source


class DigitImages:
    """scikit-learn's 1797 handwritten digits: 8x8 pixels of 17 grey levels, spread over 0..255.

    With the rows ordered by label (and within a label as they come), every fifth is held out: 360 rows,
    35 to 37 of each digit. The split depends on nothing else, so networks trained on `train` have never
    seen `held_out`, whatever the seed.
    """

    _LEVELS = 16  # the largest value in the data

    def __init__(self, root: str | None, split: str):
        from sklearn.datasets import load_digits  # a second's import that only this dataset needs

        digits = load_digits()
        held_out = np.zeros(len(digits.target), bool)
        held_out[np.argsort(digits.target, kind="stable")[::5]] = True
        splits = {"train": ~held_out, "held_out": held_out}
        if split not in splits:
            raise UserError(f"digits has no split {split}: it has {' and '.join(splits)}")
        self.split = split
        self._rows = np.flatnonzero(splits[split])
        self._pixels = np.rint(digits.images[self._rows] * (255 / self._LEVELS)).astype(np.uint8)  # [N, 8, 8]
        self.labels = digits.target[self._rows].astype(np.int64)
        self.class_names = [str(name) for name in digits.target_names]
        self.digest = hashlib.sha256(self._pixels.tobytes() + self.labels.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int) -> Image.Image:
        return Image.fromarray(self._pixels[index]).convert("RGB")

    def name(self, index: int) -> str:
        """`digits/` and the row in scikit-learn's order, whatever the split."""
        return f"digits/{self.name_in_split(index)}"

    def name_in_split(self, index: int) -> str:
        return str(self._rows[index])


class FolderImages:
    """Image files as `root/<split>/<class>/<file>`.

    Classes are the folders in the order of their names, images the files within a class in the order of
    theirs; suffixes other than `IMAGE_SUFFIXES` (in any case) and names that start with a dot are passed
    over. Pixels are taken as they are stored: EXIF orientation is not applied.
    """

    def __init__(self, root: str | None, split: str):
        if root is None:
            raise UserError("data.root = null: name the folder of the images, or choose another data.dataset")
        self.split = split
        self._folder = Path(root) / split
        classes = _class_folders(root, self._folder)
        if not classes:
            raise UserError(f"{self._folder}: has no class folders; images belong in {self._folder}/<class>/")
        # In threads, for network filesystems, where one answer after the other takes minutes
        with ThreadPoolExecutor(16) as pool:
            listings = list(pool.map(_image_files, (self._folder / name for name in classes)))

        self.class_names = classes
        counts = [len(files) for files, _ in listings]
        self.labels = np.repeat(np.arange(len(classes), dtype=np.int64), counts)
        # One array of bytes, not a list: workers that are forked share it without copying
        self._files = np.array([name for files, _ in listings for name in files])
        digest = hashlib.sha256()
        for name, (files, sizes) in zip(classes, listings, strict=True):
            lines = (b"%b/%b %d" % (os.fsencode(name), *item) for item in zip(files, sizes, strict=True))
            digest.update(b"\0".join(lines) + b"\0")
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int) -> Image.Image:
        return load_rgb(self._path(index))

    def name(self, index: int) -> str:
        return str(self._path(index))

    def name_in_split(self, index: int) -> str:
        return f"{self.class_names[self.labels[index]]}/{os.fsdecode(self._files[index])}"

    def _path(self, index: int) -> Path:
        return self._folder / self.name_in_split(index)


class ImageFiles:
    """All image files of a folder and of the folders in it, in the order of their paths, without labels.

    Suffixes other than `IMAGE_SUFFIXES` and names that start with a dot are passed over. Raises `UserError`
    if there is no such folder or no image.
    """

    labels = None

    def __init__(self, folder: str | Path):
        self._folder, self.split = Path(folder), str(folder)
        if not self._folder.is_dir():
            raise UserError(f"{folder}: there is no such folder of images; correct the path")
        self.class_names: list[str] = []
        found = []
        for place, folders, names in os.walk(self._folder):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in names:
                if os.fsencode(name).lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."):
                    path = Path(place, name)
                    found.append((path.relative_to(self._folder).as_posix(), path.stat().st_size))
        if not found:
            raise UserError(f"{folder}: has no images; name a folder that does")
        found.sort()
        self._names = [name for name, _ in found]
        self.digest = hashlib.sha256(repr(found).encode("utf-8", "surrogateescape")).hexdigest()

    def __len__(self) -> int:
        return len(self._names)

    def load(self, index: int) -> Image.Image:
        return load_rgb(self._folder / self._names[index])

    def name(self, index: int) -> str:
        return str(self._folder / self._names[index])

    def name_in_split(self, index: int) -> str:
        return self._names[index]


def load_rgb(path: Path) -> Image.Image:
    """An image file in RGB, as it is stored: EXIF orientation is not applied.

    Raises what `ImageSource.load` does.
    """
    try:
        # All of it before it is decoded: errors of the disk and of a decoder can have the same type
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); run again once it can be") from None
    try:
        image = Image.open(io.BytesIO(content))
    except UnidentifiedImageError:  # whose message names the buffer's address
        raise UnidentifiedImageError("of no known image format") from None
    # PIL would clip 16-bit grey at 255; keep the high byte, as it does for RGB
    if image.mode == "I;16":
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


_DATASETS = {"digits": DigitImages, "folder": FolderImages}


def _class_folders(root: str, folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    except FileNotFoundError:
        if not Path(root).exists():
            raise UserError(f"data.root = {root}: there is no such folder; correct the setting") from None
        present = ", ".join(sorted(p.name for p in Path(root).iterdir() if p.is_dir())[:5]) or "no folders"
        raise UserError(f"{folder}: there is no such folder; data.root has {present}") from None
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error.strerror}); correct data.root") from None


def _image_files(folder: Path) -> tuple[list[bytes], list[int]]:
    """Names, in order, and sizes in bytes of the image files in a class folder; names as bytes."""
    try:
        with os.scandir(os.fsencode(folder)) as entries:
            found = sorted(
                (entry.name, entry.stat().st_size)
                for entry in entries
                if entry.name.lower().endswith(IMAGE_SUFFIXES) and not entry.name.startswith(b".")
            )
    except OSError as error:
        where = folder if error.filename is None else os.fsdecode(error.filename)
        raise UserError(f"{where}: cannot be read ({error.strerror}); repair or remove it") from None
    if not found:
        raise UserError(f"{folder}: a class without images; add some or remove the folder")
    return [name for name, _ in found], [size for _, size in found]


def center_view(image: Image.Image, size: int) -> np.ndarray:
    """The central square of an RGB image, as uint8 `[size, size, 3]` (release; from ADM).

    A box filter halves the image while its short side is at least twice the target, a bicubic one does
    the rest; small images grow by the bicubic one.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.array(image.crop((left, top, left + size, top + size)))


def augmented_view(
    image: Image.Image,
    size: int,
    scale: Sequence[float],
    ratio: Sequence[float],
    flip: bool,
    rng: np.random.Generator,
) -> np.ndarray:
    """A random crop of an RGB image, resized, and mirrored half of the time where `flip` is set.

    `scale` bounds the crop's share of the area, `ratio` its aspect ratio (paper A.3, which takes both
    from the usual ImageNet augmentation). Returns uint8 `[size, size, 3]`.
    """
    left, top, width, height = random_crop(image.width, image.height, scale, ratio, rng)
    image = image.crop((left, top, left + width, top + height))
    view = np.array(image.resize((size, size), Image.Resampling.BICUBIC))
    return view[:, ::-1] if flip and rng.random() < 0.5 else view


def random_crop(
    width: int, height: int, scale: Sequence[float], ratio: Sequence[float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """The box (left, top, width, height) of a random crop, by the rule of torchvision's RandomResizedCrop.

    The share of the area is uniform in `scale`, the aspect ratio log-uniform in `ratio`; of ten attempts
    the first that fits is taken, and otherwise the largest central box whose aspect ratio is allowed.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
            return int(left), int(top), w, h
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    return (width - w) // 2, (height - h) // 2, w, h
