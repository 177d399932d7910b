"""The KL autoencoder of Stable Diffusion, and everything that is a convention about it.

Images are uint8 `[B, H, W, 3]` outside and floats in [-1, 1], `[B, 3, H, W]`, inside the network; latents
are the network's z times its `scaling_factor` (0.18215 for the SD-VAE), or what else its config asks for
(`latent_scale`). Mirroring is done to images: the encoder does not commute with it, so the mirrored latents
of an image are not those of the mirrored image.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from drift.autoencoders.base import CONFIG_FILE, DiffusersAutoencoder
from drift.runtime.errors import UserError

# diffusers' defaults, for configs from before there were such keys
_DEFAULTS: dict[str, Any] = {
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
}


class LatentScale(NamedTuple):
    """How the encoder's z becomes latents; `mean` and `std` are one number, or one for each channel."""

    factor: float
    mean: float | tuple[float, ...]
    std: float | tuple[float, ...]

    def apply(self, z: Tensor) -> Tensor:
        """z -> latents, both `[B, C, h, w]`."""
        return (z - _per_channel(self.mean, z)) * self.factor / _per_channel(self.std, z)

    def invert(self, latents: Tensor) -> Tensor:
        """Latents -> z, both `[B, C, h, w]`."""
        return latents * _per_channel(self.std, latents) / self.factor + _per_channel(self.mean, latents)


def _per_channel(values: float | tuple[float, ...], like: Tensor) -> float | Tensor:
    return values if isinstance(values, float) else like.new_tensor(values)[:, None, None]


def latent_scale(config: Mapping[str, Any], source: str) -> LatentScale:
    """What the config of an `AutoencoderKL` says of its latents, as diffusers' pipelines apply it.

    `shift_factor` is one number (Stable Diffusion 3); `latents_mean` and `latents_std` have one for each
    channel (Stable Diffusion XL). Raises `UserError`, which names `source`, for what no pipeline could use.
    """
    config = {**_DEFAULTS, **config}
    factor, shift, mean, std = (config[key] for key in _DEFAULTS)
    try:
        if mean is None or std is None:
            assert mean is std
            scale = LatentScale(float(factor), float(shift or 0), 1.0)
        else:
            assert not shift and len(mean) == len(std) == config["latent_channels"]
            scale = LatentScale(float(factor), tuple(mean), tuple(std))
        positive = [scale.factor, *np.atleast_1d(scale.std)]
        assert np.isfinite([*positive, *np.atleast_1d(scale.mean)]).all() and min(positive) > 0
    except (TypeError, ValueError, AssertionError):
        found = ", ".join(f"{key} = {json.dumps(config[key])}" for key in _DEFAULTS)
        raise UserError(
            f"VAE {source}: {CONFIG_FILE} has {found}; needed are a positive scaling_factor, and either a "
            "shift_factor (or null), or a latents_mean and a positive latents_std for each channel"
        ) from None
    return scale


class VAE(DiffusersAutoencoder):
    """An `AutoencoderKL` of diffusers; its latents are the posterior's mean, or a sample of it, scaled."""

    network = "AutoencoderKL"
    called = "VAE"
    has_posterior = True

    @property
    def latent_scale(self) -> LatentScale:
        return latent_scale(self.model.config, self.id)

    @classmethod
    def scale_of(cls, config: Mapping[str, Any], source: str) -> float:
        return latent_scale(config, source).factor

    @classmethod
    def shape_of(cls, config: Mapping[str, Any], source: str, image_size: int) -> tuple[int, int, int]:
        factor = 2 ** (len(config["block_out_channels"]) - 1)
        if image_size % factor:
            raise UserError(f"image_size = {image_size}: VAE {source} needs a multiple of {factor}")
        return config["latent_channels"], image_size // factor, image_size // factor

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """uint8 `images [B, H, W, 3]` -> latents: the posterior's mean, or with `noise` a sample of it."""
        mean, std = self.moments(images)
        return self.latent_scale.apply(mean if noise is None else mean + std * noise)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior of uint8 `images [B, H, W, 3]`.

        Both float32 `[B, C, h, w]` on the VAE's device, and not scaled yet. The same bits for any number of
        threads; those of images in pinned memory may still be on their way to the device.
        """
        mean, logvar = self._encoded(images)
        return mean, torch.exp(0.5 * logvar)

    def decode(self, latents: Tensor) -> Tensor:
        with self._autocast():
            return self._decode(self.latent_scale.invert(latents.to(self.device, torch.float32))).float()

    @staticmethod
    def decode_by(model: Any, latents: Tensor) -> Tensor:
        z = latent_scale(model.config, "of the pipeline").invert(latents.float())
        return model.decode(z.to(model.dtype)).sample

    def _run_encoder(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Floats in [-1, 1], `[B, 3, H, W]` -> mean and log-variance of the posterior, `[B, C, h, w]`."""
        posterior = self.model.encode(pixels).latent_dist
        return posterior.mean, posterior.logvar

    def _run_decoder(self, z: Tensor) -> Tensor:
        return self.model.decode(z).sample

    def _decides(self) -> str:
        factor, mean, std = self.latent_scale
        return f"{factor} {mean}{'' if std == 1 else f' {std}'}"
