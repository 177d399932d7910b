"""Latents with one `.npy` per sample, as the Sinkhorn paper's code has those of an RAE, as files of ours.

The sample of image `index` is `{index:06d}.npy`, in the folder itself or in folders of five digits below it.
Images are counted in the order of torchvision's ImageFolder, from which the labels come.
"""

import math
import os
import re
import shutil
from pathlib import Path

import numpy as np
from tqdm import tqdm

from drift.data.datasets import Dataset
from drift.data.latents import latent_files
from drift.runtime.errors import UserError
from drift.runtime.files import RowFile, atomic_write, write_json

_SAMPLE, _SHARD = re.compile(r"(\d{6,})\.npy"), re.compile(r"\d{5}")
_MISSING, _NO_SHARD = -2, -1


class Samples:
    """The files of one folder, by the index of their image."""

    def __init__(self, folder: Path, count: int):
        """Raises `UserError` unless there is one for each of `count` images, and no other."""
        self.folder = folder
        self._shards = np.full(count, _MISSING)  # not a list of names: there may be millions
        with os.scandir(folder) as entries:
            shards = sorted(entry.name for entry in entries if _SHARD.fullmatch(entry.name))
        for shard in [None, *shards]:
            self._list(folder / (shard or ""), _NO_SHARD if shard is None else int(shard))
        if len(missing := np.flatnonzero(self._shards == _MISSING)):
            raise UserError(
                f"{folder}: {missing[0]:06d}.npy is missing ({len(missing)} of {count} are); copy the files "
                "again, or name the images that they are of (--images)"
            )

    def _list(self, folder: Path, shard: int) -> None:
        with os.scandir(folder) as entries:
            names = [match[1] for entry in entries if (match := _SAMPLE.fullmatch(entry.name))]
        for index in map(int, names):
            if index >= len(self._shards):
                raise UserError(
                    f"{folder}: has {index:06d}.npy, but there are {len(self._shards)} images; name those "
                    "that the latents are of (--images)"
                )
            if self._shards[index] != _MISSING:
                raise UserError(f"{folder / f'{index:06d}.npy'}: is there twice; keep one of them")
            self._shards[index] = shard

    def path(self, index: int) -> Path:
        shard = self._shards[index]
        return self.folder / ("" if shard == _NO_SHARD else f"{shard:05d}") / f"{index:06d}.npy"

    def read(self, index: int, shape: tuple[int, ...] | None) -> np.ndarray:
        """Float16 `[C, H, W]`; raises `UserError` if it is damaged, of another shape, or not finite."""
        path = self.path(index)
        try:
            stored = np.load(path, allow_pickle=False)
            assert isinstance(stored, np.ndarray)
        except (OSError, ValueError, EOFError, AssertionError) as error:
            raise UserError(f"{path}: is cut short or no .npy file ({error}); copy it again") from None
        if stored.dtype.kind != "f" or stored.ndim != 3 or stored.shape != (shape or stored.shape):
            wanted = "C, H and W" if shape is None else shape
            raise UserError(f"{path}: holds {stored.dtype} {stored.shape}, not floating point {wanted}")
        with np.errstate(over="ignore"):
            latent = stored.astype(np.float16)
        if not np.isfinite(latent).all():
            raise UserError(f"{path}: holds a value that is not finite in float16; encode the image again")
        return latent


def has_samples(folder: Path) -> bool:
    """Whether a folder holds latents with one file per sample."""
    digits, shard = "[0-9]" * 6 + ".npy", "[0-9]" * 5
    return any(folder.glob(digits)) or any(folder.glob(f"{shard}/{digits}"))


def gather_samples(
    folder: Path, images: Dataset, destination: Path, shape: tuple[int, int, int] | None = None
) -> None:
    """Write the latents in `folder`, of `images` in their order, into `destination` as the split train.

    `shape` is what each must have; None is that of the first. Raises `UserError`, naming the file, if one is
    missing, damaged, not finite or of another shape, or if the disk has no room.
    """
    assert images.labels is not None
    samples = Samples(folder, len(images))
    shape = shape or samples.read(0, None).shape
    needed, free = 2 * len(images) * math.prod(shape), shutil.disk_usage(destination).free
    if needed > free:
        raise UserError(
            f"{destination.parent}: the latents need {needed / 2**30:.1f} GiB, the disk has "
            f"{free / 2**30:.1f} GiB free; make room"
        )
    latents_path, labels_path, meta_path = latent_files(destination)
    rows = RowFile.create(latents_path, np.float16, (len(images), *shape))
    for index in tqdm(range(len(images)), desc=f"latents of {folder}", unit="file"):
        rows.write(index, samples.read(index, shape)[None], flush=False)
    with atomic_write(labels_path) as file:
        np.save(file, np.asarray(images.labels, np.int64))
    of_images = {"dataset": images.dataset, "dataset_split": images.split, "images_sha256": images.digest}
    names = {"class_names": images.class_names, "num_classes": len(images.class_names)}
    write_json(meta_path, {**of_images, "images": len(images), **names})
