"""What a feature encoder is, and the registry of them.

To add one, write a file in this folder with two classes: an `EncoderOptions` with `@register`, whose fields
are the options and whose `load` returns the other, an `Encoder`. Import the first in `__init__.py`, or it is
never registered. `latent.py` is the shortest example, `dinov2.py` the shortest that sees images. Settings,
stages and tests read `ENCODERS`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, TypeVar, cast

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from drift.autoencoders import Autoencoder
from drift.runtime.digests import tensors_digest

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Encoder(nn.Module, ABC):
    """A frozen network from latents to feature sets."""

    @abstractmethod
    def encode(self, latents: Tensor) -> dict[str, Tensor]:
        """Latents `[B, C, H, W]` -> feature sets `[B, L_j, C_j]` by name."""

    @property
    def digest(self) -> str:
        """SHA-256 of its weights in hexadecimal, those of a decoder included."""
        return tensors_digest(sorted(self.state_dict().items()))


class ImageEncoder(Encoder):
    """An encoder of images: called with images, it needs no autoencoder; latents it sees decoded.

    Names of feature sets begin with that of the encoder, as those of all encoders of a run stand together.
    """

    _mean: Tensor
    _std: Tensor

    def __init__(self, autoencoder: Autoencoder | None = None):
        super().__init__()
        self.autoencoder = autoencoder
        for name, values in (("_mean", _IMAGENET_MEAN), ("_std", _IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    @abstractmethod
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images `[B, 3, H, W]` around [0, 1] -> feature sets `[B, L_j, C_j]` by name."""

    # Compiled in one piece with the network, gradients come out as 0 (PyTorch 2.13 on a CPU; docs/log.md)
    @torch.compiler.disable(recursive=True)
    def decode(self, latents: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` of latents `[B, C, h, w]`, with gradients. What leaves [0, 1] is not clipped
        (release)."""
        assert self.autoencoder is not None, "of an encoder that needs_decoder"
        if self.autoencoder.device != latents.device:  # one that is no module has not moved
            self.autoencoder = self.autoencoder.to(latents.device)
        return (self.autoencoder.decode(latents) + 1) / 2

    def encode(self, latents: Tensor) -> dict[str, Tensor]:
        return self(self.decode(latents))

    def prepared(self, images: Tensor, side: int) -> Tensor:
        """Images resized to `[B, 3, side, side]`, by ImageNet's mean and standard deviation.

        Bilinear, with antialiasing where that shrinks them (release).
        """
        images = images.float()
        if images.shape[2:] != (side, side):
            rows, columns = (_interpolation(size, side, images.device) for size in images.shape[2:])
            with torch.autocast(images.device.type, enabled=False):
                images = rows @ images @ columns.T
        return (images - self._mean) / self._std


def _interpolation(size: int, side: int, device: torch.device) -> Tensor:
    """What antialiased bilinear interpolation from `size` to `side` pixels does, `[side, size]`.

    As a matrix, because the gradient of PyTorch's own operator is not deterministic on GPUs.
    """
    identity = torch.eye(size, device=device)[None, None]
    return F.interpolate(identity, (side, size), mode="bilinear", antialias=True)[0, 0]


class EncoderOptions(BaseModel):
    """Options of an encoder. A subclass narrows `encoder` to its name, which is its default as well."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    needs_mae: ClassVar[bool] = False
    """Whether it needs the MAE; the mae stage trains only if some encoder does."""
    needs_decoder: ClassVar[bool] = False
    """Whether it is an `ImageEncoder`; the drift stage loads the autoencoder only if some encoder is."""
    encoder: str

    def load(self, *, mae: Path | None = None, autoencoder: Autoencoder | None = None) -> Encoder:
        """Build it from the folder of an MAE, or on an autoencoder; it looks only at what it needs.

        Raises `UserError` if weights are missing or damaged.
        """
        raise NotImplementedError


ENCODERS: dict[str, type[EncoderOptions]] = {}
T = TypeVar("T", bound=EncoderOptions)


def register(options: type[T]) -> type[T]:
    """Add an encoder under its name."""
    ENCODERS[options.model_fields["encoder"].default] = options
    return options


class Joined(Encoder):
    """The feature sets of several encoders. Sets with the same name must be the same: one of them is kept.

    Latents are decoded once for all encoders of images, which costs more than most of these.
    """

    def __init__(self, encoders: Sequence[Encoder]):
        super().__init__()
        self.encoders = nn.ModuleList(encoders)

    def encode(self, latents: Tensor) -> dict[str, Tensor]:
        sets, images = {}, None
        for encoder in cast("Sequence[Encoder]", self.encoders):
            if isinstance(encoder, ImageEncoder):
                images = encoder.decode(latents) if images is None else images
                sets |= encoder(images)
            else:
                sets |= encoder.encode(latents)
        return sets


def load_encoders(
    options: Sequence[EncoderOptions], *, mae: Path | None = None, autoencoder: Autoencoder | None = None
) -> Encoder:
    """The encoders of some options as one, frozen and in evaluation mode; see `EncoderOptions.load`."""
    joined = Joined([one.load(mae=mae, autoencoder=autoencoder) for one in options])
    return joined.eval().requires_grad_(False)
