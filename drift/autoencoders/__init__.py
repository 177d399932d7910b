"""Between images and latents: one interface, one registry.

To add an autoencoder, write a class with the members of `Autoencoder` in a file of its own and enter it in
`AUTOENCODERS`; for one of diffusers, `DiffusersAutoencoder` has most of them. Such a file imports PyTorch at
most; libraries such as diffusers are imported when it loads.
"""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

from drift.autoencoders.base import DiffusersAutoencoder, Latents
from drift.autoencoders.kl import VAE
from drift.autoencoders.pixels import Pixels
from drift.autoencoders.rae import RAE

__all__ = ["AUTOENCODERS", "RAE", "VAE", "Autoencoder", "DiffusersAutoencoder", "Latents", "Pixels"]


class Autoencoder(Protocol):
    """A frozen pair of encoder and decoder. Nobody else knows how its latents are shifted and scaled."""

    needs_source: bool
    """Whether it has networks, and so files that it is loaded from."""
    has_posterior: bool
    """Whether `noise` has an effect on `encode`."""
    storage_dtype: np.dtype
    """How latents are stored: float16, or uint8 for pixels."""
    id: str
    """Folder or hub id that it was loaded from; the name of its kind if it needs none."""
    revision: str | None
    """Commit on the hub; None for a folder."""
    precision: str
    scaling_factor: float
    """Of its latents, as files of latents state it."""

    @classmethod
    def known(cls, source: str, revision: str | None, image_size: int) -> Latents | None:
        """What is known of the latents of square images without loading weights; None if nothing is.

        Raises `UserError` if what is known makes no sense, or the images' side does not fit.
        """
        ...

    @classmethod
    def from_pretrained(
        cls, source: str | Path, revision: str | None, device: str | torch.device, precision: str
    ) -> Self:
        """Load from a folder or, where there is none of that name, from the Hugging Face hub."""
        ...

    @property
    def device(self) -> torch.device: ...

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that its latents depend on."""
        ...

    def to(self, device: torch.device, /) -> Self: ...

    def compile_with(self, compiler: Callable[[Callable, str], Callable]) -> None:
        """Run its networks as `compiler` (function, name -> a faster function) returns them."""

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """Shape (C, h, w) of the latents of square images; raises `UserError` if their side does not fit."""
        ...

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """uint8 images `[B, H, W, 3]` -> latents `[B, C, h, w]`; standard normal `noise` gives a sample.

        Without a posterior, it changes nothing.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents `[B, C, h, w]` -> float32 images around [-1, 1], `[B, 3, H, W]`."""
        ...

    def in_float32(self) -> Self:
        """The same in float32 and not compiled, for a batch that was not finite in `precision`."""
        ...

    def tell_recomputed(self) -> None:
        """Print how many batches `in_float32` was asked for, if any."""


AUTOENCODERS: dict[str, type[Autoencoder]] = {"kl": VAE, "rae": RAE, "pixels": Pixels}
"""`encode.autoencoder.kind` -> its class."""
