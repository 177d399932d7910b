"""Image files in folders."""

import hashlib
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from drift.data.datasets.base import Dataset, class_difference, register
from drift.data.images import kind, list_images, load_rgb, passed_over
from drift.runtime.errors import UserError


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

    needs_root = True

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
