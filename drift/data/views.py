"""Square views of an image: its centre, with the mirror image or without, and random crops.

A view is a frozen object that owns its options; `VIEWS` is their registry.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from drift.data.datasets import Dataset
from drift.data.images import BadImage, to_rgb
from drift.runtime.errors import one_of

_LONGEST = 16  # sides; a picture that is longer is not resized as a whole, of which 15/16 would be cut off


@dataclass(frozen=True, kw_only=True)
class Center:
    """The central square of an image and, with `mirror`, its mirror image."""

    name: ClassVar[str] = "center"
    mirror: bool

    @property
    def per_image(self) -> int:
        return 1 + self.mirror

    def pictures(self, image: Image.Image, size: int, draw: Callable[[int], np.random.Generator]) -> Iterator:
        """uint8 pictures `[size, size, 3]`, `per_image` of them."""
        picture = center_view(image, size)
        yield from (picture, picture[:, ::-1])[: self.per_image]


@dataclass(frozen=True, kw_only=True)
class Augmented:
    """`crops` random crops of an image; see `augmented_view`."""

    name: ClassVar[str] = "augmented"
    crops: int
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    flip: bool

    @property
    def per_image(self) -> int:
        return self.crops

    def pictures(self, image: Image.Image, size: int, draw: Callable[[int], np.random.Generator]) -> Iterator:
        """uint8 pictures `[size, size, 3]`, `per_image` of them; `draw` gives each crop its generator."""
        for crop in range(self.crops):
            yield augmented_view(image, size, self.crop_scale, self.crop_ratio, self.flip, draw(crop))


View = Center | Augmented
VIEWS: dict[str, type[View]] = {kind.name: kind for kind in (Center, Augmented)}
VIEW_OPTIONS = {name: tuple(option.name for option in fields(kind)) for name, kind in VIEWS.items()}
"""The settings of `encode` that only one view has."""


def make_view(name: str, options: Any) -> View:
    """The view called `name`; its options are attributes of `options`."""
    kind = VIEWS[one_of("view", name, *VIEWS)]
    return kind(**{key: getattr(options, key) for key in VIEW_OPTIONS[name]})


def view_digest(name: str) -> str:
    """SHA-256 of what a view makes of fixed pictures: it changes when a change here or in Pillow shows.

    Whatever was made of views and is kept from one run to the next depends on it.
    """
    crop = {"crops": 1, "crop_scale": (0.2, 1.0), "crop_ratio": (3 / 4, 4 / 3), "flip": True}
    view = Center(mirror=False) if name == "center" else Augmented(**crop)
    digest = hashlib.sha256()
    for width, height in ((50, 37), (7, 9), (1, 200)):
        count = np.arange(height * width * 3)
        pixels = (count * count * 7 + count * 13) % 256
        colour = Image.fromarray(pixels.astype(np.uint8).reshape(height, width, 3))
        grey = Image.fromarray((pixels[: height * width] * 256).astype(np.uint16).reshape(height, width))
        for image in (colour, to_rgb(grey)):
            for picture in view.pictures(image, 12, lambda crop: np.random.default_rng(0)):
                digest.update(picture.tobytes())
    return digest.hexdigest()


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
    source: Dataset, indices: Sequence[int], size: int, pool: Executor
) -> tuple[np.ndarray, np.ndarray]:
    """Centre views uint8 `[B, S, S, 3]` of images, and which of them do not decode `[B]` and are black.

    Raises `UserError` if one cannot be read at all.
    """

    def view(index: int) -> tuple[np.ndarray, bool]:
        try:
            return center_view(source.load(index), size), False
        except BadImage:
            return np.zeros((size, size, 3), np.uint8), True

    views, bad = zip(*pool.map(view, indices), strict=True)
    return np.stack(views), np.array(bad)


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
        area = width * height * rng.uniform(scale[0], scale[1])
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
            return int(left), int(top), w, h
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    return (width - w) // 2, (height - h) // 2, w, h
