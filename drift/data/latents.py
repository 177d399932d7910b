"""Latents on disk, in the files that users of the Sinkhorn paper's code exchange, and what reads them.

A folder holds `<split>_latents.npy` `[N, C, H, W]` float16, `<split>_labels.npy` `[N]` int64 and
`<split>_meta.json`, which may lack every key in files from elsewhere. Where the latents are pixels, they are
uint8, half the bytes, on the disk and on the way to a device.
"""

import errno
import hashlib
import json
import math
import os
import weakref
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import cached_property, partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from drift.data.levels import from_levels, to_levels
from drift.runtime.errors import UserError
from drift.runtime.files import atomic_write, sha256, write_json

_STORED = {np.float16: torch.float16, np.uint8: torch.uint8}
"""The types that files of latents may have, and what PyTorch calls them."""
_BLOCK = 2**25  # numbers that are read at once where all rows are read
_LARGE_ROW, _READERS = 2**16, 4  # bytes from which a row is worth a thread; threads
_BUFFERS = 1024  # of one `preadv`, at most
_WAY_OUT = "rerun encode (dvc repro) or fetch it (dvc pull)"
_SETTINGS = {
    "image_size": "data.image_size",
    "vae": "encode.autoencoder",
    "vae_precision": "encode.precision",
    "vae_revision": "encode.autoencoder.revision",
}
"""The settings with which keys of the meta file are compared, where they have another name."""


def as_floats(rows: torch.Tensor) -> torch.Tensor:
    """Rows as they are stored -> float32 latents; the levels of pixels become [-1, 1]."""
    return from_levels(rows) if rows.dtype == torch.uint8 else rows.float()


def as_stored(latents: torch.Tensor, dtype: np.dtype) -> torch.Tensor:
    """Latents -> rows of a file of this type; pixels become their nearest levels."""
    return to_levels(latents) if dtype == np.uint8 else latents.half()


def latent_files(folder: str | Path, split: str = "train") -> tuple[Path, Path, Path]:
    """The paths of a split's latents, labels and meta file."""
    folder = Path(folder)
    return folder / f"{split}_latents.npy", folder / f"{split}_labels.npy", folder / f"{split}_meta.json"


class LatentStore:
    """N latents with their labels; latents are read when they are asked for.

    `latents` is a memory map, for a quick look only: a mapped file that is cut short, or whose disk
    disappears, kills the process with SIGBUS. What must survive that uses `read` or `rows`.
    """

    def __init__(self, folder: str | Path, split: str = "train"):
        """Open the files of a split.

        Raises `UserError`, naming the file and the way out, if one is missing, cut short, of another
        type or shape, or does not fit the others.
        """
        self.folder, self.split = Path(folder), split
        self._path, labels_path, self._meta_path = latent_files(folder, split)
        self.latents = _map_array(self._path, tuple(_STORED), 4)  # [N, C, H, W] float16 or uint8
        self.labels = labels = np.array(_map_array(labels_path, (np.int64,), 1))  # [N] int64
        self.meta = _read_meta(self._meta_path)
        if len(labels) != len(self):
            raise UserError(
                f"{labels_path}: {len(labels)} labels for the {len(self)} latents beside it; {_WAY_OUT}"
            )
        if labels.min() < 0 or labels.max() >= self.num_classes:
            raise UserError(
                f"{labels_path}: labels {labels.min()} to {labels.max()} are not all in "
                f"0 to {self.num_classes - 1}; {_WAY_OUT}"
            )
        self._file = os.open(self._path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    @classmethod
    def open(cls, folder: str | Path, split: str = "train") -> "LatentStore":
        """`LatentStore(folder, split)`."""
        return cls(folder, split)

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, C, H, W)."""
        return self.latents.shape

    @property
    def dtype(self) -> np.dtype:
        """float16, or uint8 for pixels."""
        return self.latents.dtype

    @cached_property
    def num_classes(self) -> int:
        """As the meta file has it, else one more than the largest label."""
        return self.meta["num_classes"] if "num_classes" in self.meta else int(self.labels.max()) + 1

    @cached_property
    def class_names(self) -> list[str]:
        """As the meta file has them, else the class numbers."""
        if "class_names" in self.meta:
            return self.meta["class_names"]
        return [str(label) for label in range(self.num_classes)]

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the hashes of latents and labels, which are read only if the meta file lacks them."""
        files = self.meta["sha256"] if "sha256" in self.meta else file_hashes(self.folder, self.split)
        return hashlib.sha256(f"{files['latents']} {files['labels']}".encode()).hexdigest()

    @cached_property
    def per_image(self) -> int:
        """Rows of one image, which stand together: its random crops, or its centre and the mirror of that.

        From the meta file, 1 where it does not say. Raises `UserError` if the view is unknown, or if the
        number of images in the file, or the labels, contradict it.
        """
        path = self._meta_path
        meta = {"view": "center", "crops": 1, "mirror": False, "skipped_images": {"count": 0}, **self.meta}
        by_view = {"augmented": meta["crops"], "center": 1 + meta["mirror"]}
        if meta["view"] not in list(by_view):
            raise UserError(f"{path}: view is {meta['view']!r}, neither center nor augmented; {_WAY_OUT}")
        per_image = by_view[meta["view"]]
        images, rest = divmod(len(self), per_image)
        stated = meta["images"] - meta["skipped_images"]["count"] if "images" in meta else images
        if rest or stated != images:
            raise UserError(
                f"{path}: {stated} images of {per_image} rows each are not the {len(self)} latents beside "
                f"it; {_WAY_OUT}"
            )
        if (self.labels.reshape(images, per_image) != self.labels[::per_image, None]).any():
            raise UserError(f"{path}: the labels of the {per_image} rows of an image differ; {_WAY_OUT}")
        return per_image

    def read(self, indices: np.ndarray | torch.Tensor, *, pin: bool = False) -> torch.Tensor:
        """Latents of row indices of any shape, as they are stored: `[*indices.shape, C, H, W]` of `dtype`.

        Reads each row once and in the order of the file, neighbours together, straight to its place; with
        `pin`, in pinned memory. Any number of threads may read at once. Raises `UserError` if the file cannot
        be read any more.
        """
        indices = np.asarray(indices)
        wanted, size = indices.reshape(-1), self.latents.strides[0]
        distinct, first = np.unique(wanted, return_index=True)  # rows, and where each is wanted first
        assert not len(distinct) or 0 <= distinct[0] <= distinct[-1] < len(self), (distinct, len(self))
        shape = (len(wanted), *self.shape[1:])
        if pin:
            rows = torch.empty(shape, dtype=_STORED[self.dtype.type], pin_memory=True)
        else:  # NumPy asks for huge pages
            rows = torch.from_numpy(np.empty(shape, self.dtype))
        places = rows.numpy().reshape(-1).view(np.uint8).reshape(len(wanted), size)
        first_of_run = np.flatnonzero(np.diff(distinct, prepend=-2) != 1)
        runs = [
            (self.latents.offset + int(distinct[start]) * size, [places[i].data for i in first[start:end]])
            for start, end in pairwise([*first_of_run.tolist(), len(distinct)])
        ]
        try:
            if hasattr(os, "posix_fadvise"):  # not on macOS
                # The disk works on all of them at once: a third of the time where nothing is cached
                for position, buffers in runs:
                    os.posix_fadvise(self._file, position, size * len(buffers), os.POSIX_FADV_WILLNEED)
            with ThreadPoolExecutor(_READERS) if size >= _LARGE_ROW else nullcontext() as pool:
                deque((pool.map if pool else map)(partial(_read_at, self._file), runs), maxlen=0)
        except OSError as error:
            raise UserError(
                f"{self._path}: cannot be read ({error.strerror}), the data folder is gone or was changed; "
                "run again once it is back: training goes on from its last checkpoint"
            ) from None
        source = first[np.searchsorted(distinct, wanted)]
        again = np.flatnonzero(source != np.arange(len(wanted)))
        rows[again] = rows[source[again]]
        return rows.view(*indices.shape, *self.shape[1:])

    def blocks(self) -> list[np.ndarray]:
        """The indices of all rows in order, so many at a time as take 64 MiB in float16."""
        step = max(1, _BLOCK // math.prod(self.shape[1:]))
        return [np.arange(start, min(start + step, len(self))) for start in range(0, len(self), step)]

    def rows(self, indices: np.ndarray | torch.Tensor) -> torch.Tensor:
        """`read`, as float32 latents `[*indices.shape, C, H, W]`."""
        return as_floats(self.read(indices))


class LatentReader:
    """Rows of a store on their way to a device: from the disk, or from the device's own memory."""

    def __init__(self, store: LatentStore, device: torch.device, *, on_device: bool):
        """With `on_device`, load all latents onto the device now.

        Raises `UserError` if they do not fit there.
        """
        self._store, self._device = store, device
        self._held: torch.Tensor | None = None  # [N, C, H, W], as they are stored
        if on_device:
            try:
                self._held = torch.empty(store.shape, dtype=_STORED[store.dtype.type], device=device)
            except torch.OutOfMemoryError:
                raise UserError(
                    f"hardware.latents_on_device = true: {store.latents.nbytes / 2**30:.1f} GiB of "
                    f"latents do not fit into the memory of {device}; set it to false"
                ) from None
            for rows in store.blocks():
                self._held[rows[0] : rows[-1] + 1] = store.read(rows)

    def fetch(self, indices: np.ndarray) -> torch.Tensor:
        """What `place` needs for int64 `indices`, in any thread; for a CUDA device in pinned memory.

        The rows `[*indices.shape, C, H, W]` as they are stored, or the indices alone where the device holds
        all rows. Raises `UserError` as `LatentStore.read` does.
        """
        if self._held is not None:
            return pinned(torch.from_numpy(indices), self._device)
        rows = self._store.read(indices, pin=self._device.type == "cuda")
        return pinned(rows, self._device)  # no copy

    def place(self, fetched: torch.Tensor) -> torch.Tensor:
        """Latents of what was fetched on the device: float32 `[*indices.shape, C, H, W]`."""
        fetched = fetched.to(self._device, non_blocking=True)
        return as_floats(fetched if self._held is None else self._held[fetched])


def pinned(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor in memory from which `device` can copy while both go on with their work."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def write_latents(
    folder: str | Path, split: str, latents: np.ndarray, labels: np.ndarray, meta: dict[str, Any]
) -> None:
    """Write a set that fits in memory; `shape`, `dtype` and `sha256` are added to `meta`.

    `latents` are `[N, C, H, W]`, `labels` `[N]`; they are stored as float16 (uint8 stays) and int64.
    """
    assert latents.ndim == 4 and labels.shape == latents.shape[:1]
    latents_path, labels_path, meta_path = latent_files(folder, split)
    latents_path.parent.mkdir(parents=True, exist_ok=True)
    stored = np.uint8 if latents.dtype == np.uint8 else np.float16
    for path, array, dtype in ((latents_path, latents, stored), (labels_path, labels, np.int64)):
        with atomic_write(path) as file:
            np.save(file, array.astype(dtype))
    write_json(meta_path, {**meta, **file_facts(folder, split)})


def file_facts(folder: str | Path, split: str = "train") -> dict[str, Any]:
    """What the meta file says of the two arrays beside it."""
    latents = np.load(latent_files(folder, split)[0], mmap_mode="r")
    return {
        "shape": list(latents.shape),
        "dtype": latents.dtype.name,
        "sha256": file_hashes(folder, split),
    }


def file_hashes(folder: str | Path, split: str = "train") -> dict[str, str]:
    """SHA-256 of the latents file and of the labels file."""
    latents_path, labels_path, _ = latent_files(folder, split)
    return {"latents": sha256(latents_path), "labels": sha256(labels_path)}


def check_meta(store: LatentStore, **expected: Any) -> None:
    """Refuse latents that were made otherwise than the settings say.

    `expected` are keys of the meta file, such as `view="center", image_size=256, vae="..."`; keys that
    the file lacks (it may come from elsewhere) are not compared. Raises `UserError`.
    """
    path = latent_files(store.folder, store.split)[2]
    for key, wanted in expected.items():
        if key not in store.meta:
            continue
        stated, wanted = store.meta[key], list(wanted) if isinstance(wanted, tuple) else wanted
        agree = stated == wanted
        if isinstance(stated, float) and isinstance(wanted, float):
            agree = math.isclose(stated, wanted, rel_tol=1e-6)  # other people's files may round
        if not agree:
            setting = _SETTINGS.get(key, f"the {key} asked for")
            raise UserError(
                f"{path}: {key} is {json.dumps(stated)}, but {setting} is {json.dumps(wanted)}; "
                f"{_WAY_OUT}, or correct the settings"
            )


def _read_at(file: int, run: tuple[int, list[memoryview]]) -> None:
    """Fill buffers with a file's bytes from a position on; raises OSError if it has not as many."""
    position, waiting = run[0], deque(run[1])
    while waiting:  # one call reads at most 2 GiB
        count = os.preadv(file, list(islice(waiting, _BUFFERS)), position)
        if not count:
            raise OSError(errno.ENODATA, "it has been cut short")
        position += count
        while waiting and count >= len(waiting[0]):
            count -= len(waiting.popleft())
        if count:
            waiting[0] = waiting[0][count:]


def _map_array(path: Path, dtypes: tuple[type, ...], ndim: int) -> np.memmap:
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise UserError(f"{path}: is missing; {_WAY_OUT}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is cut short or no .npy file ({error}); {_WAY_OUT}") from None
    announced, size = array.offset + array.nbytes, path.stat().st_size
    wanted, types = array.dtype in dtypes and array.ndim == ndim, " or ".join(t.__name__ for t in dtypes)
    for problem, present in {
        f"holds {array.dtype} in {array.ndim} dimensions, not {types} in {ndim}": not wanted,
        "is stored column after column (Fortran order)": not array.flags.c_contiguous,
        "holds no rows": not array.size,
        f"has {size} bytes where its header announces {announced}": announced != size,
    }.items():
        if present:
            raise UserError(f"{path}: {problem}; {_WAY_OUT}")
    return array


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: is missing; {_WAY_OUT}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is not JSON ({error}); {_WAY_OUT}") from None
    if not isinstance(meta, dict):
        raise UserError(f"{path}: holds {type(meta).__name__}, not an object; {_WAY_OUT}")
    return meta
