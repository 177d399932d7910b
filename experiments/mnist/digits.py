"""The images of the experiment: 28x28, not padded."""

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

from drift.data.datasets import open_images
from drift.data.datasets.digits import HandwrittenDigits
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
    """`train` or `held_out`, which is the test split of the whole of MNIST."""
    source = open_images(data.dataset, data.root, split, 10)
    assert isinstance(source, HandwrittenDigits) and source.labels is not None
    return Digits(torch.tensor(source.pixels)[:, None], torch.from_numpy(source.labels))
