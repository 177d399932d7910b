"""Samples as PNG files, in folders that the Sinkhorn paper's scripts expect."""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from drift.runtime.files import atomic_write, check_writable, write_json

FILE = "fid.json"
"""What is in a folder of PNG files beside them, once all are there: what was measured on them."""
_RUN = ".run"  # names the run that the files belong to
_IMAGE = re.compile(r"\d{6,}\.png")


class PngFolder:
    """`gen_omega_<w>`, with sample i in `<i>.png`, numbered with zeros so that names sort as samples do."""

    def __init__(self, root: Path, omega: float, ema_decay: float | None = None):
        """In a folder of its own for each EMA decay, if given. Raises `UserError` if it cannot be written."""
        self.folder = root / (f"ema_{ema_decay:g}" if ema_decay is not None else "") / f"gen_omega_{omega:g}"
        check_writable(self.folder)

    @property
    def finished(self) -> bool:
        return (self.folder / FILE).exists()

    def claim(self, run: str) -> None:
        """Make the folder that of `run`: images of another generator must not stand in for this one's."""
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

    def write(self, index: int, pixels: np.ndarray) -> None:
        """Write one image uint8 `[H, W, 3]`."""
        # Renamed but not flushed, which would take longer than all else; a power failure may leave it empty
        temporary = self.folder / f".{index:06d}.tmp"
        Image.fromarray(pixels).save(temporary, format="PNG", compress_level=1)
        os.replace(temporary, self.folder / f"{index:06d}.png")

    def missing(self, count: int) -> np.ndarray:
        """Which of the samples 0 to `count` - 1 are not there, ascending."""
        with os.scandir(self.folder) as entries:
            found = {entry.name for entry in entries if entry.stat().st_size}
        return np.array([i for i in range(count) if f"{i:06d}.png" not in found], np.int64)

    def finish(self, measured: dict[str, Any]) -> None:
        write_json(self.folder / FILE, measured)
