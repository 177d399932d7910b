"""Images -> latents of one view: a loop that may be killed at any moment and shared by several processes.

The images are cut into blocks of consecutive ones, which the processes take in turns. The rows of a block
are on the disk before its images are marked as done, so whoever comes next goes on with the blocks that
have unmarked images. What is written depends neither on the cut nor on the processes, beyond the rounding
of the VAE's convolutions in batches of another size.
"""

import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from drift.data.images import ImageSource, augmented_view, center_view
from drift.data.latents import file_facts, latent_files
from drift.errors import UserError
from drift.files import atomic_write, write_json
from drift.models.vae import VAE
from drift.seeds import numpy_generator, torch_generator

_TO_DO, _DONE, _UNDECODABLE = 0, 1, 2  # marks of an image
_NAMED = 3  # how many of the images that do not decode a message names


def encode_view(
    source: ImageSource,
    vae: VAE,
    folder: str | Path,
    *,
    dataset: str,
    view: str,
    image_size: int,
    crops: int,
    crop_scale: tuple[float, float],
    crop_ratio: tuple[float, float],
    flip: bool,
    mirror: bool,
    posterior: str,
    seed: int,
    batch_size: int,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = lambda: None,
    progress: bool = False,
) -> Path:
    """Encode every image of `source`; returns the folder, within `folder`, that holds the finished latents.

    `view` is `center` (with `mirror`, each picture is followed by its mirror image) or `augmented` (`crops`
    random crops per image, shaped by `crop_scale`, `crop_ratio` and `flip`); the arguments of the other view
    have no effect. Rows follow the images, those of an image together. `posterior` is `mean` or `sample`.
    At most `batch_size` pictures go through the VAE at once, and `workers` processes decode (0: this one).
    `folder` serves one choice of the arguments up to `seed`, and is shared by the processes.

    Raises `UserError` if images do not decode, after all have been tried, and `FloatingPointError` if
    float16 cannot hold a latent.
    """
    pictures = _Pictures(source, view, image_size, crops, crop_scale, crop_ratio, flip, mirror, seed)
    export = Path(folder) / "latents"
    latents_path, labels_path, meta_path = latent_files(export)
    marks_path = export / "images_done.npy"
    shape = (len(source) * pictures.per_image, *vae.latent_shape(image_size))
    if rank == 0 and not meta_path.exists():
        if marks_path.exists():
            marks = np.load(marks_path)
            marks[marks == _UNDECODABLE] = _TO_DO  # may have been repaired
        else:
            export.mkdir(parents=True, exist_ok=True)
            _preallocate(latents_path, shape)
            _save(labels_path, np.repeat(source.labels, pictures.per_image))
            marks = np.full(len(source), _TO_DO, np.uint8)
        _save(marks_path, marks)  # after the others, for which it vouches
    barrier()
    if not meta_path.exists():
        marks = np.load(marks_path)
        blocks = _blocks(len(source), max(1, batch_size // pictures.per_image))[rank::world_size]
        blocks = [block for block in blocks if (marks[block.start : block.stop] != _DONE).any()]
        loader = DataLoader(pictures, batch_sampler=blocks, num_workers=workers, collate_fn=list)
        bar = tqdm(total=sum(map(len, blocks)), desc=f"encode {view}", unit="img", disable=not progress)
        intact = True
        for block, decoded in zip(blocks, loader, strict=True):
            damaged = [index for index, views in zip(block, decoded, strict=True) if views is None]
            for index in damaged:
                _write_rows(marks_path, index, np.full(1, _UNDECODABLE, np.uint8))
            intact = intact and not damaged
            if intact:  # otherwise all that can come of this run is the list of damaged files
                latents = _encode(vae, pictures, block, decoded, posterior, batch_size)
                _write_rows(latents_path, block.start * pictures.per_image, latents)
                _write_rows(marks_path, block.start, np.full(len(block), _DONE, np.uint8))
            bar.update(len(block))
        bar.close()
        barrier()
        _raise_undecodable(source, np.load(marks_path))
        if rank == 0:
            meta = {
                "dataset": dataset,
                "dataset_split": source.split,
                "images": len(source),
                "images_sha256": source.digest,
                "class_names": source.class_names,
                "num_classes": len(source.class_names),
                **pictures.settings(),
                "posterior": posterior,
                "vae": vae.id,
                "vae_revision": vae.revision,
                "vae_sha256": vae.digest,
                "scaling_factor": vae.scaling_factor,
                "versions": {
                    "python": platform.python_version(),
                    "torch": torch.__version__,
                    **{name: version(name) for name in ("diffusers", "numpy", "pillow")},
                },
            }
            write_json(meta_path, {**meta, **file_facts(export)})
    barrier()  # until then the others may still read the marks
    if rank == 0:
        marks_path.unlink(missing_ok=True)
    return export


@dataclass(frozen=True)
class _Pictures(Dataset):
    """Index of an image -> its pictures, uint8 `[per_image, size, size, 3]`; None if it does not decode."""

    source: ImageSource
    view: str
    image_size: int
    crops: int
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    flip: bool
    mirror: bool
    seed: int

    @property
    def per_image(self) -> int:
        return self.crops if self.view == "augmented" else 1 + self.mirror

    def settings(self) -> dict[str, Any]:
        """For the meta file: what decides the pictures of this view."""
        own = ("crops", "crop_scale", "crop_ratio", "flip") if self.view == "augmented" else ("mirror",)
        return {name: getattr(self, name) for name in ("view", "image_size", "seed", *own)}

    def __getitem__(self, index: int) -> np.ndarray | None:
        try:
            image = self.source.load(index)
        except Exception:  # of any type: decoders raise OSError, SyntaxError, ValueError, struct.error ...
            return None
        if self.view == "augmented":
            return np.stack([self._crop(image, index, crop) for crop in range(self.crops)])
        picture = center_view(image, self.image_size)
        return np.stack([picture, picture[:, ::-1]][: self.per_image])

    def _crop(self, image, index: int, crop: int) -> np.ndarray:
        rng = numpy_generator(self.seed, "encode/crop", index, crop)
        return augmented_view(image, self.image_size, self.crop_scale, self.crop_ratio, self.flip, rng)


def _encode(
    vae: VAE,
    pictures: _Pictures,
    block: range,
    decoded: list[np.ndarray],
    posterior: str,
    batch_size: int,
) -> np.ndarray:
    """The latents of a block, float16 `[rows, C, h, w]`."""
    images = torch.from_numpy(np.concatenate(decoded))  # [rows, H, W, 3] uint8
    moments = [vae.moments(part) for part in images.split(batch_size)]
    mean, std = (torch.cat(parts) for parts in zip(*moments, strict=True))  # [rows, C, h, w]
    if posterior == "sample":
        noise = torch.empty(mean.shape)
        keys = ((index, number) for index in block for number in range(pictures.per_image))
        for row, (index, number) in zip(noise, keys, strict=True):
            row.normal_(
                generator=torch_generator(pictures.seed, "encode/posterior", pictures.view, index, number)
            )
        mean = mean + std * noise.to(mean.device)
    latents = vae.scale(mean).half().cpu()
    finite = latents.isfinite().flatten(1).all(1)
    if not finite.all():
        index = block[int(finite.int().argmin()) // pictures.per_image]
        raise FloatingPointError(
            f"{pictures.source.name(index)}: its latents are not finite in float16; "
            "are the weights of the VAE whole, and is it the VAE for these images?"
        )
    return latents.numpy()


def _blocks(count: int, size: int) -> list[range]:
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def _preallocate(path: Path, shape: tuple[int, ...]) -> None:
    """A float16 `.npy` file of this shape, all zeros; raises `UserError` if the disk has no room for it."""
    needed, free = 2 * int(np.prod(shape)), shutil.disk_usage(path.parent).free
    if needed > free:
        raise UserError(
            f"{path.parent}: the latents need {needed / 2**30:.1f} GiB, the disk has {free / 2**30:.1f} GiB "
            "free; make room or move the work folder (DRIFT_WORK_DIR)"
        )
    np.lib.format.open_memmap(path, "w+", np.float16, shape)


def _save(path: Path, array: np.ndarray) -> None:
    with atomic_write(path) as file:
        np.save(file, array)


def _write_rows(path: Path, start: int, rows: np.ndarray) -> None:
    """Overwrite rows of a `.npy` file from row `start` on, and wait until they are on the disk.

    Not through a memory map, which would be killed by a full disk (SIGBUS) and which, on a network
    filesystem, would write whole pages over the neighbouring rows of another machine.
    """
    stored = np.load(path, mmap_mode="r")
    assert rows.dtype == stored.dtype and rows.shape[1:] == stored.shape[1:]
    with path.open("r+b") as file:
        file.seek(stored.offset + start * rows[0].nbytes)
        file.write(rows.tobytes())
        file.flush()
        os.fsync(file.fileno())


def _raise_undecodable(source: ImageSource, marks: np.ndarray) -> None:
    damaged = np.flatnonzero(marks == _UNDECODABLE)
    if not len(damaged):
        assert (marks == _DONE).all()
        return
    named = []
    for index in map(int, damaged[:_NAMED]):
        try:
            source.load(index)
            reason = "decodes at a second try"
        except Exception as error:
            reason = " ".join((str(error) or type(error).__name__).split())
        named.append(f"{source.name(index)} ({reason})")
    more = f" and {len(damaged) - _NAMED} more" if len(damaged) > _NAMED else ""
    raise UserError(
        f"{len(damaged)} of {len(source)} images do not decode: {', '.join(named)}{more}; "
        "repair or remove them, then run again"
    )
