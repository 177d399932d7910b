"""Feature vectors of many images on disk: memory does not grow with them, and a killed run goes on."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from drift.runtime.files import RowFile

BLOCK = 1024  # rows that are read at once
_MISSING, _THERE, _UNDECODABLE = 0, 1, 2  # marks of a row


class FeatureStore:
    """Features float32 `[N, D]`, row i those of image i, with a mark for each row that is there.

    Several processes may write different rows; one calls `create` before the others open the folder.
    """

    def __init__(self, folder: str | Path, leave_out: Sequence[int] = ()):
        """`leave_out`: rows that reading passes over, those of images that do not decode."""
        self._features = RowFile(Path(folder, "features.npy"))
        self._marks = RowFile(Path(folder, "done.npy"))
        self._rows = np.setdiff1d(np.arange(len(self._features)), leave_out)
        self.shape: tuple[int, int] = (len(self._rows), *self._features.shape[1:])

    @classmethod
    def create(cls, folder: str | Path, count: int, dimension: int) -> "FeatureStore":
        """The store in `folder` if it has this shape, and otherwise an empty one in its place."""
        folder = Path(folder)
        try:
            store = cls(folder)
            if store.shape == (count, dimension) and len(store._marks) == count:
                return store
        except (OSError, ValueError):
            pass
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        RowFile.create(folder / "features.npy", np.float32, (count, dimension))
        RowFile.create(folder / "done.npy", np.uint8, (count,))
        return cls(folder)

    def __len__(self) -> int:
        return self.shape[0]

    def missing(self) -> np.ndarray:
        """The rows without features, ascending; those of images that do not decode are among them."""
        return np.flatnonzero(self._marks.read() != _THERE)

    def undecodable(self) -> np.ndarray:
        """The rows of images that do not decode, ascending."""
        return np.flatnonzero(self._marks.read() == _UNDECODABLE)

    def write(self, rows: Sequence[int], features: np.ndarray, undecodable: np.ndarray | None = None) -> None:
        """Write `features [B, D]` as the ascending `rows`; they reach the disk before their marks do.

        `undecodable` `[B]` says which of the rows belong to images that do not decode.
        """
        rows = np.asarray(rows)
        marks = np.full(len(rows), _THERE, np.uint8)
        if undecodable is not None:
            marks[undecodable] = _UNDECODABLE
        runs = np.split(np.arange(len(rows)), np.flatnonzero(np.diff(rows) != 1) + 1)
        for run in runs:
            self._features.write(rows[run[0]], features[run], flush=run is runs[-1])
        for run in runs:
            self._marks.write(rows[run[0]], marks[run], flush=False)

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        """Features `[B, D]` of an array or a slice of rows."""
        return self._features.read(self._rows[rows])

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """All rows in order, `BLOCK` at a time."""
        assert len(self.missing()) == len(self.undecodable()), "rows that nobody has measured"
        for start in range(0, len(self), BLOCK):
            part = slice(start, min(start + BLOCK, len(self)))
            yield part, self[part]
