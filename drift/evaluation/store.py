"""Feature vectors of many images on disk: memory does not grow with them, and a killed run goes on."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from drift.evaluation.batches import one_behind
from drift.evaluation.networks import FeatureNetwork
from drift.runtime.files import RowFile
from drift.runtime.processes import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))
BLOCK = 1024  # rows that are read at once
_MISSING, _THERE, _UNDECODABLE = 0, 1, 2  # marks of a row
Images = TypeVar("Images")


class FeatureStore:
    """Features float32 `[N, D]`, row i those of image i, with a mark for each row that is there.

    Several processes may write different rows.
    """

    def __init__(self, folder: Path, leave_out: Sequence[int] | np.ndarray = ()):
        """`leave_out`: rows that reading passes over, those of images that do not decode."""
        self._features = RowFile(folder / "features.npy")
        self._marks = RowFile(folder / "done.npy")
        self._rows = np.setdiff1d(np.arange(len(self._features)), leave_out)
        self.shape = (len(self._rows), self._features.shape[1])

    @classmethod
    def create(cls, folder: Path, count: int, dimension: int, ranks: Ranks = ALONE) -> "FeatureStore":
        """The store in `folder` if it has this shape, else an empty one in its place; for all `ranks`."""
        if ranks.first and not cls._fits(folder, (count, dimension)):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            RowFile.create(folder / "features.npy", np.float32, (count, dimension))
            RowFile.create(folder / "done.npy", np.uint8, (count,))
        ranks.barrier()
        return cls(folder)

    @classmethod
    def _fits(cls, folder: Path, shape: tuple[int, int]) -> bool:
        try:
            store = cls(folder)
        except (OSError, ValueError):
            return False
        return store.shape == shape and len(store._marks) == len(store)

    def __len__(self) -> int:
        return self.shape[0]

    def missing(self) -> np.ndarray:
        """The rows without features, ascending; those of images that do not decode are among them."""
        return np.flatnonzero(self._marks.read() != _THERE)

    def undecodable(self) -> np.ndarray:
        """The rows of images that do not decode, ascending."""
        return np.flatnonzero(self._marks.read() == _UNDECODABLE)

    def write(self, rows: np.ndarray, features: np.ndarray, undecodable: np.ndarray | None = None) -> None:
        """Write `features [B, D]` as the ascending `rows`; they reach the disk before their marks do.

        `undecodable` `[B]` says which of the rows belong to images that do not decode.
        """
        marks = np.full(len(rows), _THERE, np.uint8)
        if undecodable is not None:
            marks[undecodable] = _UNDECODABLE
        runs = np.split(np.arange(len(rows)), np.flatnonzero(np.diff(rows) != 1) + 1)
        for run in runs:
            self._features.write(int(rows[run[0]]), features[run], flush=run is runs[-1])
        for run in runs:
            self._marks.write(int(rows[run[0]]), marks[run], flush=False)

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        """Features `[B, D]` of an array or a slice of rows."""
        return self._features.read(self._rows[rows])

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """All rows in order, `BLOCK` at a time."""
        assert len(self.missing()) == len(self.undecodable()), "rows that nobody has measured"
        for start in range(0, len(self), BLOCK):
            part = slice(start, min(start + BLOCK, len(self)))
            yield part, self[part]


def measure_rows(
    store: FeatureStore,
    missing: np.ndarray,
    network: FeatureNetwork,
    make: Callable[[np.ndarray], Images],
    resized: Callable[[np.ndarray, Images], tuple[Tensor, np.ndarray | None]],
    *,
    batch_size: int,
    ranks: Ranks,
    on_images: Callable[[int], None],
) -> None:
    """Write the features of the `missing` rows, which all processes share, into the store.

    `make` turns rows into images, or whatever `resized` takes, and runs in this thread. `resized` turns rows
    and images into what `network.features` takes, and says which images do not decode; it runs in another
    thread while the next batch is made. `on_images` receives how many rows are there, if all processes keep
    pace.
    """
    ranks.barrier()  # nobody writes before all have looked, or they would share the rows differently
    mine = np.array_split(missing, ranks.world_size)[ranks.rank]
    batches = (mine[start : start + batch_size] for start in range(0, len(mine), batch_size))
    made: Iterable[tuple[np.ndarray, Images]] = ((rows, make(rows)) for rows in batches)
    done = len(store) - len(missing)
    for (rows, _), (pixels, undecodable) in one_behind(made, lambda item: resized(*item)):
        store.write(rows, network.features(pixels).cpu().numpy(), undecodable)
        done += len(rows) * ranks.world_size
        on_images(min(done, len(store)))
    ranks.barrier()
