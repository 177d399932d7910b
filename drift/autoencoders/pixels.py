"""No autoencoder: the latents are the pixels in [-1, 1], of which the files hold the 8-bit levels."""

import hashlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from drift.autoencoders.base import Latents
from drift.data.levels import to_float


class Pixels:
    """See `drift.autoencoders.Autoencoder`; nothing is lost, whatever the precision."""

    needs_source = False
    has_posterior = False
    storage_dtype = np.dtype(np.uint8)
    id = "pixels"
    revision: str | None = None
    precision = "float32"
    scaling_factor = 1.0

    def __init__(self, device: str | torch.device = "cpu"):
        self.device = torch.device(device)

    @classmethod
    def known(cls, source: str, revision: str | None, image_size: int) -> Latents:
        return Latents(cls.scaling_factor, (3, image_size, image_size))

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path = id,
        revision: str | None = None,
        device: str | torch.device = "cpu",
        precision: str = "float32",
    ) -> Self:
        """There is nothing to load."""
        return cls(device)

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.id.encode()).hexdigest()

    def to(self, device: torch.device, /) -> Self:
        return type(self)(device)

    def compile_with(self, compiler: Callable[[Callable, str], Callable]) -> None:
        """There is no network."""

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        return 3, image_size, image_size

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """uint8 `images [B, H, W, 3]` -> floats in [-1, 1], `[B, 3, H, W]`; `noise` has no part in it."""
        return to_float(images.to(self.device, non_blocking=True))

    def decode(self, latents: Tensor) -> Tensor:
        """The identity, with its gradient."""
        return latents.to(self.device, torch.float32)

    def in_float32(self) -> Self:
        return self

    def tell_recomputed(self) -> None:
        """Nothing ever is."""
