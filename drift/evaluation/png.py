"""Samples as PNG files, written by threads while the next ones are made."""

import os
import re
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from drift.runtime.files import atomic_write, check_writable, write_json

FILE = "fid.json"
"""What is in a folder of PNG files beside them, once all are there: what was measured on them."""
_RUN = ".run"  # says whose the files are
_IMAGE = re.compile(r"\d{6,}\.png")


class PngFolder:
    """A folder with sample i in `<i>.png`, numbered with zeros so that names sort as samples do."""

    def __init__(self, folder: str | Path, pool: ThreadPoolExecutor):
        """Raises `UserError` if the folder cannot be written."""
        self.folder, self._pool = Path(folder), pool
        self._writing: list[Future[None]] = []
        check_writable(self.folder)

    @property
    def finished(self) -> bool:
        return (self.folder / FILE).exists()

    def claim(self, run: str) -> None:
        """Make the folder that of `run`: what another run has left there is removed, and that is told.

        Or else the images of one generator would stand in for those of another, or beside them.
        """
        mark = self.folder / _RUN
        if mark.exists() and mark.read_text() == run:
            return
        others = [path for path in self.folder.iterdir() if path.name == FILE or _IMAGE.fullmatch(path.name)]
        if others:
            print(f"{self.folder}: removing {len(others)} files of another run", flush=True)
        for path in others:
            path.unlink()
        with atomic_write(mark) as file:
            file.write(run.encode())

    def add(self, indices: Sequence[int], images: Tensor) -> None:
        """Begin to write images uint8 `[B, H, W, 3]`."""
        for index, image in zip(indices, images.numpy(), strict=True):
            self._writing.append(self._pool.submit(self._write, int(index), image))

    def wait(self) -> None:
        """Return when all of them are written; raises what a thread has met."""
        while self._writing:
            self._writing.pop().result()

    def finish(self, measured: dict[str, Any]) -> None:
        write_json(self.folder / FILE, measured)

    def missing(self, count: int) -> np.ndarray:
        """Which of the samples 0 to `count` - 1 are not there, ascending."""
        with os.scandir(self.folder) as entries:
            found = {entry.name for entry in entries if entry.stat().st_size}
        return np.array([i for i in range(count) if _name(i) not in found], np.int64)

    def _write(self, index: int, pixels: np.ndarray) -> None:
        # Renamed but not flushed, which would take longer than all else; a power failure may leave it empty
        temporary = self.folder / f".{_name(index)}.tmp"
        Image.fromarray(pixels).save(temporary, format="PNG", compress_level=1)
        os.replace(temporary, self.folder / _name(index))


def _name(index: int) -> str:
    return f"{index:06d}.png"


def png_folder_name(omega: float, ema_decay: float | None, several: bool) -> str:
    """`gen_omega_<w>` (the prior's name), in a folder of its own for each of `several` EMA decays."""
    name = f"gen_omega_{omega:g}"
    return f"ema_{ema_decay:g}/{name}" if several else name
