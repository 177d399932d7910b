"""The KL autoencoder of Stable Diffusion, and everything that is a convention about it.

Images are uint8 `[B, H, W, 3]` outside and floats in [-1, 1], `[B, 3, H, W]`, inside the network; latents
are the network's z times its `scaling_factor` (0.18215 for the SD-VAE), or what else its config asks for
(`latent_scale`). Mirroring is done to images: the encoder does not commute with it, so the mirrored latents
of an image are not those of the mirrored image.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from drift.data.levels import Rounding, from_levels, to_levels
from drift.runtime.errors import UserError, one_of
from drift.runtime.torchvision import ensure_torchvision

CONFIG_FILE = "config.json"
# diffusers' defaults, for configs from before there were such keys
_DEFAULTS: dict[str, Any] = {
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
}
_IMAGES_PER_THREAD = 8  # on a CPU: enough to be efficient, few enough to keep many cores busy


def to_float(images: Tensor) -> Tensor:
    """uint8 `[B, H, W, 3]` -> float32 in [-1, 1], `[B, 3, H, W]`."""
    return from_levels(images.permute(0, 3, 1, 2))


def to_uint8(images: Tensor, rounding: Rounding = "nearest") -> Tensor:
    """Floats around [-1, 1], `[B, 3, H, W]` -> uint8 `[B, H, W, 3]`, by `to_levels`."""
    return to_levels(images, rounding).permute(0, 2, 3, 1).contiguous()


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


class VAE(nn.Module):
    """An `AutoencoderKL` of diffusers, frozen, with float32 weights: see `drift.autoencoders.Autoencoder`.

    With `precision` bfloat16 both networks run under autocast; what comes out is float32, but rounded like
    that. Some SD-VAEs overflow in half precision (float16 above all): see `in_float32`.
    """

    needs_source = True
    has_posterior = True
    storage_dtype = np.dtype(np.float16)

    def __init__(
        self,
        model: Any,  # whose types diffusers does not tell
        id: str,
        revision: str | None = None,
        precision: str = "float32",
    ):
        super().__init__()
        self.model: Any = model.float().eval().requires_grad_(False)
        self.id, self.revision = id, revision
        self.precision = one_of("precision", precision, "float32", "bfloat16")
        self.recomputed = 0
        """Batches that `in_float32` was asked for."""
        self._encode, self._decode = self._run_encoder, self._run_decoder
        self._compiled_for: torch.Size | None = None
        self.latent_scale = latent_scale(model.config, id)
        self.scaling_factor = self.latent_scale.factor

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        revision: str | None = None,
        device: str | torch.device = "cpu",
        precision: str = "float32",
        variant: str | None = None,
        **hub: Any,
    ) -> Self:
        """As `Autoencoder.from_pretrained`; `variant` is diffusers' name for another copy of the weights.

        `hub` are options of huggingface_hub's `snapshot_download`. What the hub once gave is found again
        without a network. Raises `UserError` if there is no such VAE or it is not whole.
        """
        # Imported here because they take seconds, and most importers of this module only convert images
        ensure_torchvision()
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        from drift.models.base import load_model, model_folder

        source, network = str(source), cast(Any, AutoencoderKL)  # whose types include tuples
        try:
            folder = model_folder(source, revision, variant, **hub)
            config = network.load_config(folder)
            model = load_model(lambda: network.from_config(config), folder, variant)
        except (UserError, OSError) as error:
            raise UserError(f"VAE {source}: {' '.join(str(error).split())}") from None
        commit = None if Path(source).is_dir() else folder.name  # the hub's cache names its folders by commit
        return cls(model, source, commit, precision).to(device)

    def compile_with(self, compiler: Callable[[Callable, str], Callable]) -> None:
        """Let `compiler` (function, name -> a faster function) have both networks, for shapes that repeat.

        Images whose number is not that of the first batch, such as the last ones, are encoded without it.
        """
        self._encode = compiler(self._run_encoder, "VAE's encoder")
        self._decode = compiler(self._run_decoder, "VAE's decoder")

    def in_float32(self) -> Self:
        """The same network in float32 and not compiled, for a batch that was not finite in bfloat16."""
        self.recomputed += 1
        if self.recomputed == 1:
            tqdm.write(
                f"note: VAE {self.id} has overflowed in {self.precision}; what is not finite is computed "
                "again in float32 (precision: float32 in encode or fid does so from the start)"
            )
        return type(self)(self.model, self.id, self.revision)

    def tell_recomputed(self) -> None:
        """Print how many batches were computed again, if any."""
        if self.recomputed:
            tqdm.write(f"note: {self.recomputed} batches of the VAE were computed again in float32")

    @property
    def device(self) -> torch.device:
        return self.model.device

    @cached_property
    def digest(self) -> str:
        """SHA-256 of scale and weights in hexadecimal: the same wherever and in whatever file they lie."""
        factor, mean, std = self.latent_scale
        digest = hashlib.sha256(f"{factor} {mean}{'' if std == 1 else f' {std}'}".encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        factor = 2 ** (len(self.model.config.block_out_channels) - 1)
        if image_size % factor:
            raise UserError(f"image_size = {image_size}: VAE {self.id} needs a multiple of {factor}")
        return self.model.config.latent_channels, image_size // factor, image_size // factor

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """uint8 `images [B, H, W, 3]` -> latents: the posterior's mean, or with `noise` a sample of it."""
        mean, std = self.moments(images)
        return self.latent_scale.apply(mean if noise is None else mean + std * noise)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior of uint8 `images [B, H, W, 3]`.

        Both float32 `[B, C, h, w]` on the VAE's device, and not scaled yet. The same bits for any number of
        threads; those of images in pinned memory may still be on their way to the device.
        """
        if self.device.type != "cpu":
            return self._moments(images)
        # oneDNN's convolutions round differently with another number of threads, so each part has one
        threads = torch.get_num_threads()
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            means, stds = zip(*pool.map(self._moments, images.split(_IMAGES_PER_THREAD)), strict=True)
        torch.set_num_threads(threads)  # for threads to come, which take over what was set last
        return torch.cat(means), torch.cat(stds)

    @torch.no_grad()
    def _moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        pixels = to_float(images.to(self.device, non_blocking=True))
        self._compiled_for = self._compiled_for or pixels.shape
        encode = self._encode if pixels.shape == self._compiled_for else self._run_encoder
        with self._autocast():
            mean, logvar = encode(pixels)
        return mean.float(), torch.exp(0.5 * logvar.float())

    def _run_encoder(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Floats in [-1, 1], `[B, 3, H, W]` -> mean and log-variance of the posterior, `[B, C, h, w]`."""
        posterior = self.model.encode(pixels).latent_dist
        return posterior.mean, posterior.logvar

    def _run_decoder(self, z: Tensor) -> Tensor:
        return self.model.decode(z).sample

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    def decode(self, latents: Tensor) -> Tensor:
        with self._autocast():
            return self._decode(self.latent_scale.invert(latents.to(self.device, torch.float32))).float()


def decode_latents(model: Any, latents: Tensor) -> Tensor:
    """Latents `[B, C, h, w]` -> images around [-1, 1], `[B, 3, H, W]`, in the precision of `model`.

    `model` is an AutoencoderKL of diffusers. The latents must be on the device that the model computes on.
    """
    z = latent_scale(model.config, "of the pipeline").invert(latents.float())
    return model.decode(z.to(model.dtype)).sample


def known_config(source: str | Path | None, revision: str | None = None) -> dict[str, Any] | None:
    """The config of a VAE from its folder or the hub's cache; None if there is none that can be read."""
    from huggingface_hub import try_to_load_from_cache

    if source is None:
        return None
    path: Any = Path(source) / CONFIG_FILE
    try:
        if not path.parent.is_dir():
            path = try_to_load_from_cache(str(source), CONFIG_FILE, revision=revision)
        return json.loads(Path(path).read_bytes())
    except (OSError, ValueError, TypeError):  # not an id on the hub, or not in its cache
        return None


def known_scaling_factor(source: str | Path | None, revision: str | None = None) -> float | None:
    """The scaling factor of a VAE, from `known_config`; raises `UserError` as `latent_scale` does."""
    config = known_config(source, revision)
    return None if config is None else latent_scale(config, str(source)).factor
