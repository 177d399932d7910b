"""Labelled images behind one interface, and the two square views of them that are encoded."""

import hashlib
import io
import math
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from drift.data.listing import class_difference, class_folders, list_images, passed_over
from drift.runtime.errors import UserError

VIEW_OPTIONS = {"center": ("mirror",), "augmented": ("crops", "crop_scale", "crop_ratio", "flip")}
"""The views of an image, and the settings of `encode` that only one of them has."""
VIEWS = tuple(VIEW_OPTIONS)
MOST_PIXELS = 89_478_485  # of one image: where Pillow warns of a decompression bomb; 0.36 GB once decoded
_MOST_BYTES = 8 * MOST_PIXELS  # of one file: 16-bit RGBA without compression
_LONGEST = 16  # sides; a picture that is longer is not resized as a whole, of which 15/16 would be cut off
_NAMED = 3  # how many images or classes a message names

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `load_rgb` names the file


class BadImage(UserError):
    """An image that was read but does not decode, or is too large for that."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"{path}: does not decode ({reason}); repair or remove it")
        self.reason = reason


class ImageSource(Protocol):
    """N labelled images of one split, in a fixed order."""

    split: str
    labels: np.ndarray | None  # [N] int64; None where they are not known
    class_names: list[str]
    digest: str
    """SHA-256 of what tells these images from others: the raw data, or the names and sizes of the files."""
    passed_over: str
    """A line about the files among the images that are none; empty if there are none."""

    def __len__(self) -> int: ...

    def load(self, index: int) -> Image.Image:
        """The image in RGB.

        Raises `BadImage` if it does not decode, and another `UserError` if it cannot be read (its disk is
        gone) or there is no memory for it.
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

    passed_over = ""
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
    """Image files as `root/<split>/<class>/<file>` or in folders below a class.

    These are the samples of torchvision's ImageFolder, in its order, but for names that start with a dot:
    classes are the folders in the order of their names. Pixels are taken as they are stored: EXIF orientation
    is not applied (Pillow applies that of a TIFF). Raises `UserError` if there are none, if a class has none,
    or if the classes are not those of the split `train` beside it.
    """

    def __init__(self, root: str | None, split: str):
        if root is None:
            raise UserError("data.root = null: name the folder of the images, or choose another data.dataset")
        self.split = split
        self._folder = Path(root) / split
        classes, beside = class_folders(root, self._folder)
        if not classes:
            raise UserError(f"{self._folder}: has no class folders; images belong in {self._folder}/<class>/")
        if split != "train" and (Path(root) / "train").is_dir():
            trained = class_folders(root, Path(root) / "train")[0]
            if trained and (difference := class_difference(split, classes, "train", trained)):
                raise UserError(f"{root}: {difference}; give the folders of a class the same name in both")
        # In threads, for network filesystems, where one answer after the other takes minutes
        with ThreadPoolExecutor(16) as pool:
            listings = list(pool.map(list_images, (self._folder / name for name in classes)))
        for name, listing in zip(classes, listings, strict=True):
            if not listing.names:
                raise UserError(
                    f"{self._folder / name}: a class without images; add some or remove the folder "
                    f"({passed_over(listing.others)})"
                )
        others = sum((listing.others for listing in listings), beside)
        self.passed_over = f"{self._folder}: {passed_over(others)}" if others else ""
        self.class_names = classes
        counts = [len(listing.names) for listing in listings]
        self.labels = np.repeat(np.arange(len(classes), dtype=np.int64), counts)
        # One array of bytes, not a list: workers that are forked share it without copying
        self._files = np.array([os.fsencode(name) for listing in listings for name in listing.names])
        digest = hashlib.sha256()
        for name, (files, sizes, _) in zip(classes, listings, strict=True):
            lines = (os.fsencode(f"{name}/{file} {size}") for file, size in zip(files, sizes, strict=True))
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
    """All image files of a folder and of the folders in it, as within a class of `FolderImages`; no labels.

    Raises `UserError` if there is no such folder or no image.
    """

    labels = None

    def __init__(self, folder: str | Path):
        self._folder, self.split = Path(folder), str(folder)
        if not self._folder.is_dir():
            raise UserError(f"{folder}: there is no such folder of images; correct the path")
        self.class_names: list[str] = []
        self._names, sizes, others = list_images(self._folder)
        self.passed_over = f"{folder}: {passed_over(others)}" if others else ""
        if not self._names:
            raise UserError(f"{folder}: has no images; name a folder that does ({passed_over(others)})")
        found = list(zip(self._names, sizes, strict=True))
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

    Its size is looked at before it is decoded. Raises what `ImageSource.load` does.
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
        return _to_rgb(image)
    except UnidentifiedImageError:  # whose message names the buffer's address
        raise BadImage(path, "of no known image format") from None
    except MemoryError:
        raise UserError(
            f"{path}: no memory to decode it; lower hardware.workers or make it smaller, and run again"
        ) from None
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error ...
        raise BadImage(path, " ".join((str(error) or type(error).__name__).split())) from None


def _to_rgb(image: Image.Image) -> Image.Image:
    # Pillow would clip 16-bit grey at 255; keep the high byte, as it does for 16-bit RGB
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError("grey of 32 bits, whose black and white nobody has said; store 8 or 16 bits")
    if image.mode != "RGB":
        return image.convert("RGB")
    image.load()  # convert() would do that too, and copy
    return image


def refuse_or_leave_out(
    source: ImageSource, bad: Sequence[int], on_bad_image: str, remark: str = "", *, told: bool = True
) -> None:
    """The one policy for images (`bad` has their numbers) that do not decode, once all have been tried.

    With `on_bad_image` = `error`, raises `UserError`; with `skip`, prints how many are left out, and a
    `remark`, if it is to be `told`.
    """
    if len(bad) and on_bad_image == "error":
        named = [f"{source.name(index)} ({_why_bad(source, index)})" for index in bad[:_NAMED]]
        raise UserError(
            f"{len(bad)} of {len(source)} images do not decode: {first_few(named, len(bad))}; "
            "repair or remove them, or keep what is done and leave them out (encode.on_bad_image: skip), "
            "then run again"
        )
    if len(bad) and told:
        named = first_few([source.name(index) for index in bad[:_NAMED]], len(bad))
        count = f"{len(bad)} of {len(source)} images"
        print(f"{source.split}: left out {count}, which do not decode: {named}{remark}", flush=True)


def _why_bad(source: ImageSource, index: int) -> str:
    try:
        source.load(index)
    except BadImage as error:
        return error.reason
    except UserError as error:
        return str(error)
    return "decodes at a second try"


def first_few(named: Sequence[str], count: int) -> str:
    """`a, b, c and 5 more`: the first of `count` things."""
    shown = named[:_NAMED]
    return ", ".join(shown) + (f" and {count - len(shown)} more" if count > len(shown) else "")


_DATASETS = {"digits": DigitImages, "folder": FolderImages}


def center_view(image: Image.Image, size: int) -> np.ndarray:
    """The central square of an RGB image, as uint8 `[size, size, 3]` (release; from ADM).

    A box filter halves the image while its short side is at least twice the target, a bicubic one does
    the rest; small images grow by the bicubic one. Memory is bounded by the image's own and `size`, however
    long and narrow it is.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    left, top = (width - size) // 2, (height - size) // 2
    if max(width, height) <= _LONGEST * size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        return np.array(image.crop((left, top, left + size, top + size)))
    # The same without the rest: Pillow rounds the box to float32, and may take the axes in the other order
    x, y = image.width / width, image.height / height
    box = (left * x, top * y, (left + size) * x, (top + size) * y)
    return np.array(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def center_views(
    source: ImageSource, indices: Sequence[int], size: int, pool: Executor
) -> tuple[np.ndarray, np.ndarray]:
    """Centre views uint8 `[B, S, S, 3]` of images, and which of them do not decode `[B]` and are black.

    Raises `UserError` if one cannot be read at all.
    """

    def view(index: int) -> np.ndarray | None:
        try:
            return center_view(source.load(index), size)
        except BadImage:
            return None

    found = list(pool.map(view, indices))
    black = np.zeros((size, size, 3), np.uint8)
    bad = np.array([view is None for view in found])
    return np.stack([black if view is None else view for view in found]), bad


def view_digest(view: str) -> str:
    """SHA-256 of what a view makes of fixed pictures: another once a change here or in Pillow shows.

    Whatever was made of views and is kept from one run to the next depends on it.
    """
    digest = hashlib.sha256()
    for width, height in ((50, 37), (7, 9), (1, 200)):
        count = np.arange(height * width * 3)
        pixels = (count * count * 7 + count * 13) % 256
        image = Image.fromarray(pixels.astype(np.uint8).reshape(height, width, 3))
        grey = Image.fromarray((pixels[: height * width] * 256).astype(np.uint16).reshape(height, width))
        for picture in (image, _to_rgb(grey)):
            if view == "center":
                made = center_view(picture, 12)
            else:
                rng = np.random.default_rng(0)
                made = augmented_view(picture, 12, (0.2, 1.0), (3 / 4, 4 / 3), True, rng)
            digest.update(made.tobytes())
    return digest.hexdigest()


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
