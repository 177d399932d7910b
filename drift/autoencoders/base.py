"""What the autoencoders of diffusers have in common: images in and out, loading, precision, hashing.

Encoders take images as uint8 `[B, H, W, 3]`; decoders give floats around [-1, 1], `[B, 3, H, W]`.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from drift.data.levels import to_float
from drift.runtime.digests import tensors_digest
from drift.runtime.errors import UserError, one_of
from drift.runtime.torchvision import ensure_torchvision

CONFIG_FILE = "config.json"
_IMAGES_PER_THREAD = 8  # on a CPU: enough to be efficient, few enough to keep many cores busy


class Latents(NamedTuple):
    """What is known of an autoencoder's latents before it is loaded."""

    scaling_factor: float
    shape: tuple[int, int, int]
    """(C, h, w)"""


class DiffusersAutoencoder(nn.Module, ABC):
    """An autoencoder of diffusers, frozen, with float32 weights: see `drift.autoencoders.Autoencoder`.

    With `precision` bfloat16 both networks run under autocast; what comes out is float32, but rounded like
    that. Some overflow in half precision (float16 above all): see `in_float32`.
    """

    network: ClassVar[str]
    """Its class in diffusers."""
    called: ClassVar[str]
    """What messages call it."""
    needs_source = True
    has_posterior: bool
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
        self.scaling_factor = self.scale_of(model.config, id)

    @classmethod
    @abstractmethod
    def scale_of(cls, config: Mapping[str, Any], source: str) -> float:
        """The scaling factor by a config; raises `UserError`, which names `source`, if it cannot be."""

    @classmethod
    @abstractmethod
    def shape_of(cls, config: Mapping[str, Any], source: str, image_size: int) -> tuple[int, int, int]:
        """Shape (C, h, w) of latents by a config; raises `UserError` if images of this side do not fit."""

    @staticmethod
    @abstractmethod
    def decode_by(model: Any, latents: Tensor) -> Tensor:
        """Latents `[B, C, h, w]` -> images around [-1, 1], `[B, 3, H, W]`, in the precision of `model`.

        The latents must be on the device that diffusers' `model` computes on.
        """

    @abstractmethod
    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor: ...

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor: ...

    _to_pixels = staticmethod(to_float)
    """uint8 `[B, H, W, 3]` -> what the network takes, `[B, 3, H, W]`."""

    @abstractmethod
    def _run_encoder(self, pixels: Tensor) -> tuple[Tensor, ...]: ...

    @abstractmethod
    def _run_decoder(self, z: Tensor) -> Tensor: ...

    @abstractmethod
    def _decides(self) -> str:
        """What latents and images depend on besides the weights."""

    @staticmethod
    def _canonical(name: str) -> str:
        """A weight's name, the same for all versions of the libraries."""
        return name

    @classmethod
    def known(cls, source: str | Path, revision: str | None, image_size: int) -> Latents | None:
        """What a config in a folder or the hub's cache says; None if there is none that can be read.

        Raises `UserError` as `scale_of` and `shape_of` do.
        """
        config = known_config(source, revision)
        if config is None:
            return None
        try:
            shape = cls.shape_of(config, str(source), image_size)
        except (LookupError, TypeError):  # of another kind, which loading it will tell
            return None
        return Latents(cls.scale_of(config, str(source)), shape)

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

        Called on this class itself, it takes whichever kind the config names. `hub` are options of
        huggingface_hub's `snapshot_download`. What the hub once gave is found again without a network.
        Raises `UserError` if there is no such autoencoder or it is not whole.
        """
        # Imported here because it takes seconds, and most importers of this module only convert images
        ensure_torchvision()
        from drift.models.base import model_folder

        source, called = str(source), getattr(cls, "called", "VAE")
        try:
            folder = model_folder(source, revision, variant, **hub)
            config = _read_config(folder / CONFIG_FILE)
            kind = cls.kind_named(config.get("_class_name", "AutoencoderKL"))
            model = kind._load(config, folder, variant)
        except (UserError, OSError) as error:
            raise UserError(f"{called} {source}: {' '.join(str(error).split())}") from None
        commit = None if Path(source).is_dir() else folder.name  # the hub's cache names its folders by commit
        return kind(model, source, commit, precision).to(device)

    @classmethod
    def kind_named(cls, network: str) -> type[Self]:
        """This class or the subclass for a class of diffusers; raises `UserError` if there is none."""
        kinds = {kind.network: kind for kind in cls.__subclasses__() or [cls]}
        if network not in kinds:
            raise UserError(
                f"is an {network}, not an {' or '.join(kinds)}; name another, or correct "
                "encode.autoencoder.kind"
            )
        return kinds[network]

    @classmethod
    def _load(cls, config: Mapping[str, Any], folder: Path, variant: str | None) -> Any:
        """diffusers' network with the weights in `folder`."""
        import diffusers

        from drift.models.base import load_model

        network: Any = getattr(diffusers, cls.network)
        return load_model(lambda: network.from_config(config), folder, variant)

    def compile_with(self, compiler: Callable[[Callable, str], Callable]) -> None:
        """Let `compiler` (function, name -> a faster function) have both networks, for shapes that repeat.

        Images whose number is not that of the first batch, such as the last ones, are encoded without it.
        """
        self._encode = compiler(self._run_encoder, f"{self.called}'s encoder")
        self._decode = compiler(self._run_decoder, f"{self.called}'s decoder")

    def in_float32(self) -> Self:
        """The same network in float32 and not compiled, for a batch that was not finite in bfloat16."""
        self.recomputed += 1
        if self.recomputed == 1:
            tqdm.write(
                f"note: {self.called} {self.id} has overflowed in {self.precision}; what is not finite is "
                "computed again in float32 (precision: float32 in encode or fid does so from the start)"
            )
        return type(self)(self.model, self.id, self.revision)

    def tell_recomputed(self) -> None:
        """Print how many batches were computed again, if any."""
        if self.recomputed:
            tqdm.write(f"note: {self.recomputed} batches of the {self.called} were computed again in float32")

    @property
    def device(self) -> torch.device:
        return self.model.device

    @cached_property
    def digest(self) -> str:
        """SHA-256 of settings and weights in hexadecimal: the same wherever and in whatever file they lie."""
        tensors = {self._canonical(name): tensor for name, tensor in self.model.state_dict().items()}
        return tensors_digest(sorted(tensors.items()), self._decides())

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        return self.shape_of(self.model.config, self.id, image_size)

    def _encoded(self, images: Tensor) -> list[Tensor]:
        """What `_run_encoder` makes of uint8 `images [B, H, W, 3]`, in float32 and without gradient.

        The same bits for any number of threads; images in pinned memory may still be on their way.
        """
        if self.device.type != "cpu":
            return self._encoded_at_once(images)
        # oneDNN rounds differently with another number of threads, so each part has one
        threads = torch.get_num_threads()
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            parts = pool.map(self._encoded_at_once, images.split(_IMAGES_PER_THREAD))
            results = [torch.cat(each) for each in zip(*parts, strict=True)]
        torch.set_num_threads(threads)  # for threads to come, which take over what was set last
        return results

    @torch.no_grad()
    def _encoded_at_once(self, images: Tensor) -> list[Tensor]:
        pixels = self._to_pixels(images.to(self.device, non_blocking=True))
        self._compiled_for = self._compiled_for or pixels.shape
        encode = self._encode if pixels.shape == self._compiled_for else self._run_encoder
        with self._autocast():
            return [each.float() for each in encode(pixels)]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")


def known_config(source: str | Path, revision: str | None = None) -> dict[str, Any] | None:
    """The config of a model from its folder or the hub's cache; None if there is none that can be read."""
    from huggingface_hub import try_to_load_from_cache

    path: Any = Path(source) / CONFIG_FILE
    try:
        if not path.parent.is_dir():
            path = try_to_load_from_cache(str(source), CONFIG_FILE, revision=revision)
        return _read_config(Path(path))
    except (UserError, ValueError, TypeError):  # not an id on the hub, or not in its cache
        return None


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise UserError(f"{path}: is not a valid JSON file") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: holds {type(config).__name__}, not an object")
    return config
