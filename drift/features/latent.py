"""The latent itself, without a network."""

from pathlib import Path
from typing import Literal

from torch import Tensor

from drift.autoencoders import Autoencoder
from drift.features.base import Encoder, EncoderOptions, register


def whole_latent(latents: Tensor) -> dict[str, Tensor]:
    """The set `global` (release): `[B, C, H, W]` as one vector per sample, `[B, 1, C*H*W]`."""
    return {"global": latents.flatten(1)[:, None]}


class LatentEncoder(Encoder):
    def encode(self, latents: Tensor) -> dict[str, Tensor]:
        return whole_latent(latents)


@register
class LatentOptions(EncoderOptions):
    """One feature set, `global`: the whole latent as one vector."""

    encoder: Literal["latent"] = "latent"

    def load(self, *, mae: Path | None = None, autoencoder: Autoencoder | None = None) -> Encoder:
        return LatentEncoder()
