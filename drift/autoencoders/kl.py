"""The frozen autoencoder between images and latents, and everything that is a convention about the two.

Images are uint8 `[B, H, W, 3]` outside and floats in [-1, 1], `[B, 3, H, W]`, inside the network; latents
are the network's times its `scaling_factor` (0.18215 for the SD-VAE), or what else its config asks for
(`latent_scale`). Mirroring is done to images: the encoder does not commute with it, so the mirrored latents
of an image are not those of the mirrored image.
"""

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from drift.runtime.errors import UserError
from drift.runtime.files import without_wrappers
from drift.runtime.hub import download
from drift.runtime.torchvision import ensure_torchvision

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"  # diffusers' name for the weights of a model
_SCALING_FACTOR = 0.18215  # diffusers' default, for configs from before there was such a key
VAEPrecision = Literal["float32", "bfloat16"]
Rounding = Literal["nearest", "down"]
_IMAGES_PER_THREAD = 8  # on a CPU: enough to be efficient, few enough to keep many cores busy


def to_float(images: Tensor) -> Tensor:
    """uint8 `[B, H, W, 3]` -> float32 in [-1, 1], `[B, 3, H, W]`."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(images: Tensor, rounding: Rounding = "nearest") -> Tensor:
    """Floats around [-1, 1], `[B, 3, H, W]` -> uint8 `[B, H, W, 3]`: the values that a PNG would hold.

    `rounding` down cuts off what is beyond 8 bits, as release and prior do: half a level darker on average.
    """
    to_whole = {"nearest": torch.round, "down": torch.floor}[rounding]
    levels = to_whole((images.float() + 1) * 127.5).clamp(0, 255)
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


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
    factor, shift = config["scaling_factor"], config["shift_factor"]
    mean, std = config["latents_mean"], config["latents_std"]
    _require_numbers(source, "scaling_factor", factor, positive=True)
    if mean is None and std is None:
        _require_numbers(source, "shift_factor", shift or 0)
        return LatentScale(float(factor), float(shift or 0), 1.0)
    if shift:
        raise UserError(
            f"VAE {source}: has shift_factor = {shift} beside latents_mean and latents_std, which no "
            f"pipeline of diffusers combines; take one of them out of its {CONFIG_FILE}"
        )
    _require_numbers(source, "latents_mean", mean, channels=config["latent_channels"])
    _require_numbers(source, "latents_std", std, channels=config["latent_channels"], positive=True)
    return LatentScale(float(factor), tuple(mean), tuple(std))


def _require_numbers(
    source: str, name: str, value: Any, *, channels: int | None = None, positive: bool = False
) -> None:
    numbers = value if channels else [value]
    if not (
        isinstance(numbers, list | tuple)
        and len(numbers) == (channels or 1)
        and all(type(n) in (int, float) and math.isfinite(n) and (n > 0 or not positive) for n in numbers)
    ):
        kind = "positive number" if positive else "number"
        wanted = f"a list of {channels} {kind}s" if channels else f"a {kind}"
        raise UserError(
            f"VAE {source}: {name} is {json.dumps(value)} where {wanted} is wanted; correct its "
            f"{CONFIG_FILE}, or name another VAE"
        )


class VAE(nn.Module):
    """An `AutoencoderKL` of diffusers, frozen, with float32 weights, and its scale.

    `id` is the folder or the hub id that it was loaded from, `revision` the commit on the hub, None for a
    folder. With `precision` bfloat16 both networks run under autocast; what comes out is float32, but rounded
    like that. Some SD-VAEs overflow in half precision (float16 above all): see `in_float32`.
    """

    def __init__(
        self,
        model: "AutoencoderKL",
        id: str,
        revision: str | None = None,
        precision: VAEPrecision = "float32",
    ):
        super().__init__()
        if precision not in get_args(VAEPrecision):
            raise ValueError(f"precision {precision!r}: allowed: {', '.join(get_args(VAEPrecision))}")
        self.model = model.float().eval().requires_grad_(False)
        self.id = id
        self.revision = revision
        self.precision = precision
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
        precision: VAEPrecision = "float32",
        variant: str | None = None,
        **hub: Any,
    ) -> "VAE":
        """Load from a folder or, where there is none of that name, from the Hugging Face hub.

        `revision` is a branch, tag or commit on the hub; folders have none. What the hub once gave is found
        again without a network. `variant` is diffusers' name for another copy of the weights, such as fp16,
        which is taken where there is one; `hub` are options of `drift.runtime.hub.download`. Raises `UserError` if
        neither exists or what is there is no whole VAE.
        """
        source = str(source)
        for weights in dict.fromkeys((_weights_file(variant), WEIGHTS_FILE)):
            if Path(source).is_dir():
                folder, commit = Path(source), None
            else:
                folder = _download(source, revision, weights, hub)
                commit = folder.name  # the hub's cache names its folders by commit
            if (folder / weights).is_file():
                break
        if weights == WEIGHTS_FILE:
            variant = None
        return cls(_load(source, folder, variant), source, commit, precision).to(device)

    def compile_with(self, compiler: Callable[[Callable, str], Callable]) -> None:
        """Let `compiler` (function, name -> a faster function) have both networks, for shapes that repeat.

        Images whose number is not that of the first batch, such as the last ones, are encoded without it.
        """
        self._encode = compiler(self._run_encoder, "VAE's encoder")
        self._decode = compiler(self._run_decoder, "VAE's decoder")

    def in_float32(self) -> "VAE":
        """The same network in float32 and not compiled, for a batch that was not finite in bfloat16.

        The first time, that is told on the screen.
        """
        self.recomputed += 1
        if self.recomputed == 1:
            tqdm.write(
                f"note: VAE {self.id} has overflowed in {self.precision}; what is not finite is computed "
                "again in float32 (precision: float32 in encode or fid does so from the start)"
            )
        return VAE(self.model, self.id, self.revision)

    def tell_recomputed(self) -> None:
        """Say how many batches were computed again, if any."""
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
        """Shape (C, h, w) of the latents of square images; raises `UserError` if their side does not fit."""
        factor = 2 ** (len(self.model.config.block_out_channels) - 1)
        if image_size % factor:
            raise UserError(
                f"image_size = {image_size}: VAE {self.id} needs a multiple of {factor}; choose one"
            )
        return self.model.config.latent_channels, image_size // factor, image_size // factor

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """uint8 `images [B, H, W, 3]` -> latents: the posterior's mean, or with `noise` a sample of it."""
        mean, std = self.moments(images)
        return self.scale(mean if noise is None else mean + std * noise)

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

    def _autocast(self) -> AbstractContextManager:
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def scale(self, z: Tensor) -> Tensor:
        """What the encoder gives -> latents, whose standard deviation is about 1."""
        return self.latent_scale.apply(z)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents `[B, C, h, w]` -> float32 images around [-1, 1], `[B, 3, H, W]`; see `to_uint8`."""
        with self._autocast():
            return self._decode(self.latent_scale.invert(latents.to(self.device, torch.float32))).float()


def decode_latents(model: "AutoencoderKL", latents: Tensor) -> Tensor:
    """Latents `[B, C, h, w]` -> images around [-1, 1], `[B, 3, H, W]`, in the precision of `model`.

    The latents must be on the device that the model computes on.
    """
    z = latent_scale(model.config, "of the pipeline").invert(latents.float())
    return model.decode(z.to(model.dtype)).sample


def known_scaling_factor(source: str | Path, revision: str | None = None) -> float | None:
    """The scaling factor of the VAE that `VAE.from_pretrained` would load, without weights or network.

    From the config in the folder or the hub's cache; None if there is none that can be read. Raises
    `UserError` if the config has something else there than a positive number.
    """
    from huggingface_hub import try_to_load_from_cache

    path = Path(source) / CONFIG_FILE
    try:
        if not path.parent.is_dir():
            cached = try_to_load_from_cache(str(source), CONFIG_FILE, revision=revision)
            if not isinstance(cached, str):
                return None
            path = Path(cached)
        config = json.loads(path.read_bytes())
    except (OSError, ValueError):  # the latter also for a path that cannot be an id on the hub
        return None
    factor = config.get("scaling_factor", _SCALING_FACTOR)
    _require_numbers(str(source), "scaling_factor", factor, positive=True)
    return float(factor)


def _download(source: str, revision: str | None, weights: str, options: Mapping[str, Any]) -> Path:
    """The folder of the hub's cache that holds the VAE `source`, downloaded if it is not there."""
    # Not by diffusers' own downloader, which retries for half a minute where there is no network
    return download(
        source,
        revision,
        [CONFIG_FILE, weights],
        what=f"VAE {source}: is not a local folder, and",
        way_out=f"put its {CONFIG_FILE} and {weights} into a folder and name that",
        **options,
    )


def _weights_file(variant: str | None) -> str:
    return WEIGHTS_FILE.replace(".", f".{variant}.") if variant else WEIGHTS_FILE


def _load(source: str, folder: Path, variant: str | None) -> "AutoencoderKL":
    weights = _weights_file(variant)
    for name in (CONFIG_FILE, weights):
        if not (folder / name).is_file():
            raise UserError(
                f"VAE {source}: there is no {name} in {folder}; name a folder that holds an AutoencoderKL "
                "as diffusers saves it"
            )
    # Imported here because it takes seconds, and most importers of this module only convert images
    ensure_torchvision()
    from diffusers import AutoencoderKL

    try:
        with _without_wrappers(folder, weights) as bare:
            model, info = AutoencoderKL.from_pretrained(
                bare,
                local_files_only=True,
                variant=variant,
                use_safetensors=True,
                low_cpu_mem_usage=False,  # needs the package accelerate otherwise
                output_loading_info=True,
            )
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"VAE {source}: damaged or no AutoencoderKL ({reason}); fetch {folder} again"
        ) from None
    # diffusers only warns, and leaves random numbers in parameters that the file lacks
    foreign = [name for kind in ("missing_keys", "unexpected_keys") for name in info[kind]]
    if foreign:
        raise UserError(
            f"VAE {source}: {CONFIG_FILE} and {weights} in {folder} do not belong together "
            f"({len(foreign)} parameters differ, such as {min(foreign)}); fetch them again"
        )
    return model


@contextmanager
def _without_wrappers(folder: Path, weights: str) -> Iterator[Path]:
    """`folder`, or a temporary copy of it if its weights have names that a wrapper has changed."""
    try:
        with safe_open(folder / weights, framework="pt") as file:
            names = dict.fromkeys(file.keys())
    except (SafetensorError, OSError):
        names = {}  # damaged: diffusers says how
    if without_wrappers(names).keys() == names.keys():
        yield folder
        return
    with tempfile.TemporaryDirectory() as copy:
        shutil.copyfile(folder / CONFIG_FILE, Path(copy, CONFIG_FILE))
        save_file(without_wrappers(load_file(folder / weights)), Path(copy, weights))
        yield Path(copy)
