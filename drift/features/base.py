"""What a feature encoder is, and the registry of them.

To add one, write a file in this folder with two classes: a `EncoderOptions` with `@register`, whose fields
are the options and whose `load` returns the other, an `Encoder`. Import the first in `__init__.py`, or it is
never registered. `latent.py` is the shortest example. Settings, stages and tests read `ENCODERS`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn


class Encoder(nn.Module, ABC):
    """A frozen network from latents to feature sets."""

    @abstractmethod
    def encode(self, latents: Tensor) -> dict[str, Tensor]:
        """Latents `[B, C, H, W]` -> feature sets `[B, L_j, C_j]` by name."""


class EncoderOptions(BaseModel):
    """Options of an encoder. A subclass narrows `encoder` to its name, which is its default as well."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    needs_mae: ClassVar[bool] = False
    """Whether it needs the MAE; the mae stage trains only if some encoder does."""
    needs_decoder: ClassVar[bool] = False
    """Whether it sees images, decoded from latents with gradients. No stage provides the decoder yet."""
    encoder: str

    def load(self, *, mae: Path | None = None, autoencoder: Any = None) -> Encoder:
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
    """The feature sets of several encoders. Sets with the same name must be the same: one of them is kept."""

    def __init__(self, encoders: Sequence[Encoder]):
        super().__init__()
        self.encoders = nn.ModuleList(encoders)

    def encode(self, latents: Tensor) -> dict[str, Tensor]:
        encoders = cast("Sequence[Encoder]", self.encoders)
        return {name: x for encoder in encoders for name, x in encoder.encode(latents).items()}


def load_encoders(
    options: Sequence[EncoderOptions], *, mae: Path | None = None, autoencoder: Any = None
) -> Encoder:
    """The encoders of some options as one, frozen and in evaluation mode; see `EncoderOptions.load`."""
    joined = Joined([one.load(mae=mae, autoencoder=autoencoder) for one in options])
    return joined.eval().requires_grad_(False)
